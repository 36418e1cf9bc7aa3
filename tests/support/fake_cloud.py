"""A cloud's region in memory, which takes its time as a real one does, and the disks of its volumes.

What moto does not know is here as AWS describes it: tokens of idempotence, states on the way, listings that lag behind,
attachments that conflict, zones that don't fit. Time passes only while somebody sleeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from provisioner.errors import CloudConflict, CloudError, CloudMissing
from provisioner.volumes.cloud import (
    Attachment,
    CloudSnapshot,
    DeviceNameTaken,
    Machine,
    SnapshotProgress,
    TokenSpent,
    Volume,
    VolumeBusy,
    VolumeState,
)
from provisioner.volumes.devices import link_of
from provisioner.volumes.waiting import Patience

LAG_S = 3.0
"""How long what is new is not seen by everybody."""
WORK_S = 5.0
"""How long making, attaching, detaching and deleting take."""
SNAPSHOT_S = 60.0


@dataclass
class Disk:
    """What is on a volume."""

    file_system: bool = False
    content: str = ""
    written: str = ""
    """What was written, and is on the disk once it is unmounted."""


@dataclass
class _Volume:
    value: Volume
    since: float
    born: float
    disk: Disk


@dataclass
class _Snapshot:
    value: CloudSnapshot
    since: float
    disk: Disk


@dataclass
class FakeCloud:
    """What `provisioner.volumes.cloud.Cloud` asks for."""

    region: str = "us-east-1"
    now: float = 1000.0
    machines: dict[str, Machine] = field(default_factory=dict)
    failing_snapshots: bool = False

    def __post_init__(self) -> None:
        self._ids = itertools.count(1)
        self._volumes: dict[str, _Volume] = {}
        self._snapshots: dict[str, _Snapshot] = {}
        self._tokens: dict[str, tuple[object, str]] = {}
        self.forced: list[str] = []

    @property
    def patience(self) -> Patience:
        """Return patience in this cloud's time."""
        return Patience(clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def add_machine(self, machine: str, *, zone: str = "us-east-1a", state: str = "running") -> None:
        self.machines[machine] = Machine(id=machine, state=state, zone=zone)

    @property
    def volumes(self) -> list[Volume]:
        """Return what there is in truth, and is not being deleted."""
        self._settle()
        return [each.value for each in self._volumes.values() if not each.value.gone]

    @property
    def snapshots(self) -> list[CloudSnapshot]:
        """Return what there is in truth."""
        self._settle()
        return [each.value for each in self._snapshots.values()]

    def disk(self, volume_id: str) -> Disk:
        """Return what is on a volume."""
        return self._volumes[volume_id].disk

    # the protocol

    def find_volumes(self, tags: Mapping[str, str]) -> list[Volume]:
        self._settle()
        return [v.value for v in self._volumes.values() if self._seen(v.born) and tags.items() <= v.value.tags.items()]

    def find_attached(self, machine: str) -> list[Volume]:
        self._settle()
        return [
            v.value
            for v in self._volumes.values()
            if v.value.attachment is not None and v.value.attachment.machine == machine
        ]

    def describe_volume(self, volume_id: str) -> Volume:
        self._settle()
        found = self._volumes.get(volume_id)
        if found is None or not self._seen(found.born):
            raise CloudMissing(f"no volume {volume_id}")
        return found.value

    def create_volume(
        self, *, token: str, zone: str, size_gib: int, snapshot_id: str | None, tags: Mapping[str, str]
    ) -> Volume:
        self._settle()
        what = (zone, size_gib, snapshot_id, tuple(sorted(tags.items())))
        if token in self._tokens:
            before, volume_id = self._tokens[token]
            if before != what:
                raise TokenSpent("the same token for something else")
            made = self._volumes.get(volume_id)
            return (
                made.value
                if made is not None
                else Volume(id=volume_id, state=VolumeState.CREATING, zone=zone, size_gib=size_gib)
            )
        disk = Disk()
        if snapshot_id is not None:
            source = self._snapshots.get(snapshot_id)
            if source is None:
                raise CloudMissing(f"no snapshot {snapshot_id}")
            if source.value.state is not SnapshotProgress.COMPLETED:
                raise VolumeBusy("the snapshot is pending")
            disk = replace(source.disk)
        volume = Volume(
            id=f"vol-{next(self._ids):04x}",
            state=VolumeState.CREATING,
            zone=zone,
            size_gib=size_gib,
            created_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now),
            tags=dict(tags),
        )
        self._volumes[volume.id] = _Volume(volume, since=self.now, born=self.now, disk=disk)
        self._tokens[token] = (what, volume.id)
        return volume

    def attach(self, volume_id: str, *, machine: str, device: str) -> None:
        volume = self.describe_volume(volume_id)
        if machine not in self.machines:
            raise CloudMissing(f"no machine {machine}")
        if self.machines[machine].zone != volume.zone:
            raise CloudError("they are in different zones")
        if volume.state is not VolumeState.AVAILABLE:
            raise VolumeBusy(f"{volume_id} is {volume.state}")
        if any(v.attachment is not None and v.attachment.device == device for v in self.find_attached(machine)):
            raise DeviceNameTaken(f"{device} is already in use")
        self._become(volume_id, VolumeState.IN_USE, Attachment(machine=machine, device=device, state="attaching"))

    def detach(self, volume_id: str, *, machine: str, force: bool) -> None:
        volume = self.describe_volume(volume_id)
        if force:
            self.forced.append(volume_id)
        if volume.attachment is None:
            return
        if volume.attachment.machine != machine:
            raise VolumeBusy(f"{volume_id} is not attached to {machine}")
        if volume.attachment.state != "detaching":
            self._become(volume_id, VolumeState.IN_USE, replace(volume.attachment, state="detaching"))

    def delete_volume(self, volume_id: str) -> None:
        self._settle()
        found = self._volumes.get(volume_id)
        if found is None or found.value.gone:
            return
        if found.value.state not in (VolumeState.AVAILABLE, VolumeState.ERROR):
            raise VolumeBusy(f"{volume_id} is {found.value.state}")
        self._become(volume_id, VolumeState.DELETING, None)

    def tag(self, resource_id: str, tags: Mapping[str, str]) -> None:
        found = self._volumes[resource_id]
        found.value = replace(found.value, tags={**found.value.tags, **tags})

    def find_snapshots(self, tags: Mapping[str, str]) -> list[CloudSnapshot]:
        self._settle()
        return [
            s.value for s in self._snapshots.values() if self._seen(s.since) and tags.items() <= s.value.tags.items()
        ]

    def describe_snapshot(self, snapshot_id: str) -> CloudSnapshot:
        self._settle()
        found = self._snapshots.get(snapshot_id)
        if found is None or not self._seen(found.since):
            raise CloudMissing(f"no snapshot {snapshot_id}")
        return found.value

    def create_snapshot(self, volume_id: str, *, description: str, tags: Mapping[str, str]) -> CloudSnapshot:
        del description
        volume = self.describe_volume(volume_id)
        snapshot = CloudSnapshot(
            id=f"snap-{next(self._ids):04x}",
            state=SnapshotProgress.PENDING,
            volume_id=volume_id,
            size_gib=volume.size_gib,
            percent="0%",
            tags=dict(tags),
        )
        disk = replace(self._volumes[volume_id].disk)
        self._snapshots[snapshot.id] = _Snapshot(snapshot, since=self.now, disk=disk)
        return snapshot

    def delete_snapshot(self, snapshot_id: str) -> None:
        self._snapshots.pop(snapshot_id, None)

    def describe_machine(self, machine: str) -> Machine:
        if machine not in self.machines:
            raise CloudMissing(f"no machine {machine}")
        return self.machines[machine]

    # what happens by itself

    def break_volume(self, volume_id: str) -> None:
        """Let a volume be in error."""
        self._become(volume_id, VolumeState.ERROR, None)

    def _seen(self, since: float) -> bool:
        return self.now - since >= LAG_S

    def _become(self, volume_id: str, state: VolumeState, attachment: Attachment | None) -> None:
        found = self._volumes[volume_id]
        found.value, found.since = replace(found.value, state=state, attachment=attachment), self.now

    def _settle(self) -> None:
        for volume_id, each in list(self._volumes.items()):
            if self.now - each.since < WORK_S:
                continue
            value = each.value
            if value.state is VolumeState.CREATING:
                self._become(volume_id, VolumeState.AVAILABLE, None)
            elif value.state is VolumeState.DELETING:
                del self._volumes[volume_id]
            elif value.attachment is not None and value.attachment.state == "attaching":
                self._become(volume_id, value.state, replace(value.attachment, state="attached"))
            elif value.attachment is not None and value.attachment.state == "detaching":
                self._become(volume_id, VolumeState.AVAILABLE, None)
        for snapshot in self._snapshots.values():
            if snapshot.value.state is SnapshotProgress.PENDING:
                done = min((self.now - snapshot.since) / SNAPSHOT_S, 1.0)
                state = SnapshotProgress.COMPLETED if done == 1.0 else SnapshotProgress.PENDING
                if self.failing_snapshots and done >= 0.5:
                    state = SnapshotProgress.ERROR
                snapshot.value = replace(snapshot.value, state=state, percent=f"{done:.0%}")


class FakeDevices:
    """The devices of one machine."""

    def __init__(self, cloud: FakeCloud, machine: str) -> None:
        self._cloud = cloud
        self._machine = machine
        self.formatted: list[str] = []
        self.grown: list[str] = []

    def find(self, volume_id: str, *, size_gib: int, timeout_s: float) -> str:
        del timeout_s
        volume = self._cloud.describe_volume(volume_id)
        held = volume.attachment
        if held is None or (held.machine, held.state, volume.size_gib) != (self._machine, "attached", size_gib):
            raise CloudError("no such device")
        return f"/dev/{link_of(volume_id)}"

    def prepare(self, device: str, *, volume_id: str, blank: bool) -> None:
        disk = self._cloud.disk(volume_id)
        assert device.endswith(volume_id.replace("-", ""))
        if disk.file_system:
            self.grown.append(volume_id)
        elif blank:
            disk.file_system = True
            self.formatted.append(volume_id)
        else:
            raise CloudConflict("there is no file system on it")

    def check(self, device: str, *, volume_id: str) -> None:
        del device
        if not self._cloud.disk(volume_id).file_system:
            raise CloudConflict("there is no file system on it")

    def settle(self, device: str, *, volume_id: str, timeout_s: float) -> None:
        del device, timeout_s
        disk = self._cloud.disk(volume_id)
        disk.content += disk.written
        disk.written = ""


class OneRegion:
    """A cloud of one region."""

    def __init__(self, cloud: FakeCloud) -> None:
        self.cloud = cloud
        self.of: Callable[[str], FakeCloud] = lambda _: self.cloud
