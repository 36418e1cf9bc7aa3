"""The directory store: a manifest that exists belongs to a snapshot that is whole."""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.errors import SnapshotCorrupt, SnapshotFailed, SnapshotMissing
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.manifest import Manifest, PartName, SnapshotId
from provisioner.snapshots.store import SnapshotWriter, verify_snapshot
from provisioner.snapshots.tars import write_part
from tests.support.manifests import make_manifest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(root)


def one_file_tar(text: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("machine/file")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def write(store: DirectoryStore, generation: int = 1, text: str = "text") -> tuple[SnapshotWriter, Manifest]:
    snapshot = SnapshotId(instance_id="mu-1", generation=generation)
    writer = store.begin(snapshot)
    with writer.part(PartName.HOME) as sink:
        part = write_part([one_file_tar(text)], sink, name=PartName.HOME)
    return writer, make_manifest(generation=generation, parts=(part,))


def keep(store: DirectoryStore, generation: int = 1) -> Manifest:
    writer, manifest = write(store, generation)
    writer.commit(manifest)
    return manifest


def test_what_was_committed_can_be_read_and_verified(store: DirectoryStore) -> None:
    manifest = keep(store)
    assert store.read_manifest(manifest.id) == manifest
    verify_snapshot(store, manifest)


def test_a_directory_that_can_not_be_read_is_no_empty_one(store: DirectoryStore, root: Path) -> None:
    root.mkdir(parents=True)
    (root / "mu-1").symlink_to("mu-1")  # round and round: like a file system that is away, for root too
    for use in (lambda: store.list("mu-1"), lambda: store.clean_up(older_than=timedelta())):
        with pytest.raises(SnapshotFailed, match="mu-1 can't be read"):
            use()


def test_nobody_else_can_read_it(store: DirectoryStore, root: Path) -> None:
    keep(store)
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_until_it_is_committed_there_is_no_snapshot(store: DirectoryStore) -> None:
    writer, manifest = write(store)
    writer.verify(manifest)
    with pytest.raises(SnapshotMissing):
        store.read_manifest(manifest.id)
    assert store.list("mu-1") == ()


def test_what_can_not_be_read_back_is_not_committed(store: DirectoryStore, root: Path) -> None:
    writer, manifest = write(store)
    (temporary,) = root.rglob("*.tmp")
    data = bytearray(temporary.read_bytes())
    data[-1] ^= 1
    temporary.write_bytes(data)
    with pytest.raises(SnapshotFailed, match="can't be read back"):
        writer.commit(manifest)
    with pytest.raises(SnapshotMissing):
        store.read_manifest(manifest.id)


def test_committing_twice_is_committing_once(store: DirectoryStore) -> None:
    writer, manifest = write(store)
    writer.commit(manifest)
    writer.commit(manifest)
    verify_snapshot(store, manifest)


def test_abandoning_leaves_nothing_and_is_harmless_after_a_commit(store: DirectoryStore, root: Path) -> None:
    writer, _ = write(store)
    writer.abandon()
    writer.abandon()
    assert list(root.iterdir()) == []
    writer, manifest = write(store)
    writer.commit(manifest)
    writer.abandon()
    verify_snapshot(store, manifest)


def test_a_snapshot_is_never_overwritten(store: DirectoryStore) -> None:
    with pytest.raises(SnapshotFailed, match="never overwritten"):
        store.begin(keep(store).id)


def test_a_new_attempt_removes_what_a_crash_left(store: DirectoryStore, root: Path) -> None:
    write(store, text="first")
    writer, manifest = write(store, text="second")
    assert len(list(root.rglob("*.tmp"))) == 1
    writer.commit(manifest)
    verify_snapshot(store, manifest)


def test_every_flipped_byte_is_noticed(store: DirectoryStore, root: Path) -> None:
    manifest = keep(store)
    (path,) = root.rglob(PartName.HOME.value)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(SnapshotCorrupt):
            verify_snapshot(store, manifest)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_a_part_of_another_length_is_noticed(store: DirectoryStore, root: Path, change) -> None:  # type: ignore[no-untyped-def]
    manifest = keep(store)
    (path,) = root.rglob(PartName.HOME.value)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SnapshotCorrupt, match=r"damaged|decompressed|whole"):
        verify_snapshot(store, manifest)


def test_a_part_that_is_gone_is_noticed(store: DirectoryStore, root: Path) -> None:
    manifest = keep(store)
    next(root.rglob(PartName.HOME.value)).unlink()
    with pytest.raises(SnapshotCorrupt, match="damaged"):
        verify_snapshot(store, manifest)


def test_a_damaged_manifest_and_one_of_another_format_are_told_apart(store: DirectoryStore, root: Path) -> None:
    manifest = keep(store)
    (path,) = root.rglob("manifest.json")
    path.write_bytes(manifest.to_json().replace(b'"format_version": 1', b'"format_version": 9'))
    with pytest.raises(SnapshotCorrupt, match="format 9"):
        store.read_manifest(manifest.id)
    path.write_text("{")
    with pytest.raises(SnapshotCorrupt, match="damaged"):
        store.read_manifest(manifest.id)
    path.write_bytes(manifest.model_copy(update={"generation": 2}).to_json())
    with pytest.raises(SnapshotCorrupt, match="belongs to mu-1/2"):
        store.read_manifest(manifest.id)


def test_snapshots_are_listed_oldest_first_by_number(store: DirectoryStore) -> None:
    for generation in (10, 9, 2):
        keep(store, generation)
    write(store, 11)
    assert [manifest.generation for manifest in store.list("mu-1")] == [2, 9, 10]
    assert store.list("mu-none") == ()


def test_deleting_removes_everything_and_can_be_repeated(store: DirectoryStore, root: Path) -> None:
    manifest = keep(store)
    store.delete(manifest.id)
    store.delete(manifest.id)
    assert list(root.iterdir()) == []


def test_a_deletion_that_is_cut_off_leaves_no_snapshot(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = keep(store)
    unlink = Path.unlink

    def unlink_manifest_only(path: Path, missing_ok: bool = False) -> None:
        if path.name != "manifest.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink_manifest_only)
        with pytest.raises(KeyboardInterrupt):
            store.delete(manifest.id)
    with pytest.raises(SnapshotMissing):
        store.read_manifest(manifest.id)
    assert store.clean_up(older_than=timedelta()) == 1
    assert list(root.iterdir()) == []


def test_cleaning_up_leaves_whole_snapshots_and_fresh_work_alone(store: DirectoryStore, root: Path) -> None:
    manifest = keep(store, 1)
    write(store, 2)
    assert store.clean_up(older_than=timedelta(hours=1)) == 0
    assert list(root.rglob("*.tmp"))
    assert store.clean_up(older_than=timedelta()) == 1
    assert not list(root.rglob("*.tmp"))
    verify_snapshot(store, manifest)


@pytest.mark.parametrize(
    ("number", "words", "advice"),
    [(errno.ENOSPC, "No space left on device", "Free some space"), (errno.EACCES, "Permission denied", "writable")],
)
def test_what_the_disk_refuses_is_one_clear_sentence(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, advice: str
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SnapshotFailed, match=words) as caught:
        write(store)
    assert str(root) in caught.value.message
    assert advice in (caught.value.resolution or "")


def test_a_full_disk_in_the_middle_of_a_part_is_told(store: DirectoryStore) -> None:
    writer = store.begin(SnapshotId(instance_id="mu-1", generation=1))
    with writer.part(PartName.HOME) as sink:
        full = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115
        sink._file = full  # type: ignore[attr-defined]
        with pytest.raises(SnapshotFailed, match="No space left on device"):
            sink.write(b"x")
        full.close()


def test_a_name_that_leads_out_of_the_store_is_refused() -> None:
    for name in ("../other", "a/b", ".", "", "A"):
        with pytest.raises(ValueError, match="instance_id"):
            SnapshotId(instance_id=name, generation=1)
