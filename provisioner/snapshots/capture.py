"""Taking a snapshot, in steps that may each be repeated and be cut off anywhere.

    prepare   open the store before anything is stopped: an unwritable store disturbs nobody
    stop      the browser shuts down by its image's stop signal, which flushes its profile
    home      Docker's archive of the home directory → zstd → store, hashed and counted on the way
    changes   what the container changed above its image → zstd → store
    verify    every part is read back from the disk
    copy      the node's own copy of the home volume, for a quick start; the one step that may fail
    commit    the manifest is put in place: from now on there is a snapshot

A live snapshot is of an instance that goes on running, and its home is read from the copy:

    prepare   as above; what a crash left paused goes on
    copy      the container is paused while the node copies its home volume, and resumed whatever happens
    home      the archive of that copy
    changes   what the container changed above its image, while it runs: read again if it changes under the reader
    verify    as above
    stamp     the copy is known to be of that archive from now on
    commit    as above

Any other failure removes what was written, lets the container run again and raises `SnapshotFailed`. After a crash the
same capture is simply run again: `prepare` throws away what the crash left, or finds the snapshot complete. A snapshot
that is complete while its container has been started since is out of date, and taken anew; a live one never is. One
that an instance has been revived from (or from a later one) can't be taken any more: asking for it disturbs nobody.
"""

from __future__ import annotations

import contextlib
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import structlog

from provisioner.errors import DockerNotFound, MachineuseError, SnapshotFailed, SnapshotMissing
from provisioner.snapshots.changes import (
    EPHEMERAL,
    MANAGED,
    RECORD_PATH,
    ChangesTar,
    Record,
    select_changes,
)
from provisioner.snapshots.machine import RESTORED_REPOSITORY, ContainerFacts, Machine, Progress, Volumes
from provisioner.snapshots.manifest import CloudHome, ImageIdentity, Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.mark import parse_mark
from provisioner.snapshots.store import SnapshotStore, SnapshotWriter
from provisioner.snapshots.tars import TarBroken, write_part

log = structlog.get_logger(__name__)

PROGRESS_EVERY_S = 1.0
LIVE_ATTEMPTS = 3
"""How often the changes of a running container are read until none of them changes while it is read."""


@dataclass(frozen=True)
class CaptureRequest:
    """Which instance to take a snapshot of, and where it is."""

    snapshot: SnapshotId
    cluster: str
    node_id: str
    container: str
    volumes: Volumes
    image: str
    """The image reference that the instance was asked to run; recorded, and used to restore."""
    live: bool = False
    """Let the instance go on running. What its browser had not written to the disk yet is not in the snapshot."""
    stop_timeout_s: int = 10
    labels: dict[str, str] = field(default_factory=dict)
    """For the copy volume and helper containers."""


class HomeKeeper(Protocol):
    """Keeps the home directory where it is no archive: in the cloud that has its volume. All of it may be repeated."""

    def find_life(self) -> int | None:
        """Return the generation of the snapshot that the home was restored from, 0 for none, None without a home."""

    def take(self, *, run: str, progress: Progress) -> CloudHome:
        """Take a snapshot of the home as `run` of its container left it; returns once it is whole."""

    def check(self, home: CloudHome) -> None:
        """Raise unless the snapshot is there and whole."""

    def discard(self) -> None:
        """Remove what there is of the snapshot."""


@dataclass(frozen=True)
class CaptureResult:
    """A snapshot that is whole, and whether the node kept a copy."""

    manifest: Manifest
    copied: bool
    copy_error: str | None


@dataclass(frozen=True)
class Step:
    """One step of a capture; running it again does no harm."""

    name: str
    run: Callable[[], None]


class Capture:
    """Takes one snapshot. Made anew for every attempt."""

    def __init__(
        self,
        request: CaptureRequest,
        *,
        machine: Machine,
        store: SnapshotStore,
        progress: Progress = lambda _: None,
        home_keeper: HomeKeeper | None = None,
    ) -> None:
        """Take the home as an archive, or leave it to `home_keeper`."""
        self._home_keeper = home_keeper
        self._cloud_home: CloudHome | None = None
        self._request = request
        self._machine = machine
        self._store = store
        self._progress = progress
        self._facts: ContainerFacts | None = None
        self._writer: SnapshotWriter | None = None
        self._parts: dict[PartName, Part] = {}
        self._record: Record | None = None
        self._changed_paths = 0
        self._manifest: Manifest | None = None
        self._copied = False
        self._copy_error: str | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """Return what is done, in this order."""
        if self._request.live:
            return (
                Step("prepare", self._prepare),
                Step("copy", self._copy_running),
                Step("home", self._capture_home),
                Step("changes", self._capture_changes),
                Step("verify", self._verify),
                Step("stamp", self._stamp),
                Step("commit", self._commit),
            )
        return (
            Step("prepare", self._prepare),
            Step("stop", self._stop),
            Step("home", self._capture_home),
            Step("changes", self._capture_changes),
            Step("verify", self._verify),
            Step("copy", self._copy),
            Step("commit", self._commit),
        )

    def run(self) -> CaptureResult:
        """Take the snapshot, or return the one that an earlier attempt completed.

        Raises:
            SnapshotFailed: no snapshot was taken; the container runs again, or `message` says why not.
        """
        started = time.monotonic()
        try:
            done = self._find_completed()
        except MachineuseError as error:
            raise self._give_up(error) from error
        if done is not None:
            return done
        for step in self.steps:
            try:
                step.run()
            except (MachineuseError, TarBroken, tarfile.TarError, OSError) as error:
                log.warning(
                    "snapshot step failed", snapshot=str(self._request.snapshot), step=step.name, error=str(error)
                )
                raise self._give_up(error) from error
        result = self._result()
        log.info(
            "snapshot taken",
            snapshot=str(self._request.snapshot),
            bytes=result.manifest.stored_bytes,
            copied=result.copied,
            seconds=round(time.monotonic() - started, 2),
        )
        return result

    def find(self) -> CaptureResult:
        """Return the snapshot that an earlier attempt completed, without a question to the node, which is away.

        Raises:
            SnapshotFailed: there is none.
        """
        try:
            self._manifest = self._store.read_manifest(self._request.snapshot)
            if self._manifest.cloud_home is not None and self._home_keeper is not None:
                self._home_keeper.check(self._manifest.cloud_home)
        except MachineuseError as error:
            raise SnapshotFailed(
                f"No snapshot was taken: node {self._request.node_id} does not answer. {error.message}",
                detail=error.detail,
            ) from error
        self._copy_error = f"Node {self._request.node_id} does not answer."
        return self._result()

    # -- the steps ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self._facts = self._machine.inspect_container(self._request.container)
        if self._request.live and self._facts.paused:
            self._machine.resume_container(self._request.container)
        self._refuse_past()
        if self._request.live and not self._facts.running:
            raise SnapshotFailed(f"The container {self._request.container} does not run.")
        self._parts.clear()
        self._writer = self._store.begin(self._request.snapshot)

    def _stop(self) -> None:
        self._progress("stopping the browser")
        self._machine.stop_container(self._request.container, timeout_s=self._request.stop_timeout_s)
        self._facts = self._machine.inspect_container(self._request.container)
        if not self._facts.stopped_cleanly:
            self._progress(f"the container had to be killed after {self._request.stop_timeout_s} s")

    def _copy_running(self) -> None:
        request = self._request
        self._progress("copying the home volume while the browser is paused")
        self._machine.copy_running(request.container, request.volumes, labels=request.labels)

    def _capture_home(self) -> None:
        request = self._request
        if self._home_keeper is not None:
            facts = self._known_facts()
            run = f"{facts.id}@{facts.started_at}"
            self._cloud_home = self._home_keeper.take(run=run, progress=self._progress)
            return
        reading = (
            self._machine.read_copy(request.volumes)
            if request.live
            else self._machine.read_path(request.container, request.volumes.home_path)
        )
        with reading as chunks:
            self._write_part(PartName.HOME, chunks, what="home directory")

    def _capture_changes(self) -> None:
        for left in reversed(range(LIVE_ATTEMPTS if self._request.live else 1)):
            try:
                return self._try_changes()
            except (TarBroken, tarfile.TarError) as error:  # a file grew or shrank while it was read
                if not left:
                    raise
                self._progress(f"the changes above the image changed: {error}; reading them again")

    def _try_changes(self) -> None:
        facts = self._known_facts()
        self._parts.pop(PartName.ROOTFS, None)
        self._changed_paths = 0
        skip = (*EPHEMERAL, *MANAGED, *facts.mounts, self._request.volumes.home_path)
        earlier = None
        if facts.image.reference.startswith(f"{RESTORED_REPOSITORY}:"):
            earlier = Record.model_validate_json(self._machine.read_image_file(facts.image.id, RECORD_PATH))
        changes = self._machine.list_changes(self._request.container)
        self._record = select_changes(changes, image=facts.image, skip=skip, earlier=earlier)
        if not self._record.empty:
            tar = ChangesTar(self._machine, self._request.container, self._record, skip)
            self._write_part(PartName.ROOTFS, tar.chunks(), what="changes above the image")
            self._changed_paths = tar.paths

    def _verify(self) -> None:
        self._progress("reading the archive back")
        self._manifest = self._open_writer().sealer().seal_manifest(self._build_manifest())
        self._open_writer().verify(self._manifest)
        if self._home_keeper is not None and self._cloud_home is not None:
            self._home_keeper.check(self._cloud_home)

    def _copy(self) -> None:
        manifest = self._verified_manifest()
        if manifest.cloud_home is not None:
            return  # it is as quick without
        self._progress("copying the home volume for a quick start")
        self._copied, self._copy_error = False, None
        try:
            entries = self._machine.make_copy(
                self._request.volumes, stamp=manifest.home.sha256, labels=self._request.labels
            )
        except MachineuseError as error:
            self._copy_error = error.message
            self._progress(f"no quick copy was kept: {error.message}")
            log.warning("quick copy failed", snapshot=str(manifest.id), error=error.message, detail=error.detail)
            self._remove_copy()
            return
        self._compare(entries)
        self._copied = True

    def _stamp(self) -> None:
        self._compare(self._machine.stamp_copy(self._request.volumes, stamp=self._verified_manifest().home.sha256))
        self._copied, self._copy_error = True, None

    def _compare(self, entries: int) -> None:
        archived = self._verified_manifest().home.entries
        if entries != archived:
            raise SnapshotFailed(
                f"The archive of the home directory has {archived} entries, the directory {entries}.",
                resolution="Look into the Docker engine's log for files that it could not read.",
            )

    def _commit(self) -> None:
        self._open_writer().commit(self._verified_manifest())

    def _refuse_past(self) -> None:
        snapshot, home_path = self._request.snapshot, self._request.volumes.home_path
        mark = parse_mark(self._machine.read_mark(self._request.container, home_path))
        revived_from = mark.generation if mark is not None else -1
        if self._home_keeper is not None:
            revived_from = max(revived_from, self._home_keeper.find_life() or -1)
        if revived_from >= snapshot.generation:
            raise SnapshotFailed(
                f"Snapshot {snapshot} can't be taken any more: the instance has been revived from "
                f"snapshot {revived_from} since.",
                resolution="If that snapshot was removed by hand, make the instance dormant again to get a new one.",
            )

    # -- what they share ---------------------------------------------------------------------------------------------

    def _write_part(self, name: PartName, chunks: Iterator[bytes], *, what: str) -> None:
        self._progress(f"saving the {what}")
        reported = time.monotonic()

        def report(bytes_read: int) -> None:
            nonlocal reported
            if time.monotonic() - reported >= PROGRESS_EVERY_S:
                reported = time.monotonic()
                self._progress(f"saving the {what}: {bytes_read / 1e6:.0f} MB")

        writer = self._open_writer()
        with writer.part(name) as sink:
            part = write_part(chunks, sink, name=name, seal=writer.sealer().seal, progress=report)
        self._parts[name] = part
        self._progress(
            f"saved the {what}: {part.entries} entries, {part.uncompressed_bytes / 1e6:.1f} MB, "
            f"{part.bytes / 1e6:.1f} MB compressed"
        )

    def _build_manifest(self) -> Manifest:
        request, facts = self._request, self._known_facts()
        if self._record is None:
            raise RuntimeError("the step 'changes' comes first")
        return Manifest(
            instance_id=request.snapshot.instance_id,
            cluster=request.cluster,
            generation=request.snapshot.generation,
            created_at=datetime.now(UTC),
            node_id=request.node_id,
            image=ImageIdentity(reference=request.image, id=self._record.original.id),
            home_path=request.volumes.home_path,
            live=request.live,
            stopped_cleanly=facts.stopped_cleanly and not request.live,
            container_id=facts.id,
            run_started_at=facts.started_at,
            parts=tuple(self._parts[name] for name in PartName if name in self._parts),
            changed_paths=self._changed_paths,
            deleted_paths=self._record.deleted,
            cloud_home=self._cloud_home,
        )

    def _find_completed(self) -> CaptureResult | None:
        """Return the snapshot if an earlier attempt completed it; remove it if the instance has run since.

        An instance is meant to run after a live snapshot. But that is none to sleep on.
        """
        snapshot = self._request.snapshot
        try:
            manifest = self._store.read_manifest(snapshot)
        except SnapshotMissing:
            return None
        with contextlib.suppress(DockerNotFound):  # a container that is gone has not run since
            facts = self._machine.inspect_container(self._request.container)
            # Another container is a later life of the instance: then this is an old snapshot, asked for once more.
            has_run = not self._request.live if manifest.live else facts.started_at != manifest.run_started_at
            if facts.id == manifest.container_id and has_run:
                log.warning("snapshot out of date", snapshot=str(snapshot))
                self._store.delete(snapshot)
                return None
        self._manifest = manifest
        if manifest.cloud_home is not None:
            if self._home_keeper is not None:
                self._home_keeper.check(manifest.cloud_home)
            self._progress("the snapshot is complete already")
            return self._result()
        stamp = None
        with contextlib.suppress(MachineuseError):
            stamp = self._machine.read_stamp(self._request.volumes.copy)
        self._copied = stamp == manifest.home.sha256
        self._copy_error = None if self._copied else "The node has no copy of it."
        self._progress("the snapshot is complete already")
        return self._result()

    def _give_up(self, error: Exception) -> SnapshotFailed:
        """Leave nothing behind, let the container run again, and return what to raise."""
        if self._writer is not None:  # else it may belong to a snapshot that is complete and only out of reach
            with contextlib.suppress(MachineuseError):
                self._discard(self._writer)
        cause = error.message if isinstance(error, MachineuseError) else f"The archive could not be read: {error}."
        detail = error.detail if isinstance(error, MachineuseError) else repr(error)
        resolution = error.resolution if isinstance(error, MachineuseError) else None
        live = self._request.live
        try:
            if live:
                self._machine.resume_container(self._request.container)
            else:
                self._machine.start_container(self._request.container)
        except MachineuseError as start_error:
            what = "could not be resumed" if live else "could not be started again"
            return SnapshotFailed(
                f"No snapshot was taken: {cause} The instance {what}: {start_error.message}",
                detail=f"{detail}; start: {start_error.detail}",
                resolution=resolution or start_error.resolution,
            )
        return SnapshotFailed(
            f"No snapshot was taken, the instance goes on running: {cause}", detail=detail, resolution=resolution
        )

    def _discard(self, writer: SnapshotWriter) -> None:
        """Remove what this attempt has made.

        Who was frozen for long, or has lost its lease, fails where another attempt has long succeeded: what that one
        has kept is all that is left of the instance.
        """
        writer.abandon()
        with contextlib.suppress(SnapshotMissing):
            if self._store.read_manifest(self._request.snapshot) != self._manifest:
                log.warning("snapshot was taken by another", snapshot=str(self._request.snapshot))
                return
            self._store.delete(self._request.snapshot)
        if self._home_keeper is not None:
            self._home_keeper.discard()
        self._remove_copy()

    def _remove_copy(self) -> None:
        with contextlib.suppress(MachineuseError):
            self._machine.remove_copy(self._request.volumes.copy)

    def _result(self) -> CaptureResult:
        return CaptureResult(manifest=self._verified_manifest(), copied=self._copied, copy_error=self._copy_error)

    def _known_facts(self) -> ContainerFacts:
        if self._facts is None:
            raise RuntimeError("the step 'prepare' comes first")
        return self._facts

    def _open_writer(self) -> SnapshotWriter:
        if self._writer is None:
            raise RuntimeError("the step 'prepare' comes first")
        return self._writer

    def _verified_manifest(self) -> Manifest:
        if self._manifest is None:
            raise RuntimeError("the step 'verify' comes first")
        return self._manifest
