"""What an instance changed above its image: which paths count, and the one tar that carries them.

`docker diff` tells added, modified and deleted paths against the image that the container was created from. After a
revival that is an image built by us, so the built image carries a record of what it differs in itself
(`/etc/machineuse-restored.json`), and the next capture joins the two: a snapshot is always relative to the original
image, never to another snapshot.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict

from provisioner.errors import DockerNotFound
from provisioner.snapshots.machine import Change, ChangeKind, Machine
from provisioner.snapshots.manifest import ImageIdentity

RECORD_PATH = "/etc/machineuse-restored.json"

EPHEMERAL = ("/tmp", "/run", "/var/run", "/dev", "/proc", "/sys")
"""Sockets, locks and process files: worthless once the container has stopped."""
MANAGED = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/.dockerenv", RECORD_PATH)
"""Files that Docker or we write into every container."""

MAX_FETCHES = 150
"""Above this many paths, one pass over the whole root file system is faster than a request for each."""
_CHUNK_BYTES = 1 << 18


class Record(BaseModel):
    """What a root file system differs in from its original image."""

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1] = 1
    original: ImageIdentity
    trees: tuple[str, ...] = ()
    """Paths that are carried with everything below them."""
    entries: tuple[str, ...] = ()
    """Paths that are carried alone: a file, or a directory's owner and mode."""
    deleted: tuple[str, ...] = ()
    """Paths of the image that are gone, or were gone and came back as something else."""

    @property
    def empty(self) -> bool:
        """Say whether nothing differs."""
        return not (self.trees or self.entries or self.deleted)


def select_changes(
    changes: Iterable[Change], *, image: ImageIdentity, skip: Iterable[str], earlier: Record | None = None
) -> Record:
    """Return what is worth keeping of a diff against `image`, joined with what that image already differed in.

    Paths equal to or below one of `skip` are left out, and so are directories that were modified only because
    something left out is in them.
    """
    skipped = _Below(skip)
    all_changes = tuple(changes)
    kept = [change for change in all_changes if change.path not in skipped]
    with_children = _parents(change.path for change in all_changes)
    trees = {change.path for change in kept if change.kind is ChangeKind.ADDED}
    deleted = {change.path for change in kept if change.kind is ChangeKind.DELETED}
    # A directory is listed as modified when only its children changed; then it counts if one of them does.
    own = {change.path for change in kept if change.kind is not ChangeKind.MODIFIED or change.path not in with_children}
    entries = {change.path for change in kept if change.kind is ChangeKind.MODIFIED} & (own | _parents(own))
    if earlier is not None:
        trees |= set(earlier.trees)
        entries |= set(earlier.entries)
        deleted |= set(earlier.deleted)
    trees = _topmost(trees)
    below_trees = _Below(trees)
    return Record(
        original=earlier.original if earlier is not None else image,
        trees=tuple(sorted(trees)),
        entries=tuple(sorted(path for path in entries if path not in below_trees)),
        deleted=tuple(sorted(_topmost(deleted))),
    )


@dataclass
class ChangesTar:
    """A tar of all that a record names, streamed out of a container; names are relative to `/`."""

    machine: Machine
    container: str
    record: Record
    skip: tuple[str, ...]
    paths: int = 0
    """How many paths have been written so far, the record aside."""

    def chunks(self) -> Iterator[bytes]:
        """Give the tar, the record last. A path that is gone meanwhile is left out."""
        # A deleted path may have come back with other content (Docker reports such a directory as deleted only).
        trees = _Below((*self.record.trees, *self.record.deleted))
        entries = set(self.record.entries)
        skipped = _Below(self.skip)
        wanted = [*trees.paths, *sorted(path for path in entries if path not in trees)]
        members = self._exported() if len(wanted) > MAX_FETCHES else self._fetched(wanted, trees)
        for path, member, content in members:
            if path in skipped or not (path in trees or path in entries):
                continue
            self.paths += 1
            yield from _emit(member, path, content)
        record = self.record.model_dump_json().encode()
        header = tarfile.TarInfo(RECORD_PATH.lstrip("/"))
        header.size, header.mode = len(record), 0o644
        yield from _emit(header, RECORD_PATH, io.BytesIO(record))
        yield bytes(1024)

    def _exported(self) -> Iterator[tuple[str, tarfile.TarInfo, _Content]]:
        with self.machine.export_container(self.container) as chunks:
            for member, content in _members(chunks):
                if member.islnk():
                    member.linkname = _absolute(member.linkname).lstrip("/")
                yield _absolute(member.name), member, content

    def _fetched(self, wanted: Iterable[str], trees: _Below) -> Iterator[tuple[str, tarfile.TarInfo, _Content]]:
        for path in wanted:
            parent = PurePosixPath(path).parent
            try:
                with self.machine.read_path(self.container, path) as chunks:
                    for member, content in _members(chunks):
                        if member.islnk():
                            member.linkname = str(parent / member.linkname).lstrip("/")
                        yield _absolute(str(parent / member.name)), member, content
                        if path not in trees:
                            break
            except DockerNotFound:
                continue


_Content = io.BufferedIOBase | io.BytesIO | None


class _Below:
    """A set of paths that contains everything below its members, too."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = tuple(sorted(_topmost(set(paths))))
        self._set = frozenset(self.paths)

    def __contains__(self, path: str) -> bool:
        return path in self._set or any(str(parent) in self._set for parent in PurePosixPath(path).parents)


def _parents(paths: Iterable[str]) -> set[str]:
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents}


def _topmost(paths: set[str]) -> set[str]:
    return {path for path in paths if not any(str(parent) in paths for parent in PurePosixPath(path).parents)}


def _absolute(name: str) -> str:
    return "/" + name.removeprefix("./").strip("/")


class _Pull(io.RawIOBase):
    """A readable file over an iterator of chunks, for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _members(chunks: Iterator[bytes]) -> Iterator[tuple[tarfile.TarInfo, _Content]]:
    pull = io.BufferedReader(_Pull(chunks), _CHUNK_BYTES)
    with tarfile.open(fileobj=pull, mode="r|", bufsize=_CHUNK_BYTES) as archive:
        while (member := archive.next()) is not None:
            yield member, archive.extractfile(member) if member.isreg() else None  # type: ignore[misc]
            archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every member; a root file system has many


def _emit(member: tarfile.TarInfo, path: str, content: _Content) -> Iterator[bytes]:
    """Write one entry under another name; keeps owner, mode, times and extended attributes."""
    member.name = path.lstrip("/")
    member.pax_headers = {key: value for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.")}
    yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    left = member.size if content is not None else 0
    while content is not None and left:
        data = content.read(min(left, _CHUNK_BYTES))
        if not data:
            raise tarfile.ReadError(f"{path} ends {left} bytes early")
        left -= len(data)
        yield data
    if content is not None:
        yield bytes(-member.size % 512)
