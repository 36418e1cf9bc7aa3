"""Names of resources, URNs and Docker objects: one place, because program, engine and plugins must agree on them."""

from __future__ import annotations

from dataclasses import dataclass

PROJECT = "machineuse"
COMPONENT_TYPE = "machineuse:index:Instance"
VOLUME_TYPE = "docker:index/volume:Volume"
CONTAINER_TYPE = "docker:index/container:Container"
NETWORK_TYPE = "docker:index/network:Network"
PROVIDER_TYPE = "pulumi:providers:docker"
SNAPSHOT_TYPE = "machineuse:index:Snapshot"
RESTORE_TYPE = "machineuse:index:Restore"
NODE_IMAGE_TYPE = "machineuse:index:NodeImage"
CLOUD_VOLUME_TYPE = "machineuse:index:CloudVolume"
CLAIM_TYPE = "machineuse:index:Claim"

CLUSTER_LABEL = "machineuse.cluster"
LEDGER_LABEL = "machineuse.ledger"
INSTANCE_LABEL = "machineuse.instance"
URN_LABEL = "machineuse.urn"
PIDS_LABEL = "machineuse.pids"
"""Bounds the number of processes in a container: no input of pulumi_docker's Container does."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names that belong to one cluster."""

    cluster: str

    def urn(self, type_: str, name: str) -> str:
        """Return the URN of a resource right below the stack."""
        return f"urn:pulumi:{self.cluster}::{PROJECT}::{type_}::{name}"

    def child_urn(self, type_: str, name: str) -> str:
        """Return the URN of a resource below an instance's component."""
        return self.urn(f"{COMPONENT_TYPE}${type_}", name)

    def component_urn(self, instance_id: str) -> str:
        """Return the URN of an instance's component."""
        return self.urn(COMPONENT_TYPE, instance_id)

    def volume_urn(self, instance_id: str) -> str:
        """Return the URN of an instance's home volume."""
        return self.child_urn(VOLUME_TYPE, volume_name(instance_id))

    def cloud_volume_urn(self, instance_id: str) -> str:
        """Return the URN of the cloud volume that an instance's home volume is on."""
        return self.child_urn(CLOUD_VOLUME_TYPE, cloud_volume_name(instance_id))

    def container_urn(self, instance_id: str) -> str:
        """Return the URN of an instance's container."""
        return self.child_urn(CONTAINER_TYPE, container_name(instance_id))

    def restore_urn(self, instance_id: str) -> str:
        """Return the URN of what filled an instance's volume."""
        return self.child_urn(RESTORE_TYPE, restore_name(instance_id))

    def snapshot_urn(self, instance_id: str, generation: int) -> str:
        """Return the URN of one snapshot of an instance."""
        return self.child_urn(SNAPSHOT_TYPE, snapshot_name(instance_id, generation))

    def node_images(self, node_id: str) -> str:
        """Return a pattern for the URNs of all images on a node: one asterisk would end at the colon in a name."""
        return self.urn(NODE_IMAGE_TYPE, node_image_name(node_id, "**"))

    def docker_network(self, ledger_id: str) -> str:
        """Return the name of the cluster's network on each node; two checkouts may share an engine."""
        return f"{PROJECT}-{self.cluster}-{ledger_id[:8]}"

    def docker_container(self, instance_id: str) -> str:
        """Return the name of an instance's container on its node."""
        return f"{PROJECT}-{self.cluster}-{instance_id}"

    def docker_volume(self, instance_id: str) -> str:
        """Return the name of an instance's home volume on its node."""
        return f"{PROJECT}-{self.cluster}-{instance_id}-home"

    def docker_copy(self, instance_id: str, generation: int) -> str:
        """Return the name of the volume that keeps a snapshot's quick copy on its node."""
        return f"{PROJECT}-{self.cluster}-{instance_id}-copy-{generation}"


def if_there(urn: str) -> str:
    """Return a pattern that matches just this URN of an instance.

    The engine fails an update that targets a URN which is neither declared nor in the stack, but takes a pattern that
    matches nothing: for deleting what may be gone already.
    """
    return urn.replace(f"::{COMPONENT_TYPE}", f"::{COMPONENT_TYPE[:-1]}*", 1)


def node_if_there(urn: str) -> str:
    """Return a pattern that matches just this URN of a node's provider, network or image."""
    kind, _, name = urn.rpartition("::")
    return f"{kind[:-1]}*::{name}"


def provider_name(node_id: str) -> str:
    """Return the resource name of a node's provider."""
    return f"node-{node_id}"


def network_name(node_id: str) -> str:
    """Return the resource name of a node's network."""
    return f"{node_id}-network"


def node_image_name(node_id: str, image: str) -> str:
    """Return the resource name of an image of the catalogue on a node."""
    return f"{node_id}-image-{image}"


def volume_name(instance_id: str) -> str:
    """Return the resource name of an instance's home volume."""
    return f"{instance_id}-home"


def cloud_volume_name(instance_id: str) -> str:
    """Return the resource name of the cloud volume that an instance's home volume is on."""
    return f"{instance_id}-disk"


def container_name(instance_id: str) -> str:
    """Return the resource name of an instance's container."""
    return f"{instance_id}-browser"


def restore_name(instance_id: str) -> str:
    """Return the resource name of what filled an instance's volume."""
    return f"{instance_id}-restore"


def snapshot_name(instance_id: str, generation: int) -> str:
    """Return the resource name of one snapshot of an instance."""
    return f"{instance_id}-snapshot-{generation}"
