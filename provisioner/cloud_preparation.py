"""The cloud's part of a step, done before the update: making and removing volumes takes up to minutes.

The update's `CloudVolume` finds its volume ready, or finds none left to delete. What is removed here is asked for again
right before: from the ledger as it is then, not as it was when the step was planned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import TypeGuard

import structlog

from provisioner.cluster import Cluster
from provisioner.docker_hosts.containers import remove_container
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.volumes import remove_volume
from provisioner.errors import CloudError, NodeUnreachable, SnapshotCorrupt, SnapshotKeyMissing, SnapshotMissing
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.plugins.machineuse.cloud_volume import find_source
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.store import SnapshotStore
from provisioner.specs import spec_of
from provisioner.states import Wanted
from provisioner.volumes.cloud import Owner, Regions
from provisioner.volumes.cloud_snapshot import SnapshotWork
from provisioner.volumes.cloud_volume import VolumeRequest, VolumeWork
from provisioner.volumes.devices import NodeDevices
from provisioner.volumes.waiting import Patience
from stacks.names import Names
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

EBS = "ebs"


class Stopping(RuntimeError):
    """The service ends."""


class CloudPreparation:
    """Volumes and their snapshots, for one cluster's instances."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: Cluster,
        hosts: DockerHosts,
        store: SnapshotStore,
        regions: Regions,
        patience: Patience | None = None,
    ) -> None:
        self._patience = patience or Patience()
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._store = store
        self._regions = regions
        self._names = Names(cluster.name)
        self._stopping = threading.Event()

    def close(self) -> None:
        """Let nobody wait for the cloud any more; the next start goes on waiting for the same things."""
        self._stopping.set()

    def make_volume(self, record: InstanceRecord) -> None:
        """Make, attach and format an instance's volume, or find that it is. Idempotent.

        Raises CloudConflict, CloudError, SnapshotMissing.
        """
        spec, node = spec_of(record), self._cluster.node(record.node_id)
        if spec is None or spec.cloud_volume is None or node is None or node.cloud is None:
            return  # the update tells why
        region = node.cloud.region
        volume, owner = spec.cloud_volume, self._owner(record, urn=self._names.cloud_volume_urn(record.id))
        name = self._names.docker_volume(record.id)
        VolumeWork(
            self._regions.of(region),
            patience=self._patience,
            wanted=self._still_wanted(record),
            progress=lambda said: log.info("cloud volume", instance=record.id, progress=said),
        ).ensure(
            VolumeRequest(
                owner=owner,
                name=name,
                machine=node.cloud.instance_id,
                zone=node.cloud.zone,
                size_gib=volume.size_gib,
                generation=volume.generation,
                life=volume.restored_generation,
                snapshot_id=lambda: find_source(
                    self._store, instance=record.id, generation=volume.restored_generation, region=region
                ),
                given_up=self._given_up(),
            ),
            devices=self._devices(node, owner),
        )

    def release(self, planned: InstanceRecord) -> None:
        """Remove the container, volume and cloud volume of an instance that should have none. Idempotent.

        Does nothing for one that the ledger wants alive by now. Raises DockerError and CloudError; a forced delete
        takes neither for an obstacle: what is left is removed when the node is back, and by the search for orphans.
        """
        record = self._ledger.instances.find(planned.id)
        if not _may_go(record):
            return
        node = self._cluster.node(record.node_id)
        if node is None:
            return
        away = self._ledger.nodes.is_offline(node.id)  # what is left there is noted by the update
        try:
            if away:
                raise NodeUnreachable(f"Node {node.id} does not answer.")
            host = self._hosts.of(node)
            remove_container(host, self._names.docker_container(record.id), kill=True)
            remove_volume(host, self._names.docker_volume(record.id))
        except NodeUnreachable:
            if not record.force and not (away and record.sleeps_safely):
                raise
            away = True
        if node.cloud is None:
            return
        owner = self._owner(record, urn=self._names.cloud_volume_urn(record.id))
        try:
            VolumeWork(self._regions.of(node.cloud.region), patience=self._patience, wanted=self._goes_on).release(
                owner, force=away, allowed=lambda: _may_go(self._ledger.instances.find(record.id))
            )
        except CloudError as error:
            if not record.force:
                raise
            log.warning("cloud volume left", instance=record.id, error=error.message, detail=error.detail)

    def home_keeper(self, record: InstanceRecord, *, generation: int) -> SnapshotWork | None:
        """Return what takes the home's snapshot; None where the home goes into the snapshot store."""
        taken = record.snapshot(generation)
        region = self._region_of(taken.node_id) if taken is not None and taken.volume == EBS else None
        if taken is None or region is None:
            return None
        node = self._cluster.node(taken.node_id)
        work = self._snapshot(record, generation=generation, region=region)
        return dataclasses.replace(work, devices=self._devices(node, work.owner) if node is not None else None)

    def discard(self, record: InstanceRecord, *, generation: int) -> None:
        """Delete what the cloud has of a snapshot. Idempotent. Raises CloudError, unless the delete is forced."""
        region = None
        with contextlib.suppress(SnapshotMissing, SnapshotCorrupt, SnapshotKeyMissing):
            home = self._store.read_manifest(SnapshotId(instance_id=record.id, generation=generation)).cloud_home
            region = home.region if home is not None else None
        taken = record.snapshot(generation)
        if region is None and taken is not None and taken.volume == EBS:
            region = self._region_of(taken.node_id)
        if region is None:
            return
        try:
            self._snapshot(record, generation=generation, region=region).discard()
        except CloudError as error:
            if not record.force:
                raise
            log.warning("cloud snapshot left", instance=record.id, error=error.message, detail=error.detail)

    def _snapshot(self, record: InstanceRecord, *, generation: int, region: str) -> SnapshotWork:
        return SnapshotWork(
            cloud=self._regions.of(region),
            owner=self._owner(record, urn=self._names.snapshot_urn(record.id, generation)),
            generation=generation,
            patience=self._patience,
            wanted=self._still_wanted(record),
        )

    def _devices(self, node: NodeSpec, owner: Owner) -> NodeDevices:
        return NodeDevices(
            self._hosts.of(node),
            helper_image=self._cluster.helper_image,
            name=self._names.docker_volume(owner.instance),
            labels=owner.all_tags,
        )

    def _owner(self, record: InstanceRecord, *, urn: str) -> Owner:
        return Owner(cluster=self._cluster.name, ledger_id=self._ledger.id, instance=record.id, urn=urn)

    def _region_of(self, node_id: str) -> str | None:
        node = self._cluster.node(node_id)
        return node.cloud.region if node is not None and node.cloud is not None else None

    def _given_up(self) -> frozenset[str]:
        """Return the machines of nodes that are away, where the cluster's policy is to go on without them."""
        if self._cluster.spec.offline.action != "move":
            return frozenset()
        away = {node.id for node in self._ledger.nodes.list() if node.status is NodeStatus.OFFLINE}
        return frozenset(
            node.cloud.instance_id for node in self._cluster.nodes if node.id in away and node.cloud is not None
        )

    def _still_wanted(self, record: InstanceRecord) -> Callable[[], bool]:
        def wanted() -> bool:
            now = self._ledger.instances.find(record.id) if self._goes_on() else None
            return now is not None and now.wanted is record.wanted

        return wanted

    def _goes_on(self) -> bool:
        """Return True, or raise as if killed here: a snapshot under way is not thrown away, but found again."""
        if self._stopping.is_set():
            raise Stopping
        return True


def _may_go(record: InstanceRecord | None) -> TypeGuard[InstanceRecord]:
    """Say whether the ledger wants an instance to have no body."""
    return record is not None and (record.wanted is Wanted.ABSENT or record.sleeps_safely)
