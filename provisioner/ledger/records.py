"""Rows of the ledger as frozen values; nothing outside this package sees SQL or a row object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from provisioner.states import UP, Status, Wanted
from stacks.spec import Availability


class SnapshotState(StrEnum):
    """How far a snapshot is."""

    PENDING = "pending"  # wanted, maybe being written
    VERIFIED = "verified"  # written, read back, whole
    EXPIRING = "expiring"  # a newer one took its place, or its dormancy failed: to be deleted


class NodeStatus(StrEnum):
    """Whether a node's engine answers; the API's words."""

    ONLINE = "online"
    OFFLINE = "offline"


class Moving(StrEnum):
    """Why an instance is moved to another node: it is made dormant, then revived elsewhere."""

    DRAIN = "drain"  # its node is drained: nothing is lost
    OFFLINE = "offline"  # its node does not answer: what came after the last snapshot is lost


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRecord:
    """One snapshot of one instance."""

    instance_id: str
    generation: int
    node_id: str
    state: SnapshotState
    bytes: int | None
    created_at: float
    live: bool = False
    """Taken while the instance ran, and goes on running."""
    volume: str = "docker"
    """What the home was on: `docker` keeps it in the snapshot store, `ebs` as a snapshot in the cloud."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceRecord:
    """One instance: what was asked for, what it should be, what it is.

    `generation` counts what was wanted so far. `applied_generation` is the newest that the engine carried out,
    `settled_generation` the newest whose outcome is known; below `generation` there is work to do. `body` says that
    volume and container are, or may be, in the stack.
    """

    id: str
    node_id: str
    image_requested: str
    image: str
    image_base: str | None
    browser: bool
    memory_gb: float
    cpu_cores: int
    disk_gb: float
    disk_enforced: bool
    idle_timeout_minutes: int
    auto_snapshot: bool
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """What its node must have, as the caller asked."""
    volume: str = "docker"
    created_at: float
    wanted: Wanted
    generation: int
    applied_generation: int
    settled_generation: int
    body: bool
    repair: bool
    force: bool
    moving: Moving | None = None
    attempts: int
    retry_at: float
    status: Status
    status_since: float
    last_active_at: float
    debug_port: int | None
    stream_port: int | None
    disk_bytes: int | None
    disk_over: bool
    snapshot_generation: int | None
    restore_generation: int | None
    restore_method: str | None
    restored_by: str | None
    restore_note: str | None
    error_code: str | None
    error_message: str | None
    error_generation: int | None
    snapshots: tuple[SnapshotRecord, ...] = ()

    @property
    def memory_mib(self) -> int:
        """Return the memory limit in MiB."""
        return int(self.memory_gb * 1024)

    def snapshot(self, generation: int | None) -> SnapshotRecord | None:
        """Return the snapshot of that generation, or None."""
        return next((s for s in self.snapshots if s.generation == generation), None)

    @property
    def obsolete_snapshots(self) -> list[int]:
        """Return the generations of the snapshots that nobody needs, whether they are resources of the stack or not."""
        return [s.generation for s in self.snapshots if self._is_obsolete(s)]

    def _is_obsolete(self, snapshot: SnapshotRecord) -> bool:
        if snapshot.state is not SnapshotState.PENDING:
            return snapshot.state is SnapshotState.EXPIRING
        # One that was to be taken of a running instance has lost its point when that is to run no more.
        return self.wanted is Wanted.ABSENT or (snapshot.live and self.wanted is not Wanted.RUNNING)

    @property
    def last_verified(self) -> SnapshotRecord | None:
        """Return the newest snapshot that the instance could be given back from, or None."""
        verified = [s for s in self.snapshots if s.state is SnapshotState.VERIFIED]
        return max(verified, key=lambda s: s.generation, default=None)

    @property
    def pending_live(self) -> SnapshotRecord | None:
        """Return the snapshot that is to be taken, or being taken, while the instance runs; or None."""
        if self.wanted is not Wanted.RUNNING:
            return None
        return next((s for s in self.snapshots if s.live and s.state is SnapshotState.PENDING), None)

    @property
    def sleeps_safely(self) -> bool:
        """Say whether the snapshot of the dormancy that is wanted now is verified."""
        taken = self.snapshot(self.snapshot_generation)
        return self.wanted is Wanted.DORMANT and taken is not None and taken.state is SnapshotState.VERIFIED

    @property
    def operation(self) -> str | None:
        """Name the operation under way, for people; None when there is none."""
        if self.moving is not None and self.wanted is not Wanted.ABSENT:
            return "moving"  # halfway too: then it is asleep, as is wanted for now, and still to be revived elsewhere
        if self.settled_generation >= self.generation:
            return None
        if self.wanted is Wanted.ABSENT:
            return "deleting"
        if self.wanted is Wanted.DORMANT:
            return "making_dormant"
        if self.repair:
            return "repairing"
        if self.status in UP:
            return "restarting"  # after a dormancy that failed
        return "reviving" if self.restore_generation is not None else "creating"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRecord:
    """One node: what the cluster's file says of it, and what its last heartbeat said."""

    id: str
    host: str
    address: str
    max_instances: int
    status: NodeStatus
    error: str | None
    misses: int
    last_heartbeat: float | None
    offline_since: float | None = None
    availability: Availability = Availability.ACTIVE
    labels: Mapping[str, str] = field(default_factory=dict)
    """The file's, and what the engine says of itself (`arch`)."""
    cpu_cores: float | None
    memory_bytes: int | None
    disk_bytes: int | None
    disk_quota: bool
    cpu_percent: float | None
    memory_percent: float | None
    disk_percent: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRecord:
    """Something that happened, for people."""

    id: int
    at: float
    instance_id: str | None
    node_id: str | None
    kind: str
    message: str
