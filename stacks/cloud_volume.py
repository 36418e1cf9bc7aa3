"""A home on a cloud volume in the program; served by the `machineuse` plugin."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi

from stacks.names import CLOUD_VOLUME_TYPE
from stacks.properties import CamelCaseResource


class CloudVolume(CamelCaseResource):
    """A volume of an instance's own, attached to its node, with a file system on it."""

    device: pulumi.Output[str]
    """Its path on the node; the same as long as it is attached to that machine."""
    volume_id: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        *,
        cluster: pulumi.Input[str],
        ledger_id: pulumi.Input[str],
        instance: pulumi.Input[str],
        generation: pulumi.Input[int],
        restored_generation: pulumi.Input[int],
        name: pulumi.Input[str],
        node_id: pulumi.Input[str],
        docker_host: pulumi.Input[str],
        docker_cert_path: pulumi.Input[str] | None = None,
        docker_ssh_opts: pulumi.Input[Sequence[str]] | None = None,
        machine: pulumi.Input[str],
        zone: pulumi.Input[str],
        size_gib: pulumi.Input[int],
        helper_image: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        inputs = {
            "cluster": cluster,
            "ledger_id": ledger_id,
            "instance": instance,
            "generation": generation,
            "restored_generation": restored_generation,
            "name": name,
            "node_id": node_id,
            "docker_host": docker_host,
            "docker_cert_path": docker_cert_path,
            "docker_ssh_opts": docker_ssh_opts,
            "machine": machine,
            "zone": zone,
            "size_gib": size_gib,
            "helper_image": helper_image,
        }
        super().__init__(CLOUD_VOLUME_TYPE, resource_name, inputs | dict.fromkeys(("device", "volume_id")), opts)
