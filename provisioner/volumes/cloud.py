"""What volumes and their snapshots need of a cloud's region; `provisioner.volumes.ec2` has it.

Whatever lists may lag behind what was done a moment ago, for seconds: nobody may conclude from one look that something
is not there. Every method may be called again after a crash, and raises `CloudError` when the cloud can't.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from provisioner.errors import CloudError
from stacks.names import CLUSTER_LABEL, INSTANCE_LABEL, LEDGER_LABEL, URN_LABEL
from stacks.spec import LABEL_PREFIX

GENERATION_TAG = f"{LABEL_PREFIX}generation"
"""On a snapshot: which one of the instance it is. On a volume: of which wish it was made."""
LIFE_TAG = f"{LABEL_PREFIX}life"
"""On a volume: the generation of the snapshot that its instance was revived from, 0 for its first life."""
PREPARED_TAG = f"{LABEL_PREFIX}prepared"
"""On a volume: its file system was made, or checked and grown. From then on it is somebody's profile."""
RUN_TAG = f"{LABEL_PREFIX}run"
"""On a snapshot: the run of the container that it was taken after; a later run makes it out of date."""


class VolumeState(StrEnum):
    """AWS's words."""

    CREATING = "creating"
    AVAILABLE = "available"
    IN_USE = "in-use"
    DELETING = "deleting"
    DELETED = "deleted"
    ERROR = "error"


class SnapshotProgress(StrEnum):
    """AWS's words."""

    PENDING = "pending"
    COMPLETED = "completed"
    ERROR = "error"
    RECOVERABLE = "recoverable"
    RECOVERING = "recovering"


class TokenSpent(CloudError):
    """A token of idempotence was used before, for something that differs."""


class DeviceNameTaken(CloudError):
    """The machine has another volume under that name."""


class VolumeBusy(CloudError):
    """The volume's state does not allow that, now."""


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """The machine that has a volume."""

    machine: str
    device: str
    """The name that was asked for; what the machine calls it is another matter."""
    state: str

    @property
    def leaving(self) -> bool:
        """Say whether it is being detached; `busy` is AWS's word for a machine that has yet to let go."""
        return self.state in ("detaching", "busy")


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume, as the cloud describes it."""

    id: str
    state: VolumeState
    zone: str
    size_gib: int
    created_at: datetime | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    attachment: Attachment | None = None

    @property
    def gone(self) -> bool:
        """Say whether it is deleted, or as good as."""
        return self.state in (VolumeState.DELETING, VolumeState.DELETED)

    @property
    def prepared(self) -> bool:
        """Say whether it may hold somebody's profile."""
        return PREPARED_TAG in self.tags


@dataclass(frozen=True, kw_only=True)
class CloudSnapshot:
    """A snapshot of a volume, as the cloud describes it."""

    id: str
    state: SnapshotProgress
    volume_id: str
    size_gib: int
    percent: str = ""
    bytes: int = 0
    """What it takes up, where the cloud says."""
    started_at: datetime | None = None
    message: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A virtual machine."""

    id: str
    state: str
    zone: str

    @property
    def runs(self) -> bool:
        """Say whether it may be writing to its volumes."""
        return self.state in ("pending", "running", "stopping", "shutting-down")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose a volume or a snapshot is; its tags say so."""

    cluster: str
    ledger_id: str
    instance: str
    urn: str

    @property
    def tags(self) -> dict[str, str]:
        """Return the tags by which what belongs to the instance is found, whatever URN it was made for."""
        return {CLUSTER_LABEL: self.cluster, LEDGER_LABEL: self.ledger_id, INSTANCE_LABEL: self.instance}

    @property
    def all_tags(self) -> dict[str, str]:
        """Return the tags that it is given."""
        return self.tags | {URN_LABEL: self.urn}


class Cloud(Protocol):
    """One region of a cloud."""

    region: str

    def find_volumes(self, tags: Mapping[str, str]) -> list[Volume]:
        """Return the volumes with these tags, in whatever state."""

    def find_attached(self, machine: str) -> list[Volume]:
        """Return the volumes that a machine has, or is getting, or letting go."""

    def describe_volume(self, volume_id: str) -> Volume:
        """Return one volume; raises `CloudMissing`."""

    def create_volume(
        self, *, token: str, zone: str, size_gib: int, snapshot_id: str | None, tags: Mapping[str, str]
    ) -> Volume:
        """Create a volume; the same token again gives the same one, even if it is deleted. Raises `TokenSpent`."""

    def attach(self, volume_id: str, *, machine: str, device: str) -> None:
        """Begin to attach. Raises `VolumeBusy`, `DeviceNameTaken`, `CloudMissing`."""

    def detach(self, volume_id: str, *, machine: str, force: bool) -> None:
        """Begin to detach; one that is not attached, or being detached, is a success. Raises `CloudMissing`."""

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume; one that is gone is a success. Raises `VolumeBusy`."""

    def tag(self, resource_id: str, tags: Mapping[str, str]) -> None:
        """Add tags."""

    def find_snapshots(self, tags: Mapping[str, str]) -> list[CloudSnapshot]:
        """Return our own snapshots with these tags, in whatever state."""

    def describe_snapshot(self, snapshot_id: str) -> CloudSnapshot:
        """Return one snapshot; raises `CloudMissing`."""

    def create_snapshot(self, volume_id: str, *, description: str, tags: Mapping[str, str]) -> CloudSnapshot:
        """Begin a snapshot of what is on the volume now. Not idempotent: look for one first."""

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot, whole or not; one that is gone is a success."""

    def describe_machine(self, machine: str) -> Machine:
        """Return a machine; raises `CloudMissing`."""


class Regions(Protocol):
    """A cloud's regions."""

    def of(self, region: str) -> Cloud:
        """Return a region, always the same object."""
