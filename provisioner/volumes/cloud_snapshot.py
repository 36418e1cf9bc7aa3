"""Snapshots of an instance's volume, taken by the cloud while nothing uses the volume.

A cloud has no token of idempotence for them. So one is looked for by its tags before it is made, among them the run of
the container that it was taken after: what a crash left is adopted, unless the instance has run since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from provisioner.errors import CloudMissing, SnapshotFailed
from provisioner.snapshots.manifest import CloudHome
from provisioner.volumes.cloud import (
    GENERATION_TAG,
    LIFE_TAG,
    RUN_TAG,
    Cloud,
    CloudSnapshot,
    Owner,
    SnapshotProgress,
    Volume,
)
from provisioner.volumes.devices import Devices
from provisioner.volumes.waiting import Patience

log = structlog.get_logger(__name__)

_BROKEN = (SnapshotProgress.ERROR, SnapshotProgress.RECOVERABLE, SnapshotProgress.RECOVERING)


@dataclass(frozen=True, kw_only=True)
class SnapshotWork:
    """Takes, checks and removes one snapshot of an instance; what `provisioner.snapshots.capture.HomeKeeper` needs."""

    cloud: Cloud
    owner: Owner
    """Its URN is the snapshot's."""
    generation: int
    devices: Devices | None = None
    """Those of the node that has the volume; None where nothing is taken."""
    patience: Patience = field(default_factory=Patience)
    wanted: Callable[[], bool] = lambda: True

    @property
    def tags(self) -> dict[str, str]:
        """Return the tags by which the snapshot is found."""
        return self.owner.tags | {GENERATION_TAG: str(self.generation)}

    def find_life(self) -> int | None:
        """Return the generation of the snapshot that the volume was made from, 0 for none; None without a volume."""
        volume = self._volume()
        return int(volume.tags.get(LIFE_TAG) or 0) if volume is not None else None

    def take(self, *, run: str, progress: Callable[[str], None]) -> CloudHome:
        """Take the snapshot, or go on waiting for the one that an earlier attempt began; returns it once it is whole.

        Raises `CloudMissing` without a volume, `CutOff` when it is not wanted any more, `CloudError`, and
        `SnapshotFailed` when the cloud says that it failed.
        """
        volume = self._volume()
        if volume is None:
            raise CloudMissing(f"Instance {self.owner.instance} has no volume in {self.cloud.region}.")
        taken = self._adopt(run=run, volume=volume)
        if taken is None:
            self._settle(volume)
            progress(f"taking a snapshot of volume {volume.id}")
            taken = self.cloud.create_snapshot(
                volume.id,
                description=f"{self.owner.cluster}/{self.owner.instance}/{self.generation}",
                tags=self.owner.all_tags | self.tags | {RUN_TAG: run},
            )
        whole = self._await_whole(taken.id, progress=progress)
        home = CloudHome(
            region=self.cloud.region,
            snapshot_id=whole.id,
            volume_id=whole.volume_id,
            size_gib=whole.size_gib,
            bytes=whole.bytes,
        )
        self.check(home, size_gib=volume.size_gib)
        self._delete([each for each in self.cloud.find_snapshots(self.tags) if each.id != home.snapshot_id])
        return home

    def _settle(self, volume: Volume) -> None:
        """Make sure that the file system is unmounted: what is not on the device would be missing in the snapshot.

        Docker unmounts it before it says that the container has stopped, unless another container has it too.
        """
        if volume.attachment is None or self.devices is None:
            return
        device = self.devices.find(volume.id, size_gib=volume.size_gib, timeout_s=self.patience.device_s)
        self.devices.settle(device, volume_id=volume.id, timeout_s=self.patience.device_s)

    def check(self, home: CloudHome, *, size_gib: int | None = None) -> None:
        """Raise `SnapshotFailed` unless the snapshot is there, whole, and this one."""
        found = self.cloud.describe_snapshot(home.snapshot_id)
        expected = self.tags
        if (
            found.state is not SnapshotProgress.COMPLETED
            or found.size_gib != (size_gib or home.size_gib)
            or any(found.tags.get(key) != value for key, value in expected.items())
        ):
            raise SnapshotFailed(
                f"Snapshot {found.id} is not as it should be: it is {found.state.value} and has {found.size_gib} GiB.",
                detail=f"its tags: {dict(found.tags)}; expected {dict(expected)}",
            )

    def discard(self) -> None:
        """Delete every snapshot of this generation, whole or not. Idempotent."""
        self._delete(self.cloud.find_snapshots(self.tags))

    def _volume(self) -> Volume | None:
        volumes = [v for v in self.cloud.find_volumes(self.owner.tags) if not v.gone and v.prepared]
        if len(volumes) > 1:
            newest = max(int(v.tags.get(LIFE_TAG) or 0) for v in volumes)
            volumes = [v for v in volumes if int(v.tags.get(LIFE_TAG) or 0) == newest]
        return volumes[0] if len(volumes) == 1 else None

    def _adopt(self, *, run: str, volume: Volume) -> CloudSnapshot | None:
        """Return the snapshot that an earlier attempt began after this very run; removes any other of its name."""
        found = self.cloud.find_snapshots(self.tags)
        good = [
            each
            for each in found
            if each.state not in _BROKEN and each.tags.get(RUN_TAG) == run and each.volume_id == volume.id
        ]
        good.sort(key=lambda each: (each.state is not SnapshotProgress.COMPLETED, each.id))
        self._delete([each for each in found if each not in good[:1]])
        return good[0] if good else None

    def _await_whole(self, snapshot_id: str, *, progress: Callable[[str], None]) -> CloudSnapshot:
        unknown_until = self.patience.clock() + self.patience.visible_s

        def look() -> CloudSnapshot | None:
            try:
                found = self.cloud.describe_snapshot(snapshot_id)
            except CloudMissing:
                if self.patience.clock() >= unknown_until:
                    raise
                return None
            if found.state in _BROKEN:
                raise SnapshotFailed(
                    f"The cloud could not take snapshot {snapshot_id}: {found.message or found.state.value}."
                )
            progress(f"snapshot {snapshot_id}: {found.percent or 'begun'}")
            return found if found.state is SnapshotProgress.COMPLETED else None

        return self.patience.await_that(
            look,
            what=f"Snapshot {snapshot_id} is not whole",
            limit_s=self.patience.snapshot_s,
            poll_s=self.patience.snapshot_poll_s,
            wanted=self.wanted,
        )

    def _delete(self, snapshots: list[CloudSnapshot]) -> None:
        for snapshot in snapshots:
            self.cloud.delete_snapshot(snapshot.id)
            log.info("cloud snapshot removed", snapshot=snapshot.id, instance=self.owner.instance)
