"""The snapshot store that is a directory: `<root>/<instance>/<generation>/` with the parts and `manifest.json`.

While a snapshot is written its parts are `.<part>.<random>.tmp` beside where they will be. `commit` makes them durable,
drops them from the page cache, reads them back from the disk, renames them, and renames the manifest into place last.
Directories are 0700 and files 0600: a profile holds passwords and sessions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO

import structlog
from pydantic import ValidationError

from provisioner.errors import SnapshotCorrupt, SnapshotFailed, SnapshotKeyMissing, SnapshotMissing
from provisioner.snapshots.checked import CheckedReader, parse_manifest
from provisioner.snapshots.manifest import Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.sealing import Sealer, Sealing, corrupt_part
from provisioner.snapshots.store import check_part
from provisioner.snapshots.tars import Readable, Writable

log = structlog.get_logger(__name__)

_MANIFEST = "manifest.json"
_NAMES = "|".join(re.escape(name) for name in [*PartName, _MANIFEST])
_LEFT = re.compile(rf"\.({_NAMES})\.[0-9a-f]{{8}}\.tmp")
_OURS = re.compile(rf"{_LEFT.pattern}|{_NAMES}")


class DirectoryStore:
    """Keeps snapshots in a directory, which is made when the first one is written."""

    def __init__(self, root: Path, *, sealing: Sealing | None = None) -> None:
        self._root = root
        self._sealing = sealing or Sealing()

    def begin(self, snapshot: SnapshotId) -> DirectoryWriter:
        """Start a snapshot, removing what a crash left of an earlier attempt.

        Raises:
            SnapshotFailed: the snapshot is there already, or the directory can't be written.
            SnapshotKeyMissing: it is to be encrypted and can't be.
        """
        sealer = self._sealing.sealer(snapshot)
        directory = self._directory(snapshot)
        with _writing(self._root):
            _make_private(self._root)
            _make_private(directory.parent)
            _make_private(directory)
            if (directory / _MANIFEST).exists():
                raise SnapshotFailed(f"Snapshot {snapshot} exists already and is never overwritten.")
            _empty(directory)
        return DirectoryWriter(self._root, directory, snapshot, sealer)

    def read_manifest(self, snapshot: SnapshotId) -> Manifest:
        """Return a snapshot's manifest.

        Raises:
            SnapshotMissing: there is no such snapshot.
            SnapshotFailed: the store can't be read.
            SnapshotCorrupt: the manifest is not one of this snapshot.
            SnapshotKeyMissing: it is encrypted with a key that we don't have.
        """
        path = self._directory(snapshot) / _MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise SnapshotMissing(f"There is no snapshot {snapshot}.", detail=str(path)) from None
        except OSError as error:
            # Not "missing": what is only out of reach now must never be taken for gone.
            raise SnapshotFailed(
                f"Snapshot {snapshot} can't be read: {error.strerror}.", detail=str(error), resolution=_resolve(error)
            ) from error
        return parse_manifest(data, snapshot, where=str(path), sealing=self._sealing)

    @contextmanager
    def open_part(self, manifest: Manifest, name: PartName) -> Iterator[Readable]:
        """Open a part for reading; its size and SHA-256 are compared when the last byte has been read.

        Raises:
            SnapshotCorrupt: the part is missing, or (from `read`) not what the manifest says.
            SnapshotKeyMissing: it is encrypted with a key that we don't have.
        """
        part, opener = manifest.part(name), self._sealing.opener(manifest)
        path = self._directory(manifest.id) / name.value
        if part is None:
            raise SnapshotCorrupt(f"The manifest of snapshot {manifest.id} lists no {name.value}.")
        with _open_to_read(path, part, manifest.id) as file:
            yield opener.open(part, CheckedReader(file, part, snapshot=manifest.id))

    def list(self, instance_id: str) -> tuple[Manifest, ...]:
        """Return the whole snapshots of an instance, oldest generation first; unreadable ones are left out.

        Raises:
            SnapshotFailed: the store can't be read.
        """
        manifests = []
        for directory in _entries(self._root / SnapshotId(instance_id=instance_id, generation=0).instance_id):
            if directory.name.isdecimal():
                snapshot = SnapshotId(instance_id=instance_id, generation=int(directory.name))
                try:
                    manifests.append(self.read_manifest(snapshot))
                except SnapshotMissing:
                    continue
                except (SnapshotCorrupt, SnapshotKeyMissing) as error:
                    log.warning("snapshot unreadable", snapshot=str(snapshot), detail=error.detail)
        return tuple(sorted(manifests, key=lambda manifest: manifest.generation))

    def delete(self, snapshot: SnapshotId) -> None:
        """Remove a snapshot, its manifest first, so that what a crash leaves is no snapshot any more. Idempotent.

        Raises:
            SnapshotFailed: the directory can't be written.
        """
        directory = self._directory(snapshot)
        with _writing(self._root):
            (directory / _MANIFEST).unlink(missing_ok=True)
            if directory.is_dir():
                _sync(directory)
                _empty(directory)
            for emptied in (directory, directory.parent):
                _remove_directory(emptied)

    def clean_up(self, *, older_than: timedelta, spared: Collection[SnapshotId] = ()) -> int:
        """Remove what crashes left and nobody has written to for `older_than`; return how many snapshots that were.

        The directory may hold other things, and nothing is removed that is not named as we name it.
        """
        before = time.time() - older_than.total_seconds()
        removed = 0
        for instance in _entries(self._root):
            for directory in _entries(instance):
                snapshot = _parse(instance.name, directory.name)
                if snapshot is None or snapshot in spared:
                    continue
                whole = (directory / _MANIFEST).exists()
                files = list(_entries(directory))
                left = [path for path in files if (_LEFT if whole else _OURS).fullmatch(path.name)]
                if (files and not left) or any(_mtime(path) > before for path in [directory, *left]):
                    continue
                with _writing(self._root):
                    for path in left:
                        path.unlink(missing_ok=True)
                    if not whole:
                        _remove_directory(directory)
                        _remove_directory(instance)
                removed += 1
                log.info("abandoned snapshot removed", directory=str(directory))
        return removed

    def _directory(self, snapshot: SnapshotId) -> Path:
        return self._root / snapshot.instance_id / str(snapshot.generation)


class DirectoryWriter:
    """One snapshot being written into a directory."""

    def __init__(self, root: Path, directory: Path, snapshot: SnapshotId, sealer: Sealer) -> None:
        self._root = root
        self._directory = directory
        self._snapshot = snapshot
        self._sealer = sealer
        self._token = secrets.token_hex(4)
        self._verified: Manifest | None = None
        self._manifest_name = f".{_MANIFEST}.{self._token}.tmp"
        self._placed: list[Path] = []

    @contextmanager
    def part(self, name: PartName) -> Iterator[Writable]:
        """Open a part for writing; opening it again starts it anew. Raises `SnapshotFailed` when it can't be kept."""
        self._verified = None
        with _writing(self._root):
            file = _create(self._temporary(name))
        with file:
            yield _WholeWrites(file, self._root)

    def sealer(self) -> Sealer:
        """Return what encrypts the parts and seals the manifest."""
        return self._sealer

    def verify(self, manifest: Manifest) -> None:
        """Write the parts out to the disk and read them back from it; raises `SnapshotFailed`."""
        for part in manifest.parts:
            path = self._temporary(part.name)
            with _writing(self._root):
                _sync(path, forget=True)
            try:
                with _open_to_read(path, part, self._snapshot) as file:
                    checked = CheckedReader(file, part, snapshot=self._snapshot)
                    check_part(self._sealer.open(part, checked), part, snapshot=self._snapshot)
            except SnapshotCorrupt as error:
                raise SnapshotFailed(
                    f"What was written of snapshot {self._snapshot} can't be read back: {error.message}",
                    detail=error.detail,
                    resolution="Check the disk of the snapshot store.",
                ) from error
        self._verified = manifest

    def commit(self, manifest: Manifest) -> None:
        """Put parts and, last, manifest in place; verifies first unless that was done. Raises `SnapshotFailed`."""
        if self._is_in_place(manifest):
            return
        if self._verified != manifest:
            self.verify(manifest)
        if (self._directory / _MANIFEST).exists():  # of a writer that came after this one, which was frozen
            raise SnapshotFailed(f"Snapshot {self._snapshot} exists already and is never overwritten.")
        with _writing(self._root):
            for part in manifest.parts:
                self._placed.append(self._temporary(part.name).replace(self._directory / part.name.value))
            _sync(self._directory)
            temporary = self._directory / self._manifest_name
            with _create(temporary) as file:
                _WholeWrites(file, self._root).write(manifest.to_json())
            _sync(temporary)
            temporary.replace(self._directory / _MANIFEST)
            for directory in (self._directory, self._directory.parent, self._root):
                _sync(directory)

    def abandon(self) -> None:
        """Remove what was written. Idempotent; harmless after `commit`, also that of another writer."""
        with contextlib.suppress(OSError):
            placed = [] if (self._directory / _MANIFEST).exists() else self._placed
            for path in (*map(self._temporary, PartName), self._directory / self._manifest_name, *placed):
                path.unlink(missing_ok=True)
            _remove_directory(self._directory)
            _remove_directory(self._directory.parent)

    def _is_in_place(self, manifest: Manifest) -> bool:
        try:
            return (self._directory / _MANIFEST).read_bytes() == manifest.to_json()
        except OSError:
            return False

    def _temporary(self, name: PartName) -> Path:
        return self._directory / f".{name.value}.{self._token}.tmp"


class _WholeWrites:
    """An unbuffered file whose `write` takes everything: one raw write may take less."""

    def __init__(self, file: IO[bytes], root: Path) -> None:
        self._file = file
        self._root = root

    def write(self, data: bytes, /) -> int:
        view = memoryview(data)
        with _writing(self._root):
            while view:
                view = view[self._file.write(view) :]
        return len(data)


def _parse(instance_id: str, generation: str) -> SnapshotId | None:
    """Return the snapshot that a directory with these names is for; None for one that is not ours."""
    if not generation.isascii() or not generation.isdecimal() or str(int(generation)) != generation:
        return None
    try:
        return SnapshotId(instance_id=instance_id, generation=int(generation))
    except ValidationError:
        return None


def _create(path: Path) -> IO[bytes]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb", buffering=0)


@contextmanager
def _open_to_read(path: Path, part: Part, snapshot: SnapshotId) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise corrupt_part(part, snapshot, str(error)) from error
    with file:
        yield file


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn what the file system refuses into `SnapshotFailed`."""
    try:
        yield
    except OSError as error:
        raise SnapshotFailed(
            f"The snapshot store {root} can't be written: {error.strerror or error}.",
            detail=str(error),
            resolution=_resolve(error),
        ) from error


def _resolve(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space there, or set MACHINEUSE_SNAPSHOT_STORE to a directory with more."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return "Make the directory writable for the service, or set MACHINEUSE_SNAPSHOT_STORE to one that is."
    return None


def _make_private(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)


def _empty(directory: Path) -> None:
    """Remove what is ours in a snapshot's directory."""
    for path in _entries(directory):
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _remove_directory(directory: Path) -> None:
    """Remove a directory if it is there and empty."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _entries(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # not "empty": what is only out of reach now must never be taken for gone
        raise SnapshotFailed(
            f"The snapshot store's {directory} can't be read: {error.strerror}.",
            detail=str(error),
            resolution=_resolve(error),
        ) from error


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sync(path: Path, *, forget: bool = False) -> None:
    """Write a file or directory out to the disk; with `forget`, make the next read come from there too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
