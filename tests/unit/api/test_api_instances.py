"""What the instance routes answer, over a real ledger in which the test plays the converger."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient

from provisioner import lifecycle
from provisioner.errors import DockerError, LedgerUnavailable, SnapshotFailed
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.ledger.samples import Sample, Scope, Usage
from stacks.spec import NodeSpec
from tests.unit.api.conftest import FakeServices, ServicesMaker

Json = dict[str, Any]


def create(client: TestClient, **body: Any) -> Json:
    answer = client.post("/v2/instances", json=body)
    assert answer.status_code == 201, answer.text
    created: Json = answer.json()
    return created


def note(services: FakeServices, instance_id: str, *updates: Any) -> InstanceRecord:
    """Write what became of an instance, as the converger does."""
    record = services.ledger.instances.get(instance_id)
    for update in updates:

        def decide(current: InstanceRecord, _: object, update: Any = update) -> Update | None:
            made: Update | None = update(current)
            return made

        record = services.ledger.instances.change(instance_id, decide) or record
    services.changes.notify(instance_id)
    return record


def run_it(services: FakeServices, instance_id: str) -> InstanceRecord:
    return note(
        services,
        instance_id,
        lambda r: lifecycle.note_created(r, generation=r.generation, restored_by=None, restore_note=None),
        lambda r: lifecycle.note_ready(r, generation=r.generation),
    )


def put_to_sleep(services: FakeServices, client: TestClient, instance_id: str) -> None:
    assert client.post(f"/v2/instances/{instance_id}/dormant").status_code == 200
    note(
        services,
        instance_id,
        lambda r: lifecycle.note_snapshot(r, generation=r.generation, size_bytes=77, keep=1),
        lambda r: lifecycle.note_dormant(r, generation=r.generation),
    )


def test_a_ledger_that_goes_away_after_a_create_does_not_hide_what_was_made(
    client: TestClient, services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LedgerUnavailable("The ledger's database does not answer.")

    for table, reading in ((services.ledger.instances, "find"), (services.ledger.samples, "latest")):
        with monkeypatch.context() as patch:
            patch.setattr(table, reading, fail)
            answer = client.post("/v2/instances", json={})
        assert (answer.status_code, answer.json()["code"]) == (503, "ledger_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        newest = services.ledger.instances.all()[-1]
        assert f"Instance {newest.id} was created" in answer.json()["detail"]


def test_an_empty_request_creates_an_instance_with_the_contracts_defaults(client: TestClient) -> None:
    answer = client.post("/v2/instances", json={})
    created = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v2/instances/{created['id']}"
    assert created["status"] == "creating"
    assert created["operation"] == "creating"
    assert created["config"] == {
        "memory_gb": 2,
        "cpu_cores": 2,
        "disk_gb": 10,
        "idle_timeout_minutes": 30,
        "auto_snapshot": True,
    }
    assert created["image_requested"] == "ubuntu:22.04"
    assert created["image"] == "machineuse/browser:latest"
    assert created["subdomain"] == created["id"]
    assert created["urls"] == {
        "debug": f"http://localhost:{created['debug_port']}",
        "stream": f"http://localhost:{created['stream_port']}/",
    }
    assert datetime.fromisoformat(created["created_at"]).utcoffset() is not None
    assert client.get(answer.headers["location"]).json() == created


def test_all_fields_of_a_request_are_kept(client: TestClient) -> None:
    config = {
        "memory_gb": 0.5,
        "cpu_cores": 3,
        "disk_gb": 1.5,
        "idle_timeout_minutes": 0,
        "auto_snapshot": False,
    }
    created = create(client, image="plain:1", config=config, node_preference="local")
    assert created["config"] == config
    assert created["image_requested"] == "plain:1"
    assert created["node_id"] == "local"


def test_an_image_without_a_browser_has_neither_ports_nor_urls(client: TestClient) -> None:
    created = create(client, image="plain:1")
    assert created["debug_port"] is None
    assert created["stream_port"] is None
    assert created["urls"] == {"debug": None, "stream": None}


def test_urls_name_the_public_address(make_services: ServicesMaker) -> None:
    created = create(make_services(public_address="2001:db8::1").client())
    assert created["urls"]["debug"] == f"http://[2001:db8::1]:{created['debug_port']}"


def test_urls_name_the_address_that_a_node_has_of_its_own(make_services: ServicesMaker) -> None:
    services = make_services(public_address="browsers.example")
    services.ledger.nodes.sync([NodeSpec(id="local", address="10.0.0.2")])
    created = create(services.client())
    assert created["urls"]["debug"] == f"http://10.0.0.2:{created['debug_port']}"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"image": "nope"}, "unknown_image", "nope"),
        ({"node_preference": "nope"}, "unknown_node", "nope"),
        ({"config": {"memory_gb": 900_000}}, "invalid_request", "config.memory_gb"),
        ({"config": {"cpu_cores": 4000}}, "invalid_request", "config.cpu_cores"),
    ],
)
def test_what_can_never_be_had_is_400(client: TestClient, body: Json, code: str, said: str) -> None:
    answer = client.post("/v2/instances", json=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == code
    assert said in answer.json()["detail"]


def test_no_room_now_is_503_with_retry_after(make_services: ServicesMaker) -> None:
    client = make_services(max_instances=1).client()
    create(client)
    answer = client.post("/v2/instances", json={})
    assert answer.status_code == 503
    assert answer.json()["code"] == "insufficient_resources"
    assert answer.json()["resolution"]
    assert int(answer.headers["retry-after"]) > 0


def test_a_create_that_failed_answers_with_its_error(services: FakeServices, client: TestClient) -> None:
    created = create(client)
    error = DockerError("It does not start.", detail="secret path", resolution="Try another image.")
    note(services, created["id"], lambda r: lifecycle.note_failed(r, generation=r.generation, error=error))
    failed = client.get(f"/v2/instances/{created['id']}").json()
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "docker_error", "message": "It does not start. Try another image."}


def in_background(call: Any) -> Future[Any]:
    """Start a call that waits; its thread ends with the call."""
    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def wait_for_instance(services: FakeServices) -> InstanceRecord:
    for _ in range(500):
        found = services.ledger.instances.all()
        if found:
            return found[0]
        threading.Event().wait(0.01)
    raise AssertionError("no instance was created")


def test_a_call_waits_for_its_outcome(services: FakeServices, client: TestClient) -> None:
    answer = in_background(lambda: client.post("/v2/instances", json={}, headers={"Prefer": "wait=30"}))
    record = wait_for_instance(services)
    run_it(services, record.id)
    assert answer.result(timeout=20).json()["status"] == "running"
    assert answer.result().headers["preference-applied"] == "wait=30"


def test_a_service_that_stops_lets_nobody_wait(services: FakeServices, client: TestClient) -> None:
    answer = in_background(lambda: client.post("/v2/instances", json={}, headers={"Prefer": "wait=300"}))
    wait_for_instance(services)
    client.app.state.stopping.set()  # type: ignore[attr-defined]
    assert answer.result(timeout=20).json()["status"] == "creating"


def test_a_running_instance_shows_its_newest_sample(services: FakeServices, client: TestClient) -> None:
    instance_id = create(client)["id"]
    record = run_it(services, instance_id)
    usage = Usage(cpu_percent=12.5, memory_percent=50, disk_percent=3)
    services.ledger.samples.add(
        [Sample(scope=Scope.INSTANCE, subject=instance_id, usage=usage)], at=record.last_active_at
    )
    shown = client.get(f"/v2/instances/{instance_id}").json()
    assert shown["resources"] == {"cpu_percent": 12.5, "memory_percent": 50, "disk_percent": 3}


def test_dormant_and_revive_keep_the_id_and_show_the_snapshot(services: FakeServices, client: TestClient) -> None:
    instance_id = create(client)["id"]
    run_it(services, instance_id)
    put_to_sleep(services, client, instance_id)
    dormant = client.get(f"/v2/instances/{instance_id}").json()
    assert dormant["status"] == "dormant"
    assert dormant["debug_port"] is None
    assert dormant["urls"] == {"debug": None, "stream": None}
    assert dormant["resources"] == {"cpu_percent": 0, "memory_percent": 0, "disk_percent": 0}
    [snapshot] = dormant["snapshots"]
    assert (snapshot["state"], snapshot["bytes"]) == ("verified", 77)

    answer = client.post(f"/v2/instances/{instance_id}/revive", json={"method": "full_restore"})
    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["operation"]) == ("creating", "reviving")
    record = services.ledger.instances.get(instance_id)
    assert record.restore_method == "full_restore"


@pytest.mark.parametrize("request_", [{}, {"json": {}}, {"content": b""}, {"json": None}])
def test_revive_takes_quick_start_unless_told_otherwise(
    services: FakeServices, client: TestClient, request_: Json
) -> None:
    instance_id = create(client)["id"]
    run_it(services, instance_id)
    put_to_sleep(services, client, instance_id)
    assert client.post(f"/v2/instances/{instance_id}/revive", **request_).status_code == 200
    assert services.ledger.instances.get(instance_id).restore_method == "quick_start"


def test_a_snapshot_that_fails_is_409_and_the_instance_runs_on(services: FakeServices, client: TestClient) -> None:
    instance_id = create(client)["id"]
    run_it(services, instance_id)
    answer = in_background(lambda: client.post(f"/v2/instances/{instance_id}/dormant", headers={"Prefer": "wait=30"}))
    for _ in range(500):
        if services.ledger.instances.get(instance_id).operation == "making_dormant":
            break
        threading.Event().wait(0.01)
    error = SnapshotFailed("The disk is full.")
    note(services, instance_id, lambda r: lifecycle.note_sleep_failed(r, generation=r.generation, error=error))
    assert answer.result(timeout=20).status_code == 409
    assert answer.result().json() == {"detail": "The disk is full.", "code": "snapshot_failed"}
    shown = client.get(f"/v2/instances/{instance_id}").json()
    assert shown["status"] == "running"
    assert shown["error"]["code"] == "snapshot_failed"


@pytest.mark.parametrize("verb", ["dormant", "revive"])
def test_a_verb_that_the_state_does_not_allow_is_409(client: TestClient, verb: str) -> None:
    instance_id = create(client)["id"]
    answer = client.post(f"/v2/instances/{instance_id}/{verb}")
    assert answer.status_code == 409
    assert answer.json()["code"] == "conflict"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("POST", "/dormant"), ("POST", "/revive"), ("GET", "/events")],
)
@pytest.mark.parametrize("instance_id", ["mu-none", "%00", "x" * 5000, "%FF", "ä"])
def test_an_unknown_instance_is_404(client: TestClient, method: str, path: str, instance_id: str) -> None:
    answer = client.request(method, f"/v2/instances/{instance_id}{path}")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_delete_says_whether_it_is_done(services: FakeServices, client: TestClient) -> None:
    instance_id = create(client)["id"]
    answer = client.delete(f"/v2/instances/{instance_id}")
    assert answer.json() == {"message": f"Instance {instance_id} is being deleted."}
    assert client.get(f"/v2/instances/{instance_id}").json()["operation"] == "deleting"

    second = in_background(lambda: client.delete(f"/v2/instances/{instance_id}", headers={"Prefer": "wait=30"}))
    note(services, instance_id, lifecycle.note_gone)
    assert second.result(timeout=20).status_code in (200, 404)  # 404 where it was gone before the call came in
    assert client.get(f"/v2/instances/{instance_id}").status_code == 404


@pytest.mark.parametrize(("given", "force"), [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_force_is_true_or_false(services: FakeServices, client: TestClient, given: str, force: bool) -> None:
    instance_id = create(client)["id"]
    assert client.delete(f"/v2/instances/{instance_id}", params={"force": given}).status_code == 200
    assert services.ledger.instances.get(instance_id).force is force


def test_lists_are_pages_in_a_stable_order(client: TestClient) -> None:
    ids = [create(client)["id"] for _ in range(5)]
    assert [one["id"] for one in client.get("/v2/instances").json()["instances"]] == ids
    page = client.get("/v2/instances", params={"limit": 2, "offset": 3}).json()
    assert [one["id"] for one in page["instances"]] == ids[3:]
    assert (page["total"], page["limit"], page["offset"]) == (5, 2, 3)
    assert client.get("/v2/instances", params={"offset": 2**63 - 1}).json()["instances"] == []


def test_lists_can_be_narrowed_by_status_and_node(services: FakeServices, client: TestClient) -> None:
    ids = [create(client)["id"] for _ in range(2)]
    run_it(services, ids[1])
    assert [i["id"] for i in client.get("/v2/instances?status=running").json()["instances"]] == ids[1:]
    assert client.get("/v2/instances?node_id=local").json()["total"] == 2
    assert client.get("/v2/instances?node_id=elsewhere").json()["total"] == 0


def test_instances_of_a_node_that_is_away_say_so(services: FakeServices, client: TestClient) -> None:
    created = create(client)
    assert created["node_status"] == "online"
    services.ledger.nodes.observe("local", values={"status": NodeStatus.OFFLINE})
    assert client.get(f"/v2/instances/{created['id']}").json()["node_status"] == "offline"


def test_events_are_told_newest_last(services: FakeServices, client: TestClient) -> None:
    instance_id = create(client)["id"]
    run_it(services, instance_id)
    path = f"/v2/instances/{instance_id}/events"
    assert [event["kind"] for event in client.get(path).json()] == ["create", "created", "ready"]
    assert [event["kind"] for event in client.get(path, params={"limit": 1}).json()] == ["ready"]
