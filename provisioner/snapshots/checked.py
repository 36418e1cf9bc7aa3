"""What every store makes of the bytes that it reads: compared with the manifest, or refused as damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json

from pydantic import ValidationError

from provisioner.errors import SnapshotCorrupt
from provisioner.snapshots.manifest import FORMAT_VERSION, Manifest, Part, SnapshotId
from provisioner.snapshots.tars import CHUNK_BYTES, Readable


def parse_manifest(data: bytes, snapshot: SnapshotId, *, where: str) -> Manifest:
    """Return the manifest that is stored there; raises `SnapshotCorrupt` when it is not one of this snapshot."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise SnapshotCorrupt(_unreadable(snapshot, data), detail=f"{where}: {error}") from error
    if manifest.id != snapshot:
        raise SnapshotCorrupt(f"The manifest of snapshot {snapshot} belongs to {manifest.id}.", detail=where)
    return manifest


class CheckedReader:
    """Reads a part's stored bytes and raises `SnapshotCorrupt` where they end if they are not those of the manifest."""

    def __init__(self, file: Readable, part: Part, *, snapshot: SnapshotId) -> None:
        self._file = file
        self._part = part
        self._snapshot = snapshot
        self._digest = hashlib.sha256()
        self._bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, b"" at the end."""
        try:
            data = self._file.read(size if size >= 0 else CHUNK_BYTES)
        except OSError as error:
            raise self._corrupt(str(error)) from error
        self._digest.update(data)
        self._bytes += len(data)
        if self._bytes >= self._part.bytes:
            if self._bytes > self._part.bytes:
                raise self._corrupt(f"it is longer than {self._part.bytes} bytes")
            if self._digest.hexdigest() != self._part.sha256:
                raise self._corrupt(f"SHA-256 {self._digest.hexdigest()}, expected {self._part.sha256}")
        elif not data:
            raise self._corrupt(f"it ends after {self._bytes} of {self._part.bytes} bytes")
        return data

    def _corrupt(self, detail: str) -> SnapshotCorrupt:
        return corrupt_part(self._part, self._snapshot, detail)


def corrupt_part(part: Part, snapshot: SnapshotId, detail: str) -> SnapshotCorrupt:
    """Return what to raise when a stored part is not what the manifest says."""
    return SnapshotCorrupt(
        f"The archive {part.name.value} of snapshot {snapshot} is damaged. It is kept; nothing was restored from it.",
        detail=detail,
        resolution="Restore it from a backup of the snapshot store, or delete the instance.",
    )


def _unreadable(snapshot: SnapshotId, data: bytes) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        version = json.loads(data).get("format_version")
        if version not in (None, FORMAT_VERSION):
            return f"Snapshot {snapshot} has format {version}; this version reads format {FORMAT_VERSION}."
    return f"The manifest of snapshot {snapshot} is damaged; the snapshot is kept, and nothing was restored from it."
