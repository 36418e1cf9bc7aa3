"""Wishes snapshots of running instances every so often, so that a lost node costs minutes and not days.

Where the cluster's file says `snapshot_every_minutes`. An instance that nobody used since its last snapshot needs no
other. Only a few of a node's instances have theirs taken at the same time: each is paused while its home is copied, and
then read and sent to the store.
"""

from __future__ import annotations

import time
from collections import Counter

import structlog

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.ledger import Ledger
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord
from provisioner.settings import Settings
from provisioner.states import UP, Wanted

log = structlog.get_logger(__name__)

AT_ONCE = 2
"""Snapshots under way on one node at the same time."""


class LiveSnapshots:
    """Keeps the snapshots of one cluster's running instances young."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, settings: Settings, changes: Changes) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._settings = settings
        self._changes = changes
        self._tried: dict[str, float] = {}
        """When a snapshot of an instance was wished last: one that fails is not wished again at once."""

    def step(self) -> None:
        """Wish a snapshot of each instance that is due."""
        every_minutes = self._cluster.spec.snapshot_every_minutes
        if every_minutes is None:
            return
        every_s = every_minutes * self._settings.minute_s
        online = self._ledger.nodes.online()
        records = self._ledger.instances.all()
        under_way = Counter(record.node_id for record in records if record.pending_live is not None)
        now = time.time()
        due = [
            record
            for record in records
            if record.node_id in online
            and is_due(record, now=now, every_s=every_s)
            and now - self._tried.get(record.id, 0.0) >= every_s
        ]
        for record in sorted(due, key=newest_at):
            if under_way[record.node_id] < AT_ONCE:
                under_way[record.node_id] += 1
                self._tried[record.id] = now
                self._wish(record)
        self._tried = {instance_id: at for instance_id, at in self._tried.items() if now - at < every_s}

    def _wish(self, record: InstanceRecord) -> None:
        def decide(found: InstanceRecord, _: LoadReader) -> Update | None:
            return lifecycle.wish_live_snapshot(found, reason="the last snapshot is old enough")

        for instance_id in self._ledger.instances.change_many([record.id], decide):
            log.debug("live snapshot", instance=instance_id)
            self._changes.notify(instance_id)
            self._changes.work.set()


def newest_at(record: InstanceRecord) -> float:
    """Return when the newest snapshot was taken; of an instance without one, when it was made."""
    return max((snapshot.created_at for snapshot in record.snapshots), default=record.created_at)


def is_due(record: InstanceRecord, *, now: float, every_s: float) -> bool:
    """Say whether a running instance needs a new snapshot; without a browser nobody can tell whether it was used."""
    if record.status not in UP or record.wanted is not Wanted.RUNNING or record.pending_live is not None:
        return False
    if record.settled_generation < record.generation:
        return False
    newest = newest_at(record)
    used = record.debug_port is None or not record.snapshots or record.last_active_at > newest
    return used and now - newest >= every_s
