"""Giving a snapshot back: into a home volume that no container has used yet, and into an image.

`quick_start` copies the copy that the node kept, if it is the very one that the manifest knows; otherwise it falls back
to `full_restore` and says so. `full_restore` reads the whole archive and compares every hash before anything is
written, then unpacks it. What the instance had changed above its image is built into an image on top of the original
one, before the home volume is touched.

A mark in the home volume is the last thing written. Finding it, a repeated restore has nothing to do; not finding it,
it empties the volume and begins again. A volume in which the instance's container has run already is never written to:
the container comes after the restore, so the restore was complete. (One that was never started proves nothing: a node
that was silent for a while may carry out late what it was asked for an earlier life.) The mark is the SHA-256 of the
home archive, which nothing *inside* that archive can know: a mark that came along with the archive, or was put there by
the browser's user, proves nothing and is not believed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import structlog

from provisioner.errors import Conflict, DockerError, SnapshotMissing
from provisioner.snapshots.machine import RESTORED_REPOSITORY, Machine, Progress, Volumes
from provisioner.snapshots.manifest import Manifest, PartName, SnapshotId
from provisioner.snapshots.mark import Mark, Method, parse_mark
from provisioner.snapshots.store import SnapshotStore, verify_snapshot
from provisioner.snapshots.tars import CHUNK_BYTES, read_tar

log = structlog.get_logger(__name__)

LOCKS = frozenset({"SingletonLock", "SingletonCookie", "SingletonSocket"})
"""Chromium's locks; a stale one names a container that is gone and keeps the browser from starting."""


@dataclass(frozen=True)
class RestoreRequest:
    """Which snapshot to give back, how, and into what."""

    snapshot: SnapshotId
    method: Method
    volumes: Volumes
    image: str
    """The original image, run unless the snapshot carries changes above it."""
    home_restored: bool = False
    """Whether the home volume was made from the cloud's snapshot already, where the home is kept there."""


@dataclass(frozen=True)
class RestoreResult:
    """What was done."""

    method_used: Method
    fallback_reason: str | None
    image: str
    """The image that the instance's container has to run."""
    bytes: int
    """Size of the home directory's archive, uncompressed."""


def restored_tag(snapshot: SnapshotId) -> str:
    """Return the name of the image built from a snapshot's changes above its image."""
    return f"{RESTORED_REPOSITORY}:{snapshot.instance_id}-{snapshot.generation}"


def restore(
    request: RestoreRequest, *, machine: Machine, store: SnapshotStore, progress: Progress = lambda _: None
) -> RestoreResult:
    """Give a snapshot back. Idempotent.

    Raises:
        SnapshotMissing: the store has no such snapshot.
        SnapshotCorrupt: a part is not what the manifest says; nothing was written, and the snapshot is kept.
        Conflict: a container of somebody else has the volume.
        DockerError: the node's engine could not.
    """
    started = time.monotonic()
    manifest = store.read_manifest(request.snapshot)
    # The archive's entries start with the last component of the path that the home had then.
    volumes = replace(request.volumes, home_path=manifest.home_path)
    restoring = _Restoring(replace(request, volumes=volumes), manifest, machine, store, progress)
    image = restoring.build_image()  # before the home volume: a broken archive must leave that untouched
    if manifest.cloud_home is not None:
        if not request.home_restored:
            raise Conflict(
                f"The home of snapshot {request.snapshot} is the cloud's snapshot {manifest.cloud_home.snapshot_id}"
                f" in {manifest.cloud_home.region}, and can't be restored onto this node.",
                resolution="Revive the instance on a node with `volume: ebs` in that region.",
            )
        return RestoreResult(request.method, None, image, manifest.cloud_home.size_gib << 30)
    mark = restoring.find_mark()
    if mark is None:
        mark = restoring.fill_home()
    else:
        progress("the home volume is restored already")
    log.info(
        "snapshot restored",
        snapshot=str(request.snapshot),
        method=mark.method_used.value,
        fallback_reason=mark.fallback_reason,
        seconds=round(time.monotonic() - started, 2),
    )
    return RestoreResult(mark.method_used, mark.fallback_reason, image, manifest.home.uncompressed_bytes)


@dataclass
class _Restoring:
    request: RestoreRequest
    manifest: Manifest
    machine: Machine
    store: SnapshotStore
    progress: Progress
    locks: list[str] = field(default_factory=list)
    verified: set[PartName] = field(default_factory=set)

    def find_mark(self) -> Mark | None:
        """Return the mark of a restore that was completed, or None when the volume may be filled."""
        volumes = self.request.volumes
        home = self.machine.inspect_home(volumes)
        mark = parse_mark(home.mark)
        if mark is not None and mark.home_sha256 == self.manifest.home.sha256:
            return mark
        if not home.used_by:
            return None
        strangers = sorted(
            name for name, instance in home.used_by.items() if instance != self.request.snapshot.instance_id
        )
        if strangers:
            raise Conflict(
                f"The volume {volumes.home} is used by the container {strangers[0]}; nothing was restored into it.",
                resolution="Remove that container, then revive the instance again.",
            )
        return self._mark(self.request.method, None) if home.ran else None

    def fill_home(self) -> Mark:
        """Fill the home volume by the method that was asked for, or the other one."""
        reason = None
        if self.request.method is Method.QUICK_START:
            reason = self._quick_start()
            if reason is None:
                return self._mark(Method.QUICK_START, None)
            self.progress(f"no quick start: {reason} Restoring from the archive")
            log.info("quick start not possible", snapshot=str(self.request.snapshot), reason=reason)
        self._full_restore(reason)
        return self._mark(Method.FULL_RESTORE, reason)

    def _quick_start(self) -> str | None:
        """Fill the home volume from the node's copy; return why that was not possible."""
        self.progress("copying the node's copy into the home volume")
        try:
            return self.machine.fill_home(
                self.request.volumes,
                stamp=self.manifest.home.sha256,
                entries=self.manifest.home.entries,
                mark=self._mark(Method.QUICK_START, None).model_dump_json(),
            )
        except DockerError as error:
            return f"The node's copy could not be used: {error.message}"

    def _full_restore(self, reason: str | None) -> None:
        self._verify(*PartName)
        self.progress(f"unpacking the home directory, {self.manifest.home.uncompressed_bytes / 1e6:.1f} MB")
        with self.store.open_part(self.manifest, PartName.HOME) as source:
            self.machine.write_home(
                self.request.volumes,
                read_tar(source, what=f"The archive of snapshot {self.request.snapshot}"),
                mark=self._mark(Method.FULL_RESTORE, reason).model_dump_json(),
                locks=self.locks,
            )
            while source.read(CHUNK_BYTES):
                pass

    def _verify(self, *names: PartName) -> None:
        """Compare parts of the archive with the manifest, each once, before anything of them is written."""
        unread = set(names) - self.verified
        if not unread:
            return
        self.progress("verifying the archive")

        def note_locks(part: PartName, name: str) -> None:
            if part is PartName.HOME and PurePosixPath(name).name in LOCKS:
                self.locks.append(name.partition("/")[2])

        verify_snapshot(self.store, self.manifest, names=unread, on_entry=note_locks)
        self.verified |= unread

    def build_image(self) -> str:
        """Return the image to run: the original one, or one with the instance's changes, built if need be."""
        rootfs = self.manifest.part(PartName.ROOTFS)
        if rootfs is None:
            return self.request.image
        tag = restored_tag(self.request.snapshot)
        base = self._find_base()
        # A quick start takes the home from the node's copy: it neither waits for that archive nor depends on it.
        self._verify(*(PartName if self.request.method is Method.FULL_RESTORE else (PartName.ROOTFS,)))
        self.progress(f"building the image {tag} with {self.manifest.changed_paths} changed paths")
        with self.store.open_part(self.manifest, PartName.ROOTFS) as source:
            self.machine.build_image(
                tag,
                base=base,
                rootfs=read_tar(source, what=f"The archive of snapshot {self.request.snapshot}"),
                rootfs_bytes=rootfs.uncompressed_bytes,
                deleted_paths=self.manifest.deleted_paths,
            )
        return tag

    def _find_base(self) -> str:
        """Return the very image that the changes were made on; a newer one of that name if it is gone."""
        original = self.manifest.image
        if self.machine.has_image(original.id):
            return original.id
        for reference in (self.request.image, original.reference):
            if self.machine.has_image(reference):
                self.progress(f"the image {original.id[:19]} is gone; using {reference} as it is now")
                log.warning("original image gone", snapshot=str(self.request.snapshot), base=reference, was=original.id)
                return reference
        raise SnapshotMissing(
            f"The node does not have the image {original.reference} that the snapshot was taken on.",
            detail=original.id,
            resolution="Pull or build that image on the node, then revive the instance again.",
        )

    def _mark(self, method: Method, reason: str | None) -> Mark:
        return Mark(
            generation=self.manifest.generation,
            home_sha256=self.manifest.home.sha256,
            method_used=method,
            fallback_reason=reason,
        )
