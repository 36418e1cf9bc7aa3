"""What a snapshot store's owner can't read, and can't change unnoticed: sealed parts and sealed manifests.

A part is compressed, then encrypted, bound to its snapshot's id and its own name: a part that was swapped for another
one is refused. The manifest stays readable, so that sizes can be told without a key, but for the paths of the image
that are gone, which only its user knows: they are in its seal. The seal is bound to all the rest of the manifest, so it
also proves that nobody changed what is readable, the hashes of the parts among it.

A store without keys reads and writes snapshots that are not sealed. With keys it seals what it writes, and reads both,
unless it is told to take sealed ones only.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from provisioner.errors import SnapshotCorrupt, SnapshotKeyMissing
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.keyset import Keyset, Undecipherable
from provisioner.snapshots.manifest import Encryption, Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.tars import Readable, Writable

SETTING = "MACHINEUSE_SNAPSHOT_KEYS"


class Sealing:
    """Whether a store's snapshots are sealed, and with which keys. Safe for several threads."""

    def __init__(self, keys: KeyFile | None = None, *, sealed_only: bool = False) -> None:
        """Seal with these keys, if there are any; with `sealed_only`, refuse what is not sealed."""
        self._keys = keys
        self._sealed_only = sealed_only

    def sealer(self, snapshot: SnapshotId) -> Sealer:
        """Return what seals a new snapshot; raises `SnapshotKeyMissing`."""
        return Sealer(snapshot, self._keys.load() if self._keys is not None else None)

    def opener(self, manifest: Manifest) -> Sealer:
        """Return what opens a snapshot that has this manifest.

        Raises:
            SnapshotKeyMissing: it was sealed with a key that we don't have.
            SnapshotCorrupt: it is not sealed, and only sealed ones are taken.
        """
        snapshot, encryption = manifest.id, manifest.encryption
        if encryption is None:
            if self._sealed_only:
                raise SnapshotCorrupt(
                    f"Snapshot {snapshot} is not encrypted, and MACHINEUSE_SNAPSHOT_ENCRYPTED_ONLY is set: the store's "
                    "owner may have made it up. It is kept; nothing was restored from it.",
                    resolution="Unset MACHINEUSE_SNAPSHOT_ENCRYPTED_ONLY if it was taken before there were keys.",
                )
            return Sealer(snapshot, None)
        if self._keys is None:
            raise SnapshotKeyMissing(
                f"Snapshot {snapshot} is encrypted with key {encryption.key_id}, and there are no keys.",
                resolution=f"Set {SETTING} to what it was when the snapshot was taken.",
            )
        keyset = self._keys.load()
        if encryption.key_id not in keyset.ids:
            raise SnapshotKeyMissing(
                f"Snapshot {snapshot} is encrypted with key {encryption.key_id}, which is not in {self._keys.path}.",
                detail=f"there are {', '.join(map(str, keyset.ids))}",
                resolution="Put a copy of the key file back that has this key. Without it the snapshot can't be read.",
            )
        return Sealer(snapshot, keyset)


class Sealer:
    """Seals and opens the parts and the manifest of one snapshot; without keys it leaves everything as it is."""

    def __init__(self, snapshot: SnapshotId, keyset: Keyset | None) -> None:
        self._snapshot = snapshot
        self._keyset = keyset

    @contextmanager
    def seal(self, name: PartName, sink: Writable) -> Iterator[Writable]:
        """Give what encrypts a part into `sink`. Raises what the sink raises."""
        if self._keyset is None:
            yield sink
            return
        with self._keyset.encrypt_to(sink, self._context("part", name.value)) as sealed:
            yield sealed

    def open(self, part: Part, source: Readable) -> Readable:
        """Return what decrypts a part; its `read` raises `SnapshotCorrupt`, and what the source raises."""
        if self._keyset is None:
            return source
        opened = self._keyset.decrypt_from(source, self._context("part", part.name.value))
        return _Opened(opened, part, self._snapshot)

    def seal_manifest(self, manifest: Manifest) -> Manifest:
        """Return the manifest with the seal that belongs to it as it is now."""
        if self._keyset is None:
            return manifest
        unsealed = manifest.model_copy(update={"encryption": Encryption(key_id=self._keyset.primary_id, seal="")})
        hidden = json.dumps({"deleted_paths": manifest.deleted_paths}).encode()
        seal = self._keyset.encrypt(hidden, self._context("manifest", _readable(json.loads(unsealed.to_json()))))
        encryption = Encryption(key_id=self._keyset.primary_id, seal=base64.b64encode(seal).decode())
        return manifest.model_copy(update={"encryption": encryption})

    def open_manifest(self, manifest: Manifest, document: dict[str, Any]) -> Manifest:
        """Return the manifest with what its seal hides; `document` is the JSON that it was read from.

        Raises:
            SnapshotCorrupt: somebody has changed it.
        """
        if self._keyset is None or manifest.encryption is None:
            return manifest
        try:
            seal = base64.b64decode(manifest.encryption.seal, validate=True)
            hidden = json.loads(self._keyset.decrypt(seal, self._context("manifest", _readable(document))))
        except (ValueError, binascii.Error) as error:
            raise SnapshotCorrupt(
                f"The manifest of snapshot {self._snapshot} is not as it was sealed: somebody has changed it. "
                "The snapshot is kept, and nothing was restored from it.",
                detail=str(error),
                resolution="Restore it from a backup of the snapshot store, or delete the instance.",
            ) from error
        return manifest.model_copy(update={"deleted_paths": tuple(hidden["deleted_paths"])})

    def _context(self, kind: str, what: str) -> bytes:
        return f"machineuse {kind}\0{self._snapshot}\0{what}".encode()


class _Opened:
    def __init__(self, source: Readable, part: Part, snapshot: SnapshotId) -> None:
        self._source = source
        self._part = part
        self._snapshot = snapshot

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, b"" at the end."""
        try:
            return self._source.read(size)
        except Undecipherable as error:
            raise corrupt_part(self._part, self._snapshot, f"it can't be decrypted: {error}") from error


def corrupt_part(part: Part, snapshot: SnapshotId, detail: str) -> SnapshotCorrupt:
    """Return what to raise when a stored part is not what the manifest says."""
    return SnapshotCorrupt(
        f"The archive {part.name.value} of snapshot {snapshot} is damaged. It is kept; nothing was restored from it.",
        detail=detail,
        resolution="Restore it from a backup of the snapshot store, or delete the instance.",
    )


def _readable(document: dict[str, Any]) -> str:
    """Return all of a manifest but its seal, always written the same way."""
    encryption = {key: value for key, value in document["encryption"].items() if key != "seal"}
    return json.dumps({**document, "encryption": encryption}, sort_keys=True, separators=(",", ":"))
