"""Snapshots in the program: taking one and giving one back are resources, served by the `machineuse` plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pulumi

from stacks.names import RESTORE_TYPE, SNAPSHOT_TYPE
from stacks.properties import CamelCaseResource


class Snapshot(CamelCaseResource):
    """A verified snapshot of an instance.

    Creating it stops the instance's container and leaves it stopped, unless it is `live`: then it goes on running.
    """

    bytes: pulumi.Output[int]
    """Size in the store."""
    created_at: pulumi.Output[str]
    entries: pulumi.Output[int]
    manifest_sha256: pulumi.Output[str]
    parts: pulumi.Output[list[dict[str, Any]]]
    quick_copy: pulumi.Output[bool]
    """Whether the node keeps a copy for a quick start."""
    quick_copy_error: pulumi.Output[str | None]
    stopped_cleanly: pulumi.Output[bool]

    def __init__(
        self,
        resource_name: str,
        *,
        cluster: pulumi.Input[str],
        ledger_id: pulumi.Input[str],
        instance: pulumi.Input[str],
        generation: pulumi.Input[int],
        node_id: pulumi.Input[str],
        docker_host: pulumi.Input[str],
        docker_cert_path: pulumi.Input[str | None] = None,
        docker_ssh_opts: pulumi.Input[Sequence[str] | None] = None,
        container: pulumi.Input[str],
        volume: pulumi.Input[str],
        image: pulumi.Input[str],
        home_path: pulumi.Input[str],
        copy_volume: pulumi.Input[str],
        helper_image: pulumi.Input[str],
        stop_timeout_s: pulumi.Input[int],
        live: pulumi.Input[bool] = False,
        cloud_region: pulumi.Input[str] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        inputs = {
            "cluster": cluster,
            "ledger_id": ledger_id,
            "instance": instance,
            "generation": generation,
            "node_id": node_id,
            "docker_host": docker_host,
            "docker_cert_path": docker_cert_path,
            "docker_ssh_opts": docker_ssh_opts,
            "container": container,
            "volume": volume,
            "image": image,
            "home_path": home_path,
            "copy_volume": copy_volume,
            "helper_image": helper_image,
            "stop_timeout_s": stop_timeout_s,
            "live": live,
            "cloud_region": cloud_region,
        }
        outputs = (
            "bytes",
            "created_at",
            "entries",
            "manifest_sha256",
            "parts",
            "quick_copy",
            "quick_copy_error",
            "stopped_cleanly",
        )
        super().__init__(SNAPSHOT_TYPE, resource_name, inputs | dict.fromkeys(outputs), opts)


class Restore(CamelCaseResource):
    """A home volume filled from a snapshot, before a container uses it."""

    image: pulumi.Output[str]
    """The image for the instance's container: the original one, or one with what the instance had changed above it."""
    method_used: pulumi.Output[str]
    fallback_reason: pulumi.Output[str | None]
    bytes: pulumi.Output[int]

    def __init__(
        self,
        resource_name: str,
        *,
        cluster: pulumi.Input[str],
        ledger_id: pulumi.Input[str],
        instance: pulumi.Input[str],
        snapshot_generation: pulumi.Input[int],
        method: pulumi.Input[str],
        node_id: pulumi.Input[str],
        docker_host: pulumi.Input[str],
        docker_cert_path: pulumi.Input[str | None] = None,
        docker_ssh_opts: pulumi.Input[Sequence[str] | None] = None,
        volume: pulumi.Input[str],
        image: pulumi.Input[str],
        helper_image: pulumi.Input[str],
        copy_volume: pulumi.Input[str],
        cloud_volume: pulumi.Input[str] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        inputs = {
            "cluster": cluster,
            "ledger_id": ledger_id,
            "instance": instance,
            "snapshot_generation": snapshot_generation,
            "method": method,
            "node_id": node_id,
            "docker_host": docker_host,
            "docker_cert_path": docker_cert_path,
            "docker_ssh_opts": docker_ssh_opts,
            "volume": volume,
            "image": image,
            "helper_image": helper_image,
            "copy_volume": copy_volume,
            "cloud_volume": cloud_volume,
        }
        outputs = ("method_used", "fallback_reason", "bytes")
        super().__init__(RESTORE_TYPE, resource_name, inputs | dict.fromkeys(outputs), opts)
