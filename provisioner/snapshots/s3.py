"""The snapshot store that is a bucket: `<prefix>/<instance>/<generation>/` with the parts and `manifest.json`.

A part is an upload of its own and becomes an object when it is whole. `verify` reads all of it back from the server;
`commit` puts the manifest last. What a crash leaves is parts without a manifest and uploads that nobody completes:
`begin` removes both for its snapshot, which cuts off a writer still at it elsewhere; `clean_up` does so for all.
Objects whose keys are not ours are never touched.

A store that can't be reached raises `SnapshotFailed`, never `SnapshotMissing`: it does not mean that nothing is there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import structlog

from provisioner.errors import (
    ObjectMissing,
    ObjectStorageError,
    SnapshotCorrupt,
    SnapshotFailed,
    SnapshotKeyMissing,
    SnapshotMissing,
)
from provisioner.object_storage import Bucket, Upload
from provisioner.snapshots.checked import CheckedReader, parse_manifest
from provisioner.snapshots.manifest import ID_PATTERN, Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.sealing import Sealer, Sealing, corrupt_part
from provisioner.snapshots.store import check_part
from provisioner.snapshots.tars import Readable, Writable

log = structlog.get_logger(__name__)

_MANIFEST = "manifest.json"
_OURS = re.compile(
    rf"({ID_PATTERN.strip('^$')})/(\d{{1,18}})/({'|'.join(re.escape(name) for name in [*PartName, _MANIFEST])})"
)


class S3Store:
    """Keeps snapshots in a bucket, which has to exist."""

    def __init__(self, bucket: Bucket, *, prefix: str = "", sealing: Sealing | None = None) -> None:
        self._bucket = bucket
        self._sealing = sealing or Sealing()
        self._prefix = f"{prefix}/" if prefix else ""

    def begin(self, snapshot: SnapshotId) -> S3Writer:
        """Start a snapshot, removing what a crash left of an earlier attempt, and see whether it can be written.

        Raises:
            SnapshotFailed: the snapshot is there already, or the store can't be used.
            SnapshotKeyMissing: it is to be encrypted and can't be.
        """
        sealer = self._sealing.sealer(snapshot)
        prefix = self._key(snapshot, "")
        with _failing():
            self._abort_uploads(snapshot)  # first: what is completed after this can't be of an earlier attempt
            keys = [each.key for each in self._bucket.list(prefix)]
            if prefix + _MANIFEST in keys:
                raise SnapshotFailed(f"Snapshot {snapshot} exists already and is never overwritten.")
            for name in PartName:
                if prefix + name.value in keys:
                    self._bucket.delete(prefix + name.value)
            self._bucket.begin_upload(prefix + PartName.HOME.value).abort()  # before a browser is stopped for it
        return S3Writer(self._bucket, prefix, snapshot, sealer)

    def read_manifest(self, snapshot: SnapshotId) -> Manifest:
        """Return a snapshot's manifest.

        Raises:
            SnapshotMissing: there is no such snapshot.
            SnapshotCorrupt: the manifest is not one of this snapshot.
            SnapshotKeyMissing: it is encrypted with a key that we don't have.
            SnapshotFailed: the store can't be used.
        """
        key = self._key(snapshot, _MANIFEST)
        with _failing():
            try:
                data = self._bucket.get(key)
            except ObjectMissing as error:
                raise SnapshotMissing(f"There is no snapshot {snapshot}.", detail=error.detail) from error
        return parse_manifest(data, snapshot, where=key, sealing=self._sealing)

    @contextmanager
    def open_part(self, manifest: Manifest, name: PartName) -> Iterator[Readable]:
        """Open a part for reading; its size and SHA-256 are compared when the last byte has been read.

        Raises:
            SnapshotCorrupt: the part is missing, or (from `read`) not what the manifest says.
            SnapshotKeyMissing: it is encrypted with a key that we don't have.
            SnapshotFailed: the store can't be used (also from `read`).
        """
        part, opener = manifest.part(name), self._sealing.opener(manifest)
        if part is None:
            raise SnapshotCorrupt(f"The manifest of snapshot {manifest.id} lists no {name.value}.")
        with _open_to_read(self._bucket, self._key(manifest.id, name.value), part, manifest.id) as reader:
            yield opener.open(part, reader)

    def list(self, instance_id: str) -> tuple[Manifest, ...]:
        """Return the whole snapshots of an instance, oldest generation first; unreadable ones are left out.

        Raises:
            SnapshotFailed: the store can't be used.
        """
        manifests = []
        instance = SnapshotId(instance_id=instance_id, generation=0).instance_id
        for snapshot, names in self._find(f"{instance}/").items():
            if _MANIFEST in names:
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
            SnapshotFailed: the store can't be used.
        """
        with _failing():
            for name in (_MANIFEST, *PartName):
                self._bucket.delete(self._key(snapshot, name))
            self._abort_uploads(snapshot)

    def clean_up(self, *, older_than: timedelta, spared: Collection[SnapshotId] = ()) -> int:
        """Remove what crashes left and nobody has written to for `older_than`; return how many snapshots that were.

        Raises:
            SnapshotFailed: the store can't be used.
        """
        before = datetime.now(UTC) - older_than
        removed: set[SnapshotId] = set()
        fresh = set(spared)
        with _failing():
            # Uploads first: a part that is still on its way keeps those alive that were whole long ago.
            for upload in list(self._bucket.list_uploads(self._prefix)):
                if (owner := self._parse(upload.key)) is None or owner[0] in spared:
                    continue
                if upload.started_at > before or self._bucket.find_last_write(upload) > before:
                    fresh.add(owner[0])
                    continue
                self._bucket.abort_upload(upload.key, upload.id)
                removed.add(owner[0])
        for snapshot, names in self._find("").items():
            if snapshot in fresh or _MANIFEST in names or any(modified > before for modified in names.values()):
                continue
            with _failing():
                for name in names:
                    self._bucket.delete(self._key(snapshot, name))
            removed.add(snapshot)
        for snapshot in sorted(removed, key=str):
            log.info("abandoned snapshot removed", snapshot=str(snapshot))
        return len(removed)

    def _find(self, prefix: str) -> dict[SnapshotId, dict[str, datetime]]:
        """Return the snapshots, whole or not: the names of their objects, and when each was written."""
        found: dict[SnapshotId, dict[str, datetime]] = defaultdict(dict)
        with _failing():
            for each in self._bucket.list(self._prefix + prefix):
                if owner := self._parse(each.key):
                    snapshot, name = owner
                    found[snapshot][name] = each.modified_at
        return found

    def _abort_uploads(self, snapshot: SnapshotId) -> None:
        for name in PartName:  # by the whole key: some servers list no others
            for upload in list(self._bucket.list_uploads(self._key(snapshot, name.value))):
                self._bucket.abort_upload(upload.key, upload.id)

    def _parse(self, key: str) -> tuple[SnapshotId, str] | None:
        match = _OURS.fullmatch(key.removeprefix(self._prefix))
        if match is None or str(int(match[2])) != match[2]:
            return None
        return SnapshotId(instance_id=match[1], generation=int(match[2])), match[3]

    def _key(self, snapshot: SnapshotId, name: str) -> str:
        return f"{self._prefix}{snapshot.instance_id}/{snapshot.generation}/{name}"


class S3Writer:
    """One snapshot being written into a bucket."""

    def __init__(self, bucket: Bucket, prefix: str, snapshot: SnapshotId, sealer: Sealer) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._snapshot = snapshot
        self._sealer = sealer
        self._uploads: dict[PartName, Upload] = {}
        self._verified: Manifest | None = None

    @contextmanager
    def part(self, name: PartName) -> Iterator[Writable]:
        """Open a part for writing; opening it again starts it anew. Raises `SnapshotFailed` when it can't be kept."""
        self._verified = None
        with _failing():
            if name in self._uploads:
                self._uploads.pop(name).abort()
                self._bucket.delete(self._prefix + name.value)
            upload = self._bucket.begin_upload(self._prefix + name.value)
        self._uploads[name] = upload
        yield _FailingWrites(upload)
        with _failing():
            upload.complete()

    def sealer(self) -> Sealer:
        """Return what encrypts the parts and seals the manifest."""
        return self._sealer

    def verify(self, manifest: Manifest) -> None:
        """Read the parts back from the server; raises `SnapshotFailed`."""
        for part in manifest.parts:
            try:
                with _open_to_read(self._bucket, self._prefix + part.name.value, part, self._snapshot) as reader:
                    check_part(self._sealer.open(part, reader), part, snapshot=self._snapshot)
            except SnapshotCorrupt as error:
                raise SnapshotFailed(
                    f"What was written of snapshot {self._snapshot} can't be read back: {error.message}",
                    detail=error.detail,
                    resolution="Check the server of the snapshot store.",
                ) from error
        self._verified = manifest

    def commit(self, manifest: Manifest) -> None:
        """Put the manifest in place; verifies first unless that was done. Raises `SnapshotFailed`."""
        if self._is_in_place(manifest):
            return
        if self._verified != manifest:
            self.verify(manifest)
        with _failing():
            self._check_not_overtaken(manifest)
            try:
                self._bucket.put(self._prefix + _MANIFEST, manifest.to_json(), new=True)
            except ObjectStorageError:
                # A second attempt of a call whose answer was lost finds what the first one put there.
                if not self._is_in_place(manifest):
                    raise

    def abandon(self) -> None:
        """Remove what was written. Idempotent; harmless after `commit`, also that of another writer."""
        try:
            for upload in self._uploads.values():
                upload.abort()
            if any(each.key == self._prefix + _MANIFEST for each in self._bucket.list(self._prefix)):
                return
            for name in self._uploads:
                self._bucket.delete(self._prefix + name.value)
        except ObjectStorageError as error:
            log.warning("snapshot not removed", snapshot=str(self._snapshot), error=error.message, detail=error.detail)

    def _check_not_overtaken(self, manifest: Manifest) -> None:
        """Raise unless the parts are still the ones that this writer put there: it may have been frozen since."""
        for part in manifest.parts:
            if self._uploads[part.name].etag != self._bucket.find_etag(self._prefix + part.name.value):
                raise SnapshotFailed(f"Snapshot {self._snapshot} was begun anew by somebody else.")

    def _is_in_place(self, manifest: Manifest) -> bool:
        with _failing():
            try:
                return self._bucket.get(self._prefix + _MANIFEST) == manifest.to_json()
            except ObjectMissing:
                return False


class _FailingWrites:
    """An upload whose `write` raises `SnapshotFailed`."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def write(self, data: bytes, /) -> int:
        with _failing():
            return self._upload.write(data)


class _FailingReads:
    """An object whose `read` raises `SnapshotFailed`: that the server is away says nothing about the bytes."""

    def __init__(self, source: Readable) -> None:
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        with _failing():
            return self._source.read(size)


@contextmanager
def _open_to_read(bucket: Bucket, key: str, part: Part, snapshot: SnapshotId) -> Iterator[CheckedReader]:
    with _failing():
        try:
            opened = bucket.open(key)
        except ObjectMissing as error:
            raise corrupt_part(part, snapshot, error.detail or key) from error
    with opened as source:
        yield CheckedReader(_FailingReads(source), part, snapshot=snapshot)


@contextmanager
def _failing() -> Iterator[None]:
    """Turn what the server refuses into `SnapshotFailed`."""
    try:
        yield
    except ObjectStorageError as error:
        raise SnapshotFailed(error.message, detail=error.detail, resolution=error.resolution) from error
