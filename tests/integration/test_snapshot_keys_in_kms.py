"""A key file that a KMS key encrypts, on a KMS server: what is in the file is of no use without KMS.

And what an S3 server encrypts itself, with a key of that KMS or its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest

from provisioner.errors import SnapshotKeyMissing
from provisioner.settings import Settings
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.location import find_key_file, open_store
from provisioner.snapshots.store import verify_snapshot
from tests.integration.test_snapshot_stores import keep
from tests.support.kms_server import KmsServer, kms_server


@pytest.fixture(scope="module")
def server() -> Iterator[KmsServer]:
    with pytest.MonkeyPatch.context() as patch:
        _set_keys(patch)
        with kms_server() as server:
            yield server


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_keys(monkeypatch)


def _set_keys(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("AWS_PROFILE", raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", "any")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def keys_of(url: str) -> KeyFile:
    return find_key_file(Settings(snapshot_keys=url))


def test_keys_are_made_rotated_and_read_with_the_help_of_kms(server: KmsServer, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = keys_of(server.url(str(path)))
    first = keys.create()
    assert json.loads(path.read_text()).keys() == {"encryptedKeyset", "keysetInfo"}
    settings = Settings(snapshot_keys=server.url(str(path)), snapshot_store=str(tmp_path / "store"))
    manifest = keep(open_store(settings))
    assert manifest.encryption
    assert manifest.encryption.key_id == first.primary_id
    rotated = keys.rotate()
    assert rotated.ids == (first.primary_id, rotated.primary_id)
    assert open_store(settings).read_manifest(manifest.id) == manifest


def test_another_kms_key_is_refused(server: KmsServer, tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    keys_of(server.url(path)).create()
    client: Any = server.client()
    other = client.create_key()["KeyMetadata"]["Arn"]
    with pytest.raises(SnapshotKeyMissing, match="KMS refuses the key of the snapshots' keys") as caught:
        keys_of(server.url(path, arn=other)).load()
    assert "kms:Decrypt" in caught.value.explain()


def test_an_unknown_kms_key_is_told_and_no_file_is_made(server: KmsServer, tmp_path: Path) -> None:
    keys = keys_of(server.url(str(tmp_path / "keys.json"), arn=server.arn[:-4] + "0000"))
    with pytest.raises(SnapshotKeyMissing, match="KMS refuses"):
        keys.create()
    assert list(tmp_path.iterdir()) == []


def test_a_kms_that_is_away_keeps_nobody_from_starting_and_is_told(server: KmsServer, tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    keys_of(server.url(path)).create()
    away = KmsServer("http://127.0.0.1:1", server.arn)
    settings = Settings(snapshot_keys=away.url(path), snapshot_store=str(tmp_path / "store"))
    store = open_store(settings)
    with pytest.raises(SnapshotKeyMissing, match="can't be reached"):
        keep(store)
    assert not (tmp_path / "store").exists()


def test_without_aws_keys_it_is_told(server: KmsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "keys.json")
    keys_of(server.url(path)).create()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(SnapshotKeyMissing, match="no AWS keys"):
        keys_of(server.url(path)).load()


@pytest.mark.parametrize("sse", ["AES256", "aws:kms"])
def test_everything_in_a_bucket_is_encrypted_by_its_server_as_it_was_set(server: KmsServer, sse: str) -> None:
    """By the server that has the KMS here: the S3 server of the other tests knows no encryption of its own."""
    client: Any = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="profiles")
    prefix, key = sse[:3].lower(), server.arn if sse == "aws:kms" else None
    url = f"s3://profiles/{prefix}?endpoint={quote(server.endpoint)}&sse={sse}" + (
        f"&kms_key={quote(key)}" if key else ""
    )
    store = open_store(Settings(snapshot_store=url))
    verify_snapshot(store, keep(store))
    found = client.list_objects_v2(Bucket="profiles", Prefix=prefix)["Contents"]
    assert len(found) == 2
    for each in found:
        head = client.head_object(Bucket="profiles", Key=each["Key"])
        assert (head["ServerSideEncryption"], head.get("SSEKMSKeyId")) == (sse, key)
