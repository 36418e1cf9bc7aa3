"""Snapshots in a bucket of a real S3 server that fail: the service is killed while it uploads, the disk is full.

Whatever fails, nothing of the browser's home is lost, and no upload is left for which somebody would have to pay.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from provisioner.object_storage import Bucket
from provisioner.snapshots.location import parse_s3_url
from tests.conftest import StartService
from tests.support.containers import execute
from tests.support.s3_server import S3Server, s3_server
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
NOISE_MIB = 200
WRITE = "head -c {bytes} /dev/urandom > ~/noise; sha256sum < ~/noise"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Give a server whose disk is a small one of its own."""
    disk = tmp_path_factory.mktemp("s3")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", disk], check=True)
    try:
        with s3_server(disk) as server:
            yield server
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> Bucket:
    return Bucket(parse_s3_url(server.url()))


@pytest.fixture(scope="module")
def service(start_service: StartService, server: S3Server) -> Service:
    return start_service(snapshot_store=server.url())


def run(service: Service, instance_id: str, script: str) -> str:
    return execute(service.container(instance_id), "sh", "-c", script, user="1000")


def create_large(service: Service) -> tuple[str, str]:
    """Create an instance with a large home that can't be compressed; return its id and what its file hashes to."""
    instance_id: str = service.create(config=SMALL)["id"]
    noise = run(service, instance_id, WRITE.format(bytes=NOISE_MIB << 20))
    assert len(noise.split()[0]) == hashlib.sha256().digest_size * 2, noise
    return instance_id, noise


def kill_while_uploading(service: Service, bucket: Bucket, instance_id: str) -> None:
    """Put an instance to sleep, and kill the service once some of the home has been sent, but not all."""
    assert service.post(f"{instance_id}/dormant", wait_s=0).json()["status"] != "dormant"
    client: Any = bucket._client

    def sent() -> bool:
        return any(
            len(client.list_parts(Bucket=bucket.name, Key=upload.key, UploadId=upload.id).get("Parts", [])) > 2
            for upload in bucket.list_uploads(instance_id)
        )

    wait_until(sent, what="some parts are sent")
    service.kill()
    assert [upload.key.split("/")[-1] for upload in bucket.list_uploads(instance_id)] == ["home.tar.zst"]
    assert list(bucket.list(instance_id)) == []


def names_in(bucket: Bucket, instance_id: str) -> list[str]:
    """Return what there is of an instance, uploads that are pending among it."""
    return [each.key.split("/")[-1] for each in (*bucket.list(instance_id), *bucket.list_uploads(instance_id))]


def test_killed_while_it_uploads_it_starts_anew_and_forgets_no_upload(service: Service, bucket: Bucket) -> None:
    instance_id, noise = create_large(service)
    kill_while_uploading(service, bucket, instance_id)
    service.start()
    service.wait_for(instance_id, "dormant", timeout_s=90)
    assert names_in(bucket, instance_id) == ["home.tar.zst", "manifest.json"]
    revived = service.post(f"{instance_id}/revive", method="full_restore").json()
    assert (revived["status"], revived["restored_by"]) == ("running", "full_restore")
    assert run(service, instance_id, "sha256sum < ~/noise") == noise
    assert service.delete(instance_id).status_code == 200
    assert names_in(bucket, instance_id) == []


def test_an_instance_that_is_deleted_after_the_kill_leaves_no_upload(service: Service, bucket: Bucket) -> None:
    instance_id, _ = create_large(service)
    kill_while_uploading(service, bucket, instance_id)
    service.start()
    assert service.delete(instance_id, force=True).status_code == 200
    wait_until(lambda: names_in(bucket, instance_id) == [], what="nothing of it is in the bucket")
    assert not [name for name in service.volumes() if instance_id in name]


def test_a_server_whose_disk_is_full_is_told_and_the_browser_runs_again(
    service: Service, server: S3Server, bucket: Bucket
) -> None:
    instance_id, noise = create_large(service)
    resize(server.root, f"{NOISE_MIB // 2}m")
    answer = service.post(f"{instance_id}/dormant")
    assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_failed"), answer.text
    for words in ("the instance goes on running", "s3://snapshots", "has no room left"):
        assert words in answer.json()["detail"]
    running = service.wait_for(instance_id, "running")
    assert "Free some space there" in running["error"]["message"]
    assert run(service, instance_id, "sha256sum < ~/noise") == noise
    wait_until(lambda: names_in(bucket, instance_id) == [], what="nothing of the attempt is left")
    assert not [name for name in service.volumes() if "-copy-" in name and instance_id in name]

    resize(server.root, "1g")
    slept = service.post(f"{instance_id}/dormant").json()
    assert (slept["status"], slept["error"]) == ("dormant", None)
    assert service.delete(instance_id).status_code == 200


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
