"""What a snapshot store is, whatever keeps the bytes.

Writing, in this order: `begin` → each part through `writer.part(name)` (temporary names) → `writer.commit(manifest)`,
which makes the bytes durable, reads every part back (size, SHA-256, zstd, tar) and puts the manifest in place last. A
crash at any point leaves either no manifest (nothing; the next `begin` and `clean_up` remove the rest) or a whole
snapshot. Deleting goes the other way round: the manifest first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol

from provisioner.errors import SnapshotCorrupt
from provisioner.snapshots.manifest import Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.sealing import Sealer
from provisioner.snapshots.tars import CHUNK_BYTES, Readable, Writable, inspect_tar


class SnapshotWriter(Protocol):
    """One snapshot being written."""

    def part(self, name: PartName) -> AbstractContextManager[Writable]:
        """Open a part for writing; opening it again starts it anew. Raises `SnapshotFailed` when it can't be kept."""
        ...

    def sealer(self) -> Sealer:
        """Return what encrypts the parts (see `write_part`) and seals the manifest, where the store has keys."""
        ...

    def verify(self, manifest: Manifest) -> None:
        """Make the parts durable and read them back; raises `SnapshotFailed` when one is not what the manifest says."""
        ...

    def commit(self, manifest: Manifest) -> None:
        """Put parts and, last, manifest in place; verifies first unless that was done. Raises `SnapshotFailed`."""
        ...

    def abandon(self) -> None:
        """Remove what was written. Idempotent; harmless after `commit`, also that of another writer."""
        ...


class SnapshotStore(Protocol):
    """Keeps snapshots. Safe for several threads, as long as one snapshot has one writer.

    A store that can't be used raises `SnapshotFailed`, never `SnapshotMissing`.
    """

    def begin(self, snapshot: SnapshotId) -> SnapshotWriter:
        """Start a snapshot, removing what a crash left of an earlier attempt.

        Raises `SnapshotFailed`, and `SnapshotKeyMissing` where it is to be encrypted and can't be.
        """
        ...

    def read_manifest(self, snapshot: SnapshotId) -> Manifest:
        """Return a snapshot's manifest.

        Raises `SnapshotMissing`, `SnapshotCorrupt` when it can't be read, or `SnapshotKeyMissing`.
        """
        ...

    def open_part(self, manifest: Manifest, name: PartName) -> AbstractContextManager[Readable]:
        """Open a part for reading, decrypted, and checked against the manifest while it is read.

        Its last read tells of a mismatch.
        """
        ...

    def list(self, instance_id: str) -> tuple[Manifest, ...]:
        """Return the whole snapshots of an instance, oldest generation first."""
        ...

    def delete(self, snapshot: SnapshotId) -> None:
        """Remove a snapshot, its manifest first. Idempotent."""
        ...

    def clean_up(self, *, older_than: timedelta, spared: Collection[SnapshotId] = ()) -> int:
        """Remove what crashes left and nobody has written to for `older_than`; return how many snapshots that were.

        What is `spared` is being written, or will be again, whatever the clocks say. What is not ours is left alone.
        """
        ...


def verify_snapshot(
    store: SnapshotStore,
    manifest: Manifest,
    *,
    names: Collection[PartName] = tuple(PartName),
    on_entry: Callable[[PartName, str], None] | None = None,
) -> None:
    """Read the parts of a stored snapshot that have one of these names and compare them with the manifest.

    `on_entry` gets the name of every entry of every part that is read.

    Raises:
        SnapshotCorrupt: a part is missing, or its size, SHA-256, compression or tar is wrong.
    """
    for part in manifest.parts:
        if part.name not in names:
            continue
        with store.open_part(manifest, part.name) as source:
            check_part(source, part, snapshot=manifest.id, on_entry=on_entry)


def check_part(
    source: Readable,
    part: Part,
    *,
    snapshot: SnapshotId,
    on_entry: Callable[[PartName, str], None] | None = None,
) -> None:
    """Read one part to its end and compare size and number of entries; raises `SnapshotCorrupt`."""
    each = (lambda name: on_entry(part.name, name)) if on_entry else None
    check = inspect_tar(source, what=f"The archive {part.name.value} of snapshot {snapshot}", on_entry=each)
    while source.read(CHUNK_BYTES):  # what is behind the end of the archive counts too
        pass
    if (check.uncompressed_bytes, check.entries) != (part.uncompressed_bytes, part.entries):
        raise SnapshotCorrupt(
            f"The archive {part.name.value} of snapshot {snapshot} does not hold what its manifest says.",
            detail=f"{check.entries} entries and {check.uncompressed_bytes} bytes, "
            f"expected {part.entries} and {part.uncompressed_bytes}",
        )
