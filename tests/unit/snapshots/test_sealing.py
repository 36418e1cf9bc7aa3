"""Sealed snapshots: the store's owner can't read them, and can't swap, change or make up anything unnoticed."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provisioner.errors import SnapshotCorrupt, SnapshotFailed, SnapshotKeyMissing
from provisioner.snapshots.capture import Capture
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.keyset import Keyset, Undecipherable
from provisioner.snapshots.manifest import Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import restore
from provisioner.snapshots.sealing import Sealer, Sealing
from provisioner.snapshots.store import verify_snapshot
from provisioner.snapshots.tars import Writable, read_tar, write_part
from tests.unit.snapshots.conftest import SNAPSHOT, Scene
from tests.unit.snapshots.fakes import content

KEYSET = Keyset.generate()


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    keys = KeyFile(tmp_path / "keys.json")
    keys.create()
    return keys


@pytest.fixture
def sealing(keys: KeyFile) -> Sealing:
    return Sealing(keys)


def take(scene: Scene) -> Manifest:
    return Capture(scene.capture, machine=scene.machine, store=scene.store).run().manifest


def directory_of(scene: Scene, snapshot: SnapshotId = SNAPSHOT) -> Path:
    return scene.store_root / str(snapshot)


def change(scene: Scene, **changes: Any) -> None:
    """Change the stored manifest, as the store's owner can."""
    path = directory_of(scene) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def assert_refused(scene: Scene, match: str) -> None:
    volume = scene.machine.volume("new-home")
    with pytest.raises(SnapshotCorrupt, match=match):
        restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store)
    assert content(volume) == {}


def test_what_comes_back_is_what_was_there(scene: Scene) -> None:
    manifest = take(scene)
    assert scene.store.read_manifest(SNAPSHOT) == manifest
    verify_snapshot(scene.store, manifest)
    for method in Method:
        restored = restore(scene.restore(method, volume=method.value), machine=scene.machine, store=scene.store)
        expected = content(scene.home)
        expected.pop("profile/SingletonLock")
        assert content(scene.machine.volume(method.value)) == expected
        assert scene.machine.images[restored.image]["deleted"] == ("/etc/gone",)


def test_nothing_that_is_known_of_the_home_is_in_the_stored_bytes(scene: Scene) -> None:
    known = [
        b"cookie",
        b"kept",
        b"notes.txt",
        b"Cookies",
        b"machine/",
        b"ustar",
        b"tool",
        b"/etc/gone",
        b"\x28\xb5\x2f\xfd",
    ]
    (scene.home / "incompressible").write_bytes(noise := os.urandom(5000))
    manifest = take(scene)
    assert manifest.deleted_paths == ("/etc/gone",)
    stored = [path.read_bytes() for path in directory_of(scene).iterdir()]
    assert len(stored) == 3
    for data in stored:
        for text in [*known, noise[:16]]:
            if not (text == b"machine/" and data.startswith(b"{")):  # "/home/machine" is in every manifest
                assert text not in data, text


def test_the_manifest_tells_sizes_names_of_ours_and_times_only(scene: Scene) -> None:
    take(scene)
    told = json.loads((directory_of(scene) / "manifest.json").read_text())
    assert told.keys() == {
        *("format_version", "instance_id", "cluster", "generation", "created_at", "node_id", "image", "home_path"),
        *("stopped_cleanly", "container_id", "run_started_at", "parts", "changed_paths", "encryption"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"image": {"reference": "evil", "id": "sha256:original"}},
        {"home_path": "/etc"},
        {"deleted_paths": ["/etc/passwd"]},
        {"live": True},
        {"parts": []},
    ],
    ids=str,
)
def test_a_changed_manifest_is_refused(scene: Scene, changes: dict[str, Any]) -> None:
    take(scene)
    change(scene, **changes)
    assert_refused(scene, "somebody has changed it")


def test_a_seal_of_another_manifest_is_refused(scene: Scene) -> None:
    take(scene)
    other = json.loads((directory_of(scene) / "manifest.json").read_text())["encryption"]
    scene.store.delete(SNAPSHOT)
    take(scene)
    change(scene, encryption=other)
    assert_refused(scene, "somebody has changed it")


def test_a_manifest_may_be_written_in_another_way(scene: Scene) -> None:
    manifest = take(scene)
    path = directory_of(scene) / "manifest.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert scene.store.read_manifest(SNAPSHOT) == manifest


def test_a_part_of_an_earlier_attempt_is_refused(scene: Scene) -> None:
    take(scene)
    old = (directory_of(scene) / PartName.HOME.value).read_bytes()
    scene.store.delete(SNAPSHOT)
    take(scene)
    (directory_of(scene) / PartName.HOME.value).write_bytes(old)
    assert_refused(scene, "is damaged")


def test_a_part_of_another_snapshot_or_name_does_not_open() -> None:
    sink = io.BytesIO()
    part = write_part([bytes(1024)], sink, name=PartName.HOME, seal=Sealer(SNAPSHOT, KEYSET).seal)

    def read(snapshot: SnapshotId, part: Part) -> bytes:
        sink.seek(0)
        opened = Sealer(snapshot, KEYSET).open(part, sink)
        return b"".join(read_tar(opened, what="It"))

    assert read(SNAPSHOT, part) == bytes(1024)
    for snapshot, name in (
        (SnapshotId(instance_id=SNAPSHOT.instance_id, generation=4), PartName.HOME),
        (SnapshotId(instance_id="mu-other", generation=3), PartName.HOME),
        (SNAPSHOT, PartName.ROOTFS),
    ):
        with pytest.raises(SnapshotCorrupt, match="is damaged") as caught:
            read(snapshot, part.model_copy(update={"name": name}))
        assert "can't be decrypted" in (caught.value.detail or "")


def test_a_snapshot_that_is_not_sealed_is_restored_unless_only_sealed_ones_are(scene: Scene, keys: KeyFile) -> None:
    plain = replace(scene, store=DirectoryStore(scene.store_root))
    take(plain)
    assert scene.store.read_manifest(SNAPSHOT).encryption is None
    restore(scene.restore(Method.FULL_RESTORE, volume="plain"), machine=scene.machine, store=scene.store)
    strict = DirectoryStore(scene.store_root, sealing=Sealing(keys, sealed_only=True))
    assert_refused(replace(scene, store=strict), "is not encrypted")


def test_without_keys_a_sealed_snapshot_is_refused_and_kept(scene: Scene) -> None:
    manifest = take(scene)
    keyless = DirectoryStore(scene.store_root)
    key_id = manifest.encryption.key_id if manifest.encryption else None
    with pytest.raises(SnapshotKeyMissing, match=f"encrypted with key {key_id}, and there are no keys") as caught:
        keyless.read_manifest(SNAPSHOT)
    assert "MACHINEUSE_SNAPSHOT_KEYS" in caught.value.explain()
    assert keyless.list(SNAPSHOT.instance_id) == ()
    verify_snapshot(scene.store, manifest)
    keyless.delete(SNAPSHOT)
    assert not directory_of(scene).exists(), "what nobody can read can be deleted"


def test_rotation_keeps_the_old_readable_until_their_key_is_dropped(scene: Scene, keys: KeyFile) -> None:
    first = keys.load().primary_id
    old = take(scene)
    keys.rotate()
    assert scene.store.read_manifest(SNAPSHOT) == old
    restore(scene.restore(Method.FULL_RESTORE, volume="rotated"), machine=scene.machine, store=scene.store)
    generation_4 = SnapshotId(instance_id=SNAPSHOT.instance_id, generation=4)
    scene = replace(scene, capture=replace(scene.capture, snapshot=generation_4))
    new = take(scene)
    assert old.encryption
    assert new.encryption
    assert (old.encryption.key_id, new.encryption.key_id) == (first, keys.load().primary_id)
    assert old.encryption.key_id != new.encryption.key_id

    keys.drop(first)

    with pytest.raises(SnapshotKeyMissing, match=f"encrypted with key {first}, which is not in"):
        scene.store.read_manifest(SNAPSHOT)
    assert scene.store.list(SNAPSHOT.instance_id) == (new,)
    verify_snapshot(scene.store, new)


def test_without_its_key_file_no_snapshot_is_taken_and_nobody_is_stopped(scene: Scene, keys: KeyFile) -> None:
    keys.path.unlink()
    with pytest.raises(SnapshotFailed, match=r"the instance goes on running.*key file"):
        take(scene)
    assert scene.machine.containers["browser-1"].starts == 1
    assert not scene.store_root.exists()


# -- streams


@given(st.binary(max_size=3000), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_changed_or_missing_byte_is_noticed(message: bytes, data: st.DataObject) -> None:
    sealed = KEYSET.encrypt(message, b"context")
    assert KEYSET.decrypt(sealed, b"context") == message
    position = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
    for changed in (flipped, sealed[:position], sealed + b"x"):
        with pytest.raises(Undecipherable):
            KEYSET.decrypt(changed, b"context")
    with pytest.raises(Undecipherable):
        KEYSET.decrypt(sealed, b"another context")


def test_segments_that_changed_places_or_are_missing_at_the_end_are_noticed() -> None:
    segment = 1 << 20
    sealed = KEYSET.encrypt(os.urandom(4 * segment), b"")
    first, second, third = (sealed[at * segment : (at + 1) * segment] for at in range(3))
    for changed in (first + third + second + sealed[3 * segment :], sealed[: 2 * segment], sealed[: 3 * segment]):
        with pytest.raises(Undecipherable):
            KEYSET.decrypt(changed, b"")


class Full:
    """A sink that is full after a while."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.writes = 0

    def write(self, data: bytes, /) -> int:
        self.writes += 1
        self.room -= len(data)
        if self.room < 0:
            raise SnapshotCorrupt("No room.")
        return len(data)


def write_to(sink: Writable, *, megabytes: int, then: Exception | None = None) -> None:
    with KEYSET.encrypt_to(sink, b"") as stream:
        for _ in range(megabytes):
            stream.write(os.urandom(1 << 20))
        if then is not None:
            raise then


def test_what_the_sink_raises_is_raised_and_nothing_is_written_afterwards() -> None:
    sink = Full(1 << 20)
    with pytest.raises(SnapshotCorrupt, match="No room"):
        write_to(sink, megabytes=10)
    writes = sink.writes
    gc.collect()
    assert sink.writes == writes


def test_what_was_broken_off_is_no_whole_stream() -> None:
    sink = io.BytesIO()
    with pytest.raises(RuntimeError):
        write_to(sink, megabytes=3, then=RuntimeError())
    gc.collect()
    with pytest.raises(Undecipherable):
        KEYSET.decrypt(sink.getvalue(), b"")


def test_what_the_source_raises_is_raised() -> None:
    sealed = io.BytesIO(KEYSET.encrypt(os.urandom(5 << 20), b""))

    class Breaking:
        def read(self, size: int = -1, /) -> bytes:
            if sealed.tell() > 2 << 20:
                raise SnapshotCorrupt("The line is dead.")
            return sealed.read(size)

    opened = KEYSET.decrypt_from(Breaking(), b"")
    assert opened.read(1 << 20)
    with pytest.raises(SnapshotCorrupt, match="The line is dead"):
        opened.read(4 << 20)


def test_a_large_archive_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    size = 64 << 20

    def tar() -> Iterator[bytes]:
        member = tarfile.TarInfo("machine/large")
        member.size = size
        yield member.tobuf()
        for _ in range(size >> 20):
            yield os.urandom(1 << 20)
        yield bytes(1024)

    sealer = Sealer(SNAPSHOT, KEYSET)
    tracemalloc.start()
    try:
        with (tmp_path / "part").open("wb") as sink:
            part = write_part(tar(), sink, name=PartName.HOME, seal=sealer.seal)
        with (tmp_path / "part").open("rb") as source:
            read = sum(map(len, read_tar(sealer.open(part, source), what="It")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == part.uncompressed_bytes > size
    assert peak < 16 << 20
    shutil.rmtree(tmp_path)
