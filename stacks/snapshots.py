"""Snapshots in the program: taking one and giving one back are resources, served by the `machineuse` plugin."""

from __future__ import annotations

from typing import Any

import pulumi

from stacks.resource import Resource

SNAPSHOT_TYPE = "machineuse:index:Snapshot"
RESTORE_TYPE = "machineuse:index:Restore"


class Snapshot(Resource):
    """A verified snapshot of an instance. Creating it stops the instance's container and leaves it stopped."""

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
        container: pulumi.Input[str],
        volume: pulumi.Input[str],
        image: pulumi.Input[str],
        home_path: pulumi.Input[str],
        copy_volume: pulumi.Input[str],
        helper_image: pulumi.Input[str],
        stop_timeout_s: pulumi.Input[int],
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
            "container": container,
            "volume": volume,
            "image": image,
            "home_path": home_path,
            "copy_volume": copy_volume,
            "helper_image": helper_image,
            "stop_timeout_s": stop_timeout_s,
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


class Restore(Resource):
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
            "volume": volume,
            "image": image,
            "helper_image": helper_image,
            "copy_volume": copy_volume,
            "cloud_volume": cloud_volume,
        }
        outputs = ("method_used", "fallback_reason", "bytes")
        super().__init__(RESTORE_TYPE, resource_name, inputs | dict.fromkeys(outputs), opts)
