"""The key file: made once, private, never overwritten, and clear words for everything that is wrong with it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from provisioner.errors import SettingsError, SnapshotKeyMissing
from provisioner.settings import Settings
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.location import find_key_file, open_store


class Xor:
    """Stands for a key management service: whoever has the byte can read."""

    def __init__(self, byte: int = 7) -> None:
        self.byte = byte
        self.asked = 0

    def encrypt(self, data: bytes, context: bytes) -> bytes:
        return bytes(each ^ self.byte for each in data) + context

    def decrypt(self, data: bytes, context: bytes) -> bytes:
        self.asked += 1
        if not data.endswith(context):
            raise SnapshotKeyMissing("KMS says no.")
        return bytes(each ^ self.byte for each in data.removesuffix(context))


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "made" / "keys.json")


def test_a_new_key_file_is_private_and_has_one_key(keys: KeyFile) -> None:
    made = keys.create()
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert made.ids == (made.primary_id,) == keys.load().ids
    assert [path.name for path in keys.path.parent.iterdir()] == [keys.path.name]


def test_a_key_file_is_never_overwritten(keys: KeyFile) -> None:
    first = keys.create()
    with pytest.raises(SettingsError, match="never overwritten"):
        keys.create()
    assert keys.load().ids == first.ids


def test_rotating_adds_a_key_that_is_used_from_now_on(keys: KeyFile) -> None:
    first = keys.create()
    service = KeyFile(keys.path)
    assert service.load().ids == first.ids
    second = keys.rotate()
    assert second.ids == (first.primary_id, second.primary_id)
    assert service.load().primary_id == second.primary_id, "a service that runs takes it over"
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert keys.drop(first.primary_id).ids == (second.primary_id,)
    assert service.load().ids == (second.primary_id,)


def test_the_key_in_use_and_unknown_ones_are_not_dropped(keys: KeyFile) -> None:
    made = keys.create()
    with pytest.raises(SettingsError, match="is the one that new snapshots are encrypted with"):
        keys.drop(made.primary_id)
    with pytest.raises(SettingsError, match="There is no key 1 in"):
        keys.drop(1)
    assert keys.load().ids == made.ids


def test_a_missing_file_is_told(keys: KeyFile) -> None:
    with pytest.raises(SnapshotKeyMissing, match="can't be read: No such file") as caught:
        keys.load()
    assert "new-key" in caught.value.explain()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610])
def test_a_file_that_others_may_read_is_refused(keys: KeyFile, mode: int) -> None:
    keys.create()
    keys.load()
    keys.path.chmod(mode)
    with pytest.raises(SnapshotKeyMissing, match=f"mode {mode:04o}") as caught:
        keys.load()
    assert "chmod 600" in caught.value.explain()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "no JSON", '{"primaryKeyId": 1, "key": []}', b"\xff\xfe".decode("latin1")]
)
def test_a_file_that_holds_no_keys_is_refused_and_not_repeated(keys: KeyFile, text: str) -> None:
    keys.create()
    keys.path.write_bytes(text.encode("latin1"))
    with pytest.raises(SnapshotKeyMissing, match=r"is no key file|can't be read"):
        keys.load()


def test_a_keyset_for_something_else_is_refused(keys: KeyFile) -> None:
    keys.create()
    document = json.loads(keys.path.read_text())
    document["key"][0]["keyData"]["typeUrl"] = "type.googleapis.com/google.crypto.tink.AesGcmKey"
    keys.path.write_text(json.dumps(document))
    with pytest.raises(SnapshotKeyMissing, match="is no key file"):
        keys.load()


def test_a_wrapped_file_holds_no_key_in_clear_text_and_may_be_read_by_others(tmp_path: Path) -> None:
    wrapping = Xor()
    keys = KeyFile(tmp_path / "keys.json", wrapping=wrapping)
    made = keys.create()
    keys.path.chmod(0o644)
    assert "encryptedKeyset" in json.loads(keys.path.read_text())
    assert keys.load().ids == made.ids
    assert keys.rotate().ids[0] == made.primary_id
    asked = wrapping.asked
    keys.load()
    keys.load()
    assert wrapping.asked <= asked + 1, "it is asked when the file has changed only"


def test_what_wraps_it_must_be_what_wrapped_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    KeyFile(path, wrapping=Xor()).create()
    with pytest.raises(SnapshotKeyMissing, match="is encrypted by KMS"):
        KeyFile(path).load()
    with pytest.raises(SnapshotKeyMissing):
        KeyFile(path, wrapping=Xor(8)).load()
    path.unlink()
    KeyFile(path).create()
    with pytest.raises(SnapshotKeyMissing, match="is not encrypted by KMS"):
        KeyFile(path, wrapping=Xor()).load()


def test_what_the_wrapping_raises_is_raised(tmp_path: Path) -> None:
    class Refusing(Xor):
        def encrypt(self, *_: bytes) -> bytes:
            raise SnapshotKeyMissing("KMS refuses.")

        decrypt = encrypt

    KeyFile(tmp_path / "keys.json", wrapping=Xor()).create()
    refused = KeyFile(tmp_path / "keys.json", wrapping=Refusing())
    with pytest.raises(SnapshotKeyMissing, match="KMS refuses"):
        refused.load()
    with pytest.raises(SnapshotKeyMissing, match="KMS refuses"):
        KeyFile(tmp_path / "other.json", wrapping=Refusing()).create()
    assert not (tmp_path / "other.json").exists()


class Interrupted(Xor):
    """Somebody else does something to the file before this one writes it."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def encrypt(self, data: bytes, context: bytes) -> bytes:
        self.meanwhile()
        return super().encrypt(data, context)


def test_of_two_that_make_a_file_at_once_one_is_told(tmp_path: Path) -> None:
    other = KeyFile(tmp_path / "keys.json", wrapping=Xor())
    with pytest.raises(SettingsError, match="never overwritten"):
        KeyFile(other.path, wrapping=Interrupted(other.create)).create()
    assert len(other.load().ids) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("change", ["rotate", "drop"])
def test_of_two_that_change_a_file_at_once_no_key_is_lost(tmp_path: Path, change: str) -> None:
    other = KeyFile(tmp_path / "keys.json", wrapping=Xor())
    first = other.create()
    other.rotate()
    late = KeyFile(other.path, wrapping=Interrupted(other.rotate))
    with pytest.raises(SettingsError, match="has been changed meanwhile"):
        late.rotate() if change == "rotate" else late.drop(first.primary_id)
    assert len(other.load().ids) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


# -- the setting


def test_the_default_file_is_in_the_data_directory_and_a_path_is_the_projects(tmp_path: Path) -> None:
    settings = Settings(project_dir=tmp_path)
    assert find_key_file(settings).path == tmp_path / ".machineuse" / "snapshot-keys.json"
    settings = Settings(project_dir=tmp_path, snapshot_keys="keys/a.json")
    assert find_key_file(settings).path == tmp_path / "keys" / "a.json"


@pytest.mark.parametrize(
    "value",
    [
        "gcp-kms://x",
        "aws-kms://",
        "aws-kms://alias/x",
        "aws-kms://arn:aws:s3:eu-west-1:1:key/x",
        "aws-kms://arn:aws:kms:eu-west-1:1:key/x?sekret=1",
        "aws-kms://arn:aws:kms:eu-west-1:1:key/x?file=",
    ],
)
def test_a_setting_that_can_not_be_right_is_refused_at_once(tmp_path: Path, value: str) -> None:
    with pytest.raises(SettingsError, match="MACHINEUSE_SNAPSHOT_KEYS"):
        open_store(Settings(project_dir=tmp_path, snapshot_keys=value))


def test_a_store_is_not_opened_without_its_key_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't be read"):
        open_store(Settings(project_dir=tmp_path, snapshot_keys="keys.json"))
    KeyFile(tmp_path / "keys.json").create()
    assert isinstance(open_store(Settings(project_dir=tmp_path, snapshot_keys="keys.json")), DirectoryStore)
    with pytest.raises(SettingsError, match="ENCRYPTED_ONLY"):
        open_store(Settings(project_dir=tmp_path, snapshot_encrypted_only=True))
