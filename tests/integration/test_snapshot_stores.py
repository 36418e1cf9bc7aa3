"""What every snapshot store must do, on a directory and on a bucket of a real S3 server; and what only a bucket can.

With encryption and without.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from provisioner.errors import SettingsError, SnapshotCorrupt, SnapshotFailed, SnapshotMissing
from provisioner.object_storage import PART_BYTES, Bucket
from provisioner.settings import Settings
from provisioner.snapshots.capture import Capture
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.location import open_store, parse_s3_url
from provisioner.snapshots.manifest import ImageIdentity, Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.mark import Method
from provisioner.snapshots.s3 import S3Store
from provisioner.snapshots.store import SnapshotStore, SnapshotWriter, verify_snapshot
from provisioner.snapshots.tars import write_part
from tests.conftest import StartService
from tests.integration.test_snapshots import FILL, Node
from tests.support.s3_server import S3Server, s3_server
from tests.support.watched import wait_until

SNAPSHOT = SnapshotId(instance_id="mu-1", generation=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: S3Server) -> Iterator[Bucket]:
    """Give the bucket, empty, with its keys in the environment."""
    bucket = Bucket(parse_s3_url(server.url()))
    yield bucket
    for each in list(bucket.list("")):
        bucket.delete(each.key)
    for upload in list(bucket.list_uploads("")):
        bucket.abort_upload(upload.key, upload.id)


@dataclass
class Scene:
    """A store, and a way to look at and damage what it keeps without it."""

    open: Callable[[], SnapshotStore]
    """Gives the store as a service that was just started has it."""
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], None]
    leftovers: Callable[[], list[str]]
    """Everything that is there: finished, unfinished."""


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def snapshot_keys(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Give what MACHINEUSE_SNAPSHOT_KEYS would be."""
    if not request.param:
        return None
    KeyFile(tmp_path / "keys.json").create()
    return str(tmp_path / "keys.json")


@pytest.fixture(params=["directory", "s3"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, snapshot_keys: str | None) -> Scene:
    if request.param == "directory":
        root = tmp_path / "store"
        return Scene(
            open=lambda: open_store(Settings(snapshot_store=str(root), snapshot_keys=snapshot_keys)),
            read=lambda key: (root / key).read_bytes(),
            write=lambda key, data: _write_file(root / key, data),
            leftovers=lambda: [str(path) for path in root.rglob("*") if path.is_file()],
        )
    server: S3Server = request.getfixturevalue("server")
    bucket: Bucket = request.getfixturevalue("bucket")
    return Scene(
        open=lambda: open_store(Settings(snapshot_store=server.url("deep/store"), snapshot_keys=snapshot_keys)),
        read=lambda key: bucket.get(f"deep/store/{key}"),
        write=lambda key, data: bucket.put(f"deep/store/{key}", data),
        leftovers=lambda: [each.key for each in (*bucket.list(""), *bucket.list_uploads(""))],
    )


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def make_tar(size: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("machine/file")
        member.size = size
        archive.addfile(member, io.BytesIO(os.urandom(size)))
    return buffer.getvalue()


def write(store: SnapshotStore, generation: int = 1, *, size: int = 1000) -> tuple[SnapshotWriter, Manifest]:
    writer = store.begin(SnapshotId(instance_id="mu-1", generation=generation))
    return writer, write_home(writer, generation, size=size)


def write_home(writer: SnapshotWriter, generation: int = 1, *, size: int) -> Manifest:
    with writer.part(PartName.HOME) as sink:
        part = write_part([make_tar(size)], sink, name=PartName.HOME, seal=writer.sealer().seal)
    return writer.sealer().seal_manifest(manifest_of(part, generation))


def manifest_of(home: Part, generation: int = 1) -> Manifest:
    return Manifest(
        instance_id="mu-1",
        cluster="local",
        generation=generation,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        node_id="local",
        image=ImageIdentity(reference="browser", id="sha256:1"),
        home_path="/home/machine",
        stopped_cleanly=True,
        container_id="c",
        run_started_at=None,
        parts=(home,),
        changed_paths=0,
    )


def keep(store: SnapshotStore, generation: int = 1, *, size: int = 1000) -> Manifest:
    writer, manifest = write(store, generation, size=size)
    writer.commit(manifest)
    return manifest


def start_part(store: SnapshotStore) -> list[object]:
    """Begin to write a part of several megabytes and stop in the middle, as a killed process does."""
    part = store.begin(SNAPSHOT).part(PartName.HOME)
    part.__enter__().write(os.urandom(PART_BYTES + 1000))
    return [part]  # kept alive: what is garbage is closed, and nothing is closed by a kill


def test_what_was_committed_is_there_after_a_restart(scene: Scene) -> None:
    manifest = keep(scene.open(), size=2 * PART_BYTES + 5)
    store = scene.open()
    assert store.read_manifest(manifest.id) == manifest
    verify_snapshot(store, manifest)
    assert len(scene.leftovers()) == 2


def test_what_was_copied_file_by_file_from_another_store_is_there(
    scene: Scene, tmp_path: Path, snapshot_keys: str | None
) -> None:
    other = tmp_path / "other"
    manifest = keep(open_store(Settings(snapshot_store=str(other), snapshot_keys=snapshot_keys)))
    for path in other.rglob("*"):
        if path.is_file():
            scene.write(str(path.relative_to(other)), path.read_bytes())
    store = scene.open()
    assert store.list("mu-1") == (manifest,)
    verify_snapshot(store, manifest)


def test_until_it_is_committed_there_is_no_snapshot(scene: Scene) -> None:
    store = scene.open()
    writer, manifest = write(store)
    writer.verify(manifest)
    with pytest.raises(SnapshotMissing):
        store.read_manifest(manifest.id)
    assert store.list("mu-1") == ()
    writer.commit(manifest)
    writer.commit(manifest)
    assert store.list("mu-1") == (manifest,)


def test_a_snapshot_is_never_overwritten(scene: Scene) -> None:
    store = scene.open()
    with pytest.raises(SnapshotFailed, match="never overwritten"):
        store.begin(keep(store).id)


def test_a_part_that_is_opened_again_is_written_anew(scene: Scene) -> None:
    store = scene.open()
    writer, manifest = write(store)
    with writer.part(PartName.HOME) as sink:
        part = write_part([make_tar(10)], sink, name=PartName.HOME, seal=writer.sealer().seal)
    manifest = writer.sealer().seal_manifest(manifest.model_copy(update={"parts": (part,)}))
    writer.commit(manifest)
    verify_snapshot(store, manifest)


def test_abandoning_leaves_nothing_and_is_harmless_after_a_commit(scene: Scene) -> None:
    store = scene.open()
    writer, _ = write(store)
    writer.abandon()
    writer.abandon()
    assert scene.leftovers() == []
    writer, manifest = write(store)
    writer.commit(manifest)
    writer.abandon()
    verify_snapshot(store, manifest)


def test_a_crash_in_the_middle_of_a_part_is_cleaned_up_by_the_next_attempt(scene: Scene) -> None:
    alive = start_part(scene.open())
    assert scene.leftovers()
    manifest = keep(scene.open())
    verify_snapshot(scene.open(), manifest)
    assert len(scene.leftovers()) == 2
    del alive


def test_a_crash_between_parts_and_manifest_leaves_no_snapshot_and_is_cleaned_up(scene: Scene) -> None:
    kept = keep(scene.open(), 2)
    write(scene.open())
    alive = start_part(scene.open())
    store = scene.open()
    assert store.clean_up(older_than=timedelta(hours=1)) == 0
    assert len(scene.leftovers()) > 2
    assert store.clean_up(older_than=timedelta()) == 1
    assert len(scene.leftovers()) == 2
    assert store.list("mu-1") == (kept,)
    verify_snapshot(store, kept)
    del alive


def test_what_others_keep_there_is_left_alone(scene: Scene) -> None:
    others = ["readme", "mu-1/notes", "mu-1/1/own", "mu-1/01/home.tar.zst", "photos/2020/a.jpg", "A/1/home.tar.zst"]
    for key in others:
        scene.write(key, b"x")
    store = scene.open()
    write(store)
    assert store.clean_up(older_than=timedelta()) == 1
    assert store.clean_up(older_than=timedelta()) == 0
    assert all(scene.read(key) == b"x" for key in others)
    assert len(scene.leftovers()) == len(others)


def test_a_snapshot_that_is_still_to_be_taken_is_not_cleaned_up(scene: Scene) -> None:
    store = scene.open()
    writer, manifest = write(store)
    assert store.clean_up(older_than=timedelta(), spared={SNAPSHOT}) == 0
    writer.commit(manifest)
    assert store.clean_up(older_than=timedelta()) == 0
    verify_snapshot(store, manifest)


def go_on(writer: SnapshotWriter, manifest: Manifest | None) -> None:
    """Go on with a snapshot that somebody else has begun meanwhile; a part is written if there is none."""
    writer.commit(manifest or write_home(writer, size=5000))


@pytest.mark.parametrize("written", [False, True])
def test_who_was_overtaken_can_not_harm_what_is_complete(scene: Scene, written: bool) -> None:
    late = scene.open().begin(SNAPSHOT)
    mine = write_home(late, size=3000) if written else None
    store = scene.open()
    manifest = keep(store)
    with pytest.raises(SnapshotFailed):
        go_on(late, mine)
    late.abandon()
    assert store.read_manifest(SNAPSHOT) == manifest
    verify_snapshot(store, manifest)
    assert len(scene.leftovers()) == 2


def test_who_was_overtaken_after_verifying_puts_no_manifest_to_the_parts_of_another(scene: Scene) -> None:
    late, mine = write(scene.open(), size=3000)
    late.verify(mine)
    store = scene.open()
    writer, manifest = write(store)
    with pytest.raises(SnapshotFailed):
        go_on(late, mine)
    late.abandon()
    with pytest.raises(SnapshotMissing):
        store.read_manifest(SNAPSHOT)
    writer.abandon()
    assert scene.leftovers() == []
    assert keep(store).home.bytes == manifest.home.bytes


def test_a_flipped_byte_is_noticed_anywhere(scene: Scene) -> None:
    store = scene.open()
    manifest = keep(store)
    key = f"{SNAPSHOT}/{PartName.HOME.value}"
    data = scene.read(key)
    for position in range(0, len(data), len(data) // 20):
        scene.write(key, data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(SnapshotCorrupt):
            verify_snapshot(store, manifest)
    for changed in (data[:-1], data + b"x"):
        scene.write(key, changed)
        with pytest.raises(SnapshotCorrupt):
            verify_snapshot(store, manifest)
    scene.write(f"{SNAPSHOT}/manifest.json", b"{")
    with pytest.raises(SnapshotCorrupt, match="damaged"):
        store.read_manifest(manifest.id)
    assert store.list("mu-1") == ()


def test_what_can_not_be_read_back_is_not_committed(scene: Scene) -> None:
    store = scene.open()
    writer, manifest = write(store)
    lying = manifest.home.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(SnapshotFailed, match="can't be read back"):
        writer.commit(manifest.model_copy(update={"parts": (lying,)}))
    assert store.list("mu-1") == ()


def test_snapshots_are_listed_oldest_first_and_deleted_for_good(scene: Scene) -> None:
    store = scene.open()
    for generation in (10, 9, 2):
        keep(store, generation)
    assert [manifest.generation for manifest in store.list("mu-1")] == [2, 9, 10]
    assert store.list("mu") == ()
    for generation in (10, 10, 9, 2):
        store.delete(SnapshotId(instance_id="mu-1", generation=generation))
    assert scene.leftovers() == []


def test_what_is_stored_shows_what_was_archived_only_without_keys(scene: Scene, snapshot_keys: str | None) -> None:
    keep(scene.open())
    stored = scene.read(f"{SNAPSHOT}/{PartName.HOME.value}")
    shown = stored.startswith(b"\x28\xb5\x2f\xfd") and b"machine/file" in stored
    assert shown == (snapshot_keys is None)


# -- what only a bucket can ------------------------------------------------------------------------------------------


def test_an_archive_of_several_parts_is_never_in_memory_as_a_whole(server: S3Server, bucket: Bucket) -> None:
    store = S3Store(bucket)
    chunk = os.urandom(1 << 20)
    tracemalloc.start()
    try:
        with store.begin(SNAPSHOT).part(PartName.HOME) as sink:
            for _ in range(40):
                sink.write(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * PART_BYTES
    assert (server.root / "objects" / server.BUCKET / f"{SNAPSHOT}/home.tar.zst").stat().st_size == 40 << 20


def test_a_writer_that_was_overtaken_can_not_harm_the_one_that_came_after(bucket: Bucket) -> None:
    store = S3Store(bucket)
    late = store.begin(SNAPSHOT).part(PartName.HOME)
    late.__enter__().write(b"late")
    manifest = keep(store)
    with pytest.raises(SnapshotFailed, match="began it anew"):
        late.__exit__(None, None, None)
    verify_snapshot(store, manifest)


def test_reading_goes_on_where_it_was_when_the_connection_breaks(server: S3Server, bucket: Bucket) -> None:
    store = S3Store(bucket)
    manifest = keep(store, size=3 * PART_BYTES)
    with store.open_part(manifest, PartName.HOME) as reader:
        read = len(reader.read(1000))
        server.stop()
        server.start()
        while data := reader.read(1 << 20):  # its end compares the SHA-256 of all of it
            read += len(data)
    assert read == manifest.home.bytes


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_told_and_not_repeated(
    server: S3Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    keep(S3Store(bucket))
    monkeypatch.setenv(variable, "wrong-and-secret")
    store = open_store(Settings(snapshot_store=server.url()))
    with capture_logs() as logs:
        for attempt in (lambda: store.begin(SNAPSHOT), lambda: store.read_manifest(SNAPSHOT), lambda: keep(store, 2)):
            with pytest.raises(SnapshotFailed, match="refuses our keys") as caught:
                attempt()
            told = f"{caught.value.message} {caught.value.detail} {caught.value.resolution} {logs}"
            assert "AWS_SECRET_ACCESS_KEY" in told
            for secret in ("wrong-and-secret", server.secret_key):
                assert secret not in told


def test_no_keys_are_told(server: S3Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    del bucket
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SnapshotFailed, match="There are no keys") as caught:
        open_store(Settings(snapshot_store=server.url())).begin(SNAPSHOT)
    assert "AWS_PROFILE" in (caught.value.resolution or "")


def test_a_missing_bucket_is_told(server: S3Server, bucket: Bucket) -> None:
    del bucket
    store = open_store(Settings(snapshot_store=server.url(bucket="not-there")))
    for attempt in (lambda: store.begin(SNAPSHOT), lambda: store.read_manifest(SNAPSHOT)):
        with pytest.raises(SnapshotFailed, match="does not exist") as caught:
            attempt()
        assert "Create the bucket" in (caught.value.resolution or "")


def test_a_server_that_is_away_is_no_missing_snapshot(bucket: Bucket) -> None:
    del bucket
    location = parse_s3_url("s3://snapshots?endpoint=http://127.0.0.1:1")
    store = S3Store(Bucket(location, attempts=1))
    for attempt in (lambda: store.read_manifest(SNAPSHOT), lambda: store.clean_up(older_than=timedelta())):
        with pytest.raises(SnapshotFailed, match="can't be reached") as caught:
            attempt()
        assert "endpoint" in (caught.value.resolution or "")


def test_a_store_that_is_away_keeps_nobody_from_serving(start_service: StartService, bucket: Bucket) -> None:
    del bucket  # only the keys
    service = start_service(snapshot_store="s3://snapshots?endpoint=http://127.0.0.1:1")
    wait_until(lambda: "can't be reached" in service.log(), what="it says so")


def test_a_store_that_can_not_be_right_is_refused_at_once() -> None:
    for url in ("s3://", "s3://b", "ftp://bucket/x", "s3://key:secret@bucket", "s3://bucket?sekret=x"):
        with pytest.raises(SettingsError, match="MACHINEUSE_SNAPSHOT_STORE") as caught:
            open_store(Settings(snapshot_store=url))
        assert "secret" not in caught.value.message.replace("AWS_SECRET", "")


def test_a_machine_is_kept_in_a_bucket_and_given_back(server: S3Server, bucket: Bucket, tmp_path: Path) -> None:
    node = Node(tmp_path / "unused")
    node.store = S3Store(bucket, prefix="machines")  # type: ignore[assignment]
    try:
        node.run_body(script=FILL)
        assert Capture(node.request(), machine=node.machine, store=node.store).run().copied
        expected = node.content(node.volumes.home)
        node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-2")
        assert node.content(f"{node.volumes.home}-2") == expected
        assert server.objects() == [f"machines/{node.snapshot()}/{name}" for name in ("home.tar.zst", "manifest.json")]
    finally:
        node.clean_up()


MEASURE = """
import os, resource, sys, tarfile
from provisioner.settings import Settings
from provisioner.snapshots.location import open_store
from provisioner.snapshots.manifest import PartName, SnapshotId
from provisioner.snapshots.store import verify_snapshot
from provisioner.snapshots.tars import write_part
from tests.integration.test_snapshot_stores import manifest_of

def home(mib):
    member = tarfile.TarInfo("machine/large")
    member.size = mib << 20
    yield member.tobuf()
    for _ in range(mib):
        yield os.urandom(1 << 20)
    yield bytes(1024)

store = open_store(Settings(snapshot_store=sys.argv[1], snapshot_keys=sys.argv[2]))
writer = store.begin(SnapshotId(instance_id="mu-1", generation=1))
with writer.part(PartName.HOME) as sink:
    part = write_part(home(int(sys.argv[3])), sink, name=PartName.HOME, seal=writer.sealer().seal)
manifest = writer.sealer().seal_manifest(manifest_of(part))
writer.commit(manifest)
verify_snapshot(store, manifest)
store.delete(manifest.id)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, part.bytes)
"""


def test_a_large_home_takes_no_more_memory_than_a_small_one(server: S3Server, bucket: Bucket, tmp_path: Path) -> None:
    """Written encrypted, read back, and read once more: measured from outside, with all that libraries allocate."""
    del bucket
    KeyFile(tmp_path / "keys.json").create()

    def measure(mib: int) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, server.url(), str(tmp_path / "keys.json"), str(mib)],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peak_kib, stored_bytes = map(int, done.stdout.split())
        assert stored_bytes > mib << 20
        return peak_kib << 10, stored_bytes

    (small, _), (large, _) = measure(32), measure(256)
    assert large - small < 4 * PART_BYTES
