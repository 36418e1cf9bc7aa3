"""The servicer of the `machineuse` package."""

from __future__ import annotations

from typing import ClassVar

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.plugins.base import PluginServicer
from provisioner.plugins.machineuse import claim, cloud_volume, node_image, restore, snapshot
from provisioner.plugins.policy import DeletePolicy
from provisioner.snapshots.store import SnapshotStore
from provisioner.volumes.cloud import Regions
from stacks.names import CLAIM_TYPE, CLOUD_VOLUME_TYPE, NODE_IMAGE_TYPE, RESTORE_TYPE, SNAPSHOT_TYPE


class MachineusePlugin(PluginServicer):
    """Serves `Snapshot`, `Restore`, `CloudVolume`, `NodeImage` and `Claim`."""

    package: ClassVar[str] = "machineuse"
    version: ClassVar[str] = "0.1.0"

    def __init__(
        self,
        *,
        store: SnapshotStore,
        hosts: DockerHosts,
        policy: DeletePolicy,
        regions: Regions,
        engine_address: str = "",
    ) -> None:
        super().__init__(
            {
                SNAPSHOT_TYPE: snapshot.SnapshotType(store=store, hosts=hosts, policy=policy, regions=regions),
                RESTORE_TYPE: restore.RestoreType(store=store, hosts=hosts, policy=policy),
                NODE_IMAGE_TYPE: node_image.NodeImageType(hosts=hosts, policy=policy),
                CLOUD_VOLUME_TYPE: cloud_volume.CloudVolumeType(
                    store=store, hosts=hosts, policy=policy, regions=regions
                ),
                CLAIM_TYPE: claim.ClaimType(),
            },
            engine_address=engine_address,
        )
