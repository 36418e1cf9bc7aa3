"""Lives of instances whose snapshots are encrypted and kept in a bucket of a real S3 server, through the API."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.object_storage import Bucket
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.location import parse_s3_url
from tests.conftest import StartService
from tests.support.browsing import new_page
from tests.support.containers import execute
from tests.support.engines import Engine
from tests.support.s3_server import S3Server, s3_server
from tests.support.service import COMMAND, Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
PAGE = "http://visit.test/"
SECRET = "very-secret-and-in-the-profile"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    """Make a key file as an operator does."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made = subprocess.run(
        [str(COMMAND), "snapshots", "new-key"],
        env=os.environ | {"MACHINEUSE_SNAPSHOT_KEYS": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "without it they are lost" in made.stdout
    assert path.stat().st_mode & 0o777 == 0o600
    return KeyFile(path)


def visit(service: Service, instance_id: str, script: str) -> object:
    with new_page(service.get(instance_id)) as page:
        page.route(f"{PAGE}**", lambda route: route.fulfill(body="<p>visit", content_type="text/html"))
        page.goto(PAGE)
        return page.evaluate(script)


def test_a_profile_comes_back_from_a_bucket_that_can_not_read_it(
    start_service: StartService, server: S3Server, keys: KeyFile
) -> None:
    service = start_service(
        snapshot_store=server.url("deep/store"), snapshot_keys=str(keys.path), snapshot_encrypted_only="true"
    )
    instance_id = service.create(config=SMALL)["id"]
    visit(service, instance_id, f"localStorage.setItem('visit', '{SECRET}')")
    execute(service.container(instance_id), "sh", "-c", f"echo {SECRET} > /home/machine/{SECRET}")

    assert service.post(f"{instance_id}/dormant").json()["status"] == "dormant"

    stored = {key: (server.root / "objects" / server.BUCKET / key).read_bytes() for key in server.objects()}
    assert {Path(key).name for key in stored} >= {"home.tar.zst", "manifest.json"}
    assert not any(SECRET.encode() in data or b"ustar" in data for data in stored.values())
    (first,) = keys.load().ids
    (manifest,) = (json.loads(data) for key, data in stored.items() if key.endswith("manifest.json"))
    assert manifest["encryption"]["key_id"] == first

    # What an operator does meanwhile: look after the stack, rotate the key, and try to drop one that is needed.
    refreshed = service.pulumi("refresh", "--yes", "--skip-preview", "--stack", service.cluster)
    assert refreshed.returncode == 0, refreshed.stdout + refreshed.stderr
    assert "encrypted" not in refreshed.stdout
    assert service.machineuse("snapshots", "rotate-key").returncode == 0
    assert keys.load().ids[0] == first != keys.load().primary_id
    refused = service.machineuse("snapshots", "drop-key", str(first))
    assert f"Key {first} is still needed for 1 snapshot(s), {instance_id}/" in refused.stderr

    # Without its key it is neither lost nor damaged: it sleeps on, says what is missing, and wakes once that is back.
    away = keys.path.rename(keys.path.with_name("away"))
    unread = service.post(f"{instance_id}/revive", method="full_restore")
    assert (unread.status_code, unread.json()["code"]) == (409, "snapshot_key_missing"), unread.text
    assert f"key file {keys.path} can't be read" in unread.json()["detail"]
    wait_until(lambda: service.get(instance_id)["operation"] is None, what="it has settled")
    assert service.get(instance_id)["status"] == "dormant"
    away.rename(keys.path)

    service.stop()
    service.start()
    revived = service.post(f"{instance_id}/revive", method="full_restore")
    assert revived.status_code == 200, revived.text
    assert visit(service, instance_id, "localStorage.getItem('visit')") == SECRET
    assert execute(service.container(instance_id), "cat", f"/home/machine/{SECRET}").strip() == SECRET

    assert service.delete(instance_id).status_code == 200
    bucket = Bucket(parse_s3_url(server.url()))
    assert [each.key for each in (*bucket.list(""), *bucket.list_uploads(""))] == []
    assert service.machineuse("snapshots", "drop-key", str(first)).returncode == 0
    listed = service.machineuse("snapshots", "keys").stdout
    assert listed == f"{keys.load().primary_id} (encrypts new snapshots)\n"


def test_sleepers_wake_from_the_bucket_while_their_node_is_lost_and_after_it_was_removed(
    start_service: StartService, server: S3Server, keys: KeyFile
) -> None:
    with Engine() as lost, Engine() as other:
        service = start_service(
            nodes=[lost.node("a"), other.node("b")],
            snapshot_store=server.url("lost"),
            snapshot_keys=str(keys.path),
            heartbeat_s=0.5,
            node_timeout_s=2,
            offline_after_misses=2,
        )
        sleepers = [service.create(config=SMALL, node_preference="a")["id"] for _ in range(2)]
        for instance_id in sleepers:
            container = lost.client().containers.get(service.container_name(instance_id))
            execute(container, "sh", "-c", f"echo {instance_id} > /home/machine/note")
            execute(container, "sh", "-c", f"echo {instance_id} > /opt/changed", user="0")
            assert service.post(f"{instance_id}/dormant").json()["status"] == "dormant"
        lost.kill()
        service.wait_for_node("a", "offline")

        for instance_id in sleepers:
            woken = service.post(f"{instance_id}/revive", method="quick_start").json()
            assert (woken["status"], woken["node_id"], woken["restored_by"]) == ("running", "b", "full_restore"), woken
            assert "no copy" in woken["restore_note"]
            events = service.events_of(instance_id)
            assert any(woken["restore_note"] in each["message"] for each in events if each["kind"] == "restored")
            container = other.client().containers.get(service.container_name(instance_id))
            for path in ("/home/machine/note", "/opt/changed"):
                assert execute(container, "cat", path).strip() == instance_id
            service.write_cluster_file([other.node("b")])  # the next one's node is not even in the file
            wait_until(
                lambda: [node["id"] for node in service.http.get("/v2/nodes").json()["nodes"]] == ["b"],
                what="the node is gone for good",
            )
        for instance_id in sleepers:
            assert service.delete(instance_id).status_code == 200
        bucket = Bucket(parse_s3_url(server.url()))
        assert [each.key for each in (*bucket.list("lost/"), *bucket.list_uploads("lost/"))] == []
