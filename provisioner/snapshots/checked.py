"""What every store makes of the bytes that it reads: compared with the manifest, or refused as damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json

from provisioner.errors import SnapshotCorrupt
from provisioner.snapshots.manifest import FORMAT_VERSION, Manifest, Part, SnapshotId
from provisioner.snapshots.sealing import Sealing, corrupt_part
from provisioner.snapshots.tars import CHUNK_BYTES, Readable


def parse_manifest(data: bytes, snapshot: SnapshotId, *, where: str, sealing: Sealing) -> Manifest:
    """Return the manifest that is stored there.

    Raises:
        SnapshotCorrupt: it is not one of this snapshot, or not as it was sealed.
        SnapshotKeyMissing: it was sealed with a key that we don't have.
    """
    try:
        document = json.loads(data)
        # From what the seal is compared with: a name that is there twice can't mean one thing here, another there.
        manifest = Manifest.model_validate_json(json.dumps(document))
    except ValueError as error:  # pydantic's is one too
        raise SnapshotCorrupt(_unreadable(snapshot, data), detail=f"{where}: {error}") from error
    if manifest.id != snapshot:
        raise SnapshotCorrupt(f"The manifest of snapshot {snapshot} belongs to {manifest.id}.", detail=where)
    return sealing.opener(manifest).open_manifest(manifest, document)


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


def _unreadable(snapshot: SnapshotId, data: bytes) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        version = json.loads(data).get("format_version")
        if version not in (None, FORMAT_VERSION):
            return f"Snapshot {snapshot} has format {version}; this version reads format {FORMAT_VERSION}."
    return f"The manifest of snapshot {snapshot} is damaged; the snapshot is kept, and nothing was restored from it."
