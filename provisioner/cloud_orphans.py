"""Removes cloud volumes and snapshots that no instance needs: they cost money for as long as nobody notices.

A crash between two steps, or a forced delete while the cloud did not answer, may leave some. They are found by their
tags, in the regions of the cluster's nodes. As on nodes, one look is not believed, and what belongs to an instance that
this ledger has never known is kept and told of once: it may be somebody's profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from provisioner.cluster import Cluster
from provisioner.errors import CloudConflict, CloudError
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.lifecycle import DELETED
from provisioner.repair import Sightings
from provisioner.states import Status
from provisioner.volumes.cloud import GENERATION_TAG, Cloud, Regions
from provisioner.volumes.cloud_volume import VolumeWork
from provisioner.volumes.waiting import Patience
from stacks.names import CLUSTER_LABEL, INSTANCE_LABEL, LEDGER_LABEL

log = structlog.get_logger(__name__)

_VOLUME, _SNAPSHOT = "volume", "snapshot"


@dataclass(frozen=True)
class _Suspect:
    region: str
    kind: str
    id: str
    instance_id: str
    generation: int | None


class CloudOrphans:
    """Looks for what is left in the cloud of one cluster."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, regions: Regions, patience: Patience | None = None) -> None:
        self._patience = patience
        self._ledger = ledger
        self._cluster = cluster
        self._regions = regions
        self._sightings = Sightings()
        self._strangers: set[str] = set()

    def step(self) -> None:
        """Look once. A region, or a thing, that refuses keeps no other from being looked at: it has its next turn."""
        regions = sorted({node.cloud.region for node in self._cluster.nodes if node.cloud is not None})
        # The cloud first, then the ledger: what the ledger knows by then can't be an orphan.
        found = [suspect for region in regions for suspect in self._look_into(region)]
        records = {record.id: record for record in self._ledger.instances.all()}
        for suspect in self._sightings.see(s for s in found if not _is_needed(s, records.get(s.instance_id))):
            record = self._ledger.instances.find(suspect.instance_id)
            if _is_needed(suspect, record):
                continue
            if record is None and not self._ledger.events.tell_of(DELETED, instance_id=suspect.instance_id):
                self._tell_of_stranger(suspect)
                continue
            try:
                self._remove(suspect)
            except (CloudError, CloudConflict) as error:
                log.warning("cloud orphan not removed", id=suspect.id, error=error.message, detail=error.detail)

    def _look_into(self, region: str) -> list[_Suspect]:
        try:
            return self._list(self._regions.of(region))
        except CloudError as error:
            log.warning("cloud not looked through", region=region, error=error.message, detail=error.detail)
            return []

    def _list(self, cloud: Cloud) -> list[_Suspect]:
        tags = {CLUSTER_LABEL: self._cluster.name, LEDGER_LABEL: self._ledger.id}
        volumes = [(_VOLUME, v.id, v.tags) for v in cloud.find_volumes(tags) if not v.gone]
        snapshots = [(_SNAPSHOT, s.id, s.tags) for s in cloud.find_snapshots(tags)]
        return [
            _Suspect(cloud.region, kind, id, tags[INSTANCE_LABEL], _generation(tags))
            for kind, id, tags in volumes + snapshots
            if INSTANCE_LABEL in tags
        ]

    def _remove(self, suspect: _Suspect) -> None:
        cloud = self._regions.of(suspect.region)
        if suspect.kind == _VOLUME:
            VolumeWork(cloud, patience=self._patience).remove(suspect.id)
        else:
            cloud.delete_snapshot(suspect.id)
        log.warning("cloud orphan removed", kind=suspect.kind, id=suspect.id, instance=suspect.instance_id)
        self._ledger.events.add(
            "orphan_removed",
            message=f"cloud {suspect.kind} {suspect.id} in {suspect.region} was of no use any more and was removed",
            instance_id=suspect.instance_id,
        )

    def _tell_of_stranger(self, suspect: _Suspect) -> None:
        if suspect.id in self._strangers:
            return
        self._strangers.add(suspect.id)
        log.warning("unknown instance", kind=suspect.kind, id=suspect.id, instance=suspect.instance_id)
        self._ledger.events.add(
            "orphan_kept",
            message=f"cloud {suspect.kind} {suspect.id} in {suspect.region} is of an instance that this ledger has"
            " never known; it is kept",
            instance_id=suspect.instance_id,
        )


def _is_needed(suspect: _Suspect, record: InstanceRecord | None) -> bool:
    """Say whether the instance has, or may come to have, a use for it."""
    if record is None:
        return False
    if record.settled_generation < record.generation:
        return True
    if suspect.kind == _VOLUME:
        return not (record.status is Status.DORMANT and record.sleeps_safely)
    return any(snapshot.generation == suspect.generation for snapshot in record.snapshots)


def _generation(tags: Mapping[str, str]) -> int | None:
    text = tags.get(GENERATION_TAG, "")
    return int(text) if text.isdigit() else None
