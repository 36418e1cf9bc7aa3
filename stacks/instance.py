"""One browser instance as a resource.

    running   Instance ─┬─ CloudVolume (where the node     dormant   Instance ─── Snapshot
                        │  has such: the home is on it)
                        ├─ Volume (home)
                        ├─ Restore (only after a revive)
                        └─ Container

A snapshot that is being taken stands beside the body it is taken of; it is the only thing left when that body is gone.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pulumi
import pulumi_docker as docker

from stacks import names
from stacks.cloud_volume import CloudVolume
from stacks.names import CLUSTER_LABEL, INSTANCE_LABEL, LEDGER_LABEL, PIDS_LABEL, URN_LABEL, Names
from stacks.snapshots import Restore, Snapshot
from stacks.spec import (
    CDP_PORT,
    HOME_PATH,
    SECCOMP_PROFILE,
    STREAM_PORT,
    CloudVolumeSpec,
    ClusterSpec,
    InstanceSpec,
    NodeSpec,
    SnapshotRef,
)

STOP_TIMEOUT_S = 10


@cache
def read_seccomp_profile() -> str:
    """Return the profile as Docker's API wants it: the JSON itself, minified."""
    return json.dumps(json.loads(SECCOMP_PROFILE.read_text()), separators=(",", ":"))


def volume_arguments(
    spec: InstanceSpec, *, cluster: ClusterSpec, ledger_id: str, device: pulumi.Input[str] | None = None
) -> dict[str, Any]:
    """Return the arguments of an instance's home volume, which is on `device` where there is one."""
    own = Names(cluster.name)
    quota = spec.disk_quota_gib
    options: dict[str, pulumi.Input[str]] | None = None
    if device is not None:
        options = {"type": "ext4", "device": device, "o": "noatime,nodev"}
    elif quota is not None:
        options = {"size": f"{max(int(quota * 1024), 1)}m"}  # 0 would be no limit
    return {
        "name": own.docker_volume(spec.id),
        "driver_opts": options,
        "labels": _labels(spec, cluster=cluster, ledger_id=ledger_id, urn=own.volume_urn(spec.id)),
    }


def container_arguments(
    spec: InstanceSpec,
    *,
    cluster: ClusterSpec,
    ledger_id: str,
    node: NodeSpec,
    image: pulumi.Input[str],
    volume: pulumi.Input[str],
) -> dict[str, Any]:
    """Return the arguments of an instance's container: as small and as unprivileged as a browser can do with."""
    own = Names(cluster.name)
    published = [
        {"internal": inside, "external": outside, "ip": node.bind_ip}
        for inside, outside in ((CDP_PORT, spec.debug_port), (STREAM_PORT, spec.stream_port))
        if outside is not None
    ]
    labels = _labels(spec, cluster=cluster, ledger_id=ledger_id, urn=own.container_urn(spec.id))
    return {
        "name": own.docker_container(spec.id),
        "image": image,
        "memory": spec.memory_mib,
        "memory_swap": spec.memory_mib,
        "cpus": f"{spec.cpus:.1f}",
        "shm_size": spec.shm_mib,
        "ports": published or None,
        "mounts": [{"type": "volume", "source": volume, "target": HOME_PATH}],
        "network_mode": own.docker_network(ledger_id),
        "capabilities": {"drops": ["ALL"]},
        "security_opts": ["no-new-privileges", f"seccomp={read_seccomp_profile()}"],
        "restart": "unless-stopped",
        "must_run": True,
        # An image that is no browser has a shell as its command: a terminal keeps it alive.
        "tty": None if spec.browser else True,
        "stdin_open": None if spec.browser else True,
        "labels": [*labels, {"label": PIDS_LABEL, "value": str(spec.pids)}],
    }


def endpoint_arguments(node: NodeSpec | None) -> dict[str, Any]:
    """Return how a node's engine is reached, as arguments of the `machineuse` resources; None is one that is gone."""
    return {
        "docker_host": node.host if node else "",
        "docker_cert_path": node.cert_path if node else None,
        "docker_ssh_opts": (list(node.ssh_opts) or None) if node else None,
    }


def _labels(spec: InstanceSpec, *, cluster: ClusterSpec, ledger_id: str, urn: str) -> list[dict[str, str]]:
    labels = {CLUSTER_LABEL: cluster.name, INSTANCE_LABEL: spec.id, LEDGER_LABEL: ledger_id, URN_LABEL: urn}
    return [{"label": label, "value": value} for label, value in labels.items()]


class Instance(pulumi.ComponentResource):
    """An instance: its body (volume and container) where it has one, and its snapshots."""

    def __init__(
        self,
        spec: InstanceSpec,
        *,
        cluster: ClusterSpec,
        ledger_id: str,
        provider: docker.Provider | None,
        node: NodeSpec | None,
    ) -> None:
        """Declare an instance; one without a body needs no node."""
        super().__init__(names.COMPONENT_TYPE, spec.id)
        self._spec = spec
        self._cluster = cluster
        self._ledger_id = ledger_id
        self._names = Names(cluster.name)
        self._provider = provider
        self._node = node
        self.resources: list[pulumi.CustomResource] = []
        for ref in spec.snapshots:
            self.resources.append(self._snapshot(ref))
        if spec.body:
            cloud_volume = self._cloud_volume(spec.cloud_volume) if spec.cloud_volume is not None else None
            volume = self._volume(cloud_volume)
            image: pulumi.Input[str] = spec.image
            self.resources.append(volume)
            if spec.restore is not None:
                restore = self._restore(volume, cloud_volume)
                image = restore.image
                self.resources.append(restore)
            self.resources.append(self._container(volume, image=image))

    def _options(self) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(parent=self, provider=self._provider)

    def _cloud_volume(self, volume: CloudVolumeSpec) -> CloudVolume:
        assert self._node is not None
        assert self._node.cloud is not None
        resource = CloudVolume(
            names.cloud_volume_name(self._spec.id),
            cluster=self._cluster.name,
            ledger_id=self._ledger_id,
            instance=self._spec.id,
            generation=volume.generation,
            restored_generation=volume.restored_generation,
            name=self._names.docker_volume(self._spec.id),
            node_id=self._node.id,
            **endpoint_arguments(self._node),
            machine=self._node.cloud.instance_id,
            zone=self._node.cloud.zone,
            size_gib=volume.size_gib,
            helper_image=self._cluster.helper_image,
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.resources.append(resource)
        return resource

    def _volume(self, cloud_volume: CloudVolume | None) -> docker.Volume:
        device = cloud_volume.device if cloud_volume is not None else None
        arguments = volume_arguments(self._spec, cluster=self._cluster, ledger_id=self._ledger_id, device=device)
        return docker.Volume(names.volume_name(self._spec.id), **arguments, opts=self._options())

    def _container(self, volume: docker.Volume, *, image: pulumi.Input[str]) -> docker.Container:
        assert self._node is not None
        arguments = container_arguments(
            self._spec,
            cluster=self._cluster,
            ledger_id=self._ledger_id,
            node=self._node,
            image=image,
            volume=volume.name,
        )
        return docker.Container(names.container_name(self._spec.id), **arguments, opts=self._options())

    def _snapshot(self, ref: SnapshotRef) -> Snapshot:
        spec = self._spec
        return Snapshot(
            names.snapshot_name(spec.id, ref.generation),
            cluster=self._cluster.name,
            ledger_id=self._ledger_id,
            instance=spec.id,
            generation=ref.generation,
            node_id=ref.node_id,
            **endpoint_arguments(self._cluster.node(ref.node_id)),
            container=self._names.docker_container(spec.id),
            volume=self._names.docker_volume(spec.id),
            image=spec.image,
            home_path=HOME_PATH,
            copy_volume=self._names.docker_copy(spec.id, ref.generation),
            helper_image=self._cluster.helper_image,
            stop_timeout_s=STOP_TIMEOUT_S,
            live=ref.live,
            cloud_region=self._region_of(ref) if ref.volume == "ebs" else None,
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _restore(self, volume: docker.Volume, cloud_volume: CloudVolume | None) -> Restore:
        spec = self._spec
        assert spec.restore is not None
        assert self._node is not None
        ref = spec.restore.snapshot
        return Restore(
            names.restore_name(spec.id),
            cluster=self._cluster.name,
            ledger_id=self._ledger_id,
            instance=spec.id,
            snapshot_generation=ref.generation,
            method=spec.restore.method,
            node_id=spec.node_id,
            **endpoint_arguments(self._node),
            volume=volume.name,
            image=spec.image,
            helper_image=self._cluster.helper_image,
            copy_volume=self._names.docker_copy(spec.id, ref.generation),
            cloud_volume=cloud_volume.volume_id if cloud_volume is not None else None,
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _region_of(self, ref: SnapshotRef) -> str | None:
        node = self._cluster.node(ref.node_id) or self._node
        return node.cloud.region if node is not None and node.cloud is not None else None
