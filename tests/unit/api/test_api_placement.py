"""Where an instance goes, as callers ask for it and are told of it."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.errors import NoCapacity
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeStatus
from provisioner.service import CreateRequest, InstanceService
from provisioner.settings import Settings
from stacks.spec import DEFAULT_IMAGE, Availability, ClusterSpec, NodeSpec, PortRange
from tests.support.watched import wait_until
from tests.unit.api.conftest import GIB, FakeCatalogue, FakeServices

Json = dict[str, Any]
TINY = CreateRequest(
    image=DEFAULT_IMAGE, memory_gb=0.0625, cpu_cores=1, disk_gb=1, idle_timeout_minutes=0, auto_snapshot=False
)
PAIR = ("one service", "another")
TIGHT = (NodeSpec(id="a", max_instances=12), NodeSpec(id="b", ports=PortRange(first=21000, last=21015)))


def build_cluster(services: FakeServices, *nodes: NodeSpec) -> None:
    """Make these the cluster's nodes, all of them online."""
    services.cluster.replace(ClusterSpec(name="test", nodes=nodes))
    services.ledger.nodes.sync(nodes)
    for node in nodes:
        engine = {"arch": "amd64"} | node.labels
        seen = {"status": NodeStatus.ONLINE, "cpu_cores": 4.0, "memory_bytes": GIB, "labels": engine}
        services.ledger.nodes.observe(node.id, values=seen)


@pytest.fixture
def client(services: FakeServices) -> TestClient:
    build_cluster(services, NodeSpec(id="a", labels={"zone": "1"}), NodeSpec(id="b", labels={"zone": "2"}))
    return services.client()


def create(client: TestClient, **body: Any) -> Json:
    answer = client.post("/v2/instances", json=body)
    assert answer.status_code == 201, answer.text
    created: Json = answer.json()
    return created


def sleep(services: FakeServices, instance_id: str) -> None:
    """Make an instance dormant, as if the converger had been at work."""
    steps = (
        lambda r: lifecycle.note_created(r, generation=r.generation, restored_by=None, restore_note=None),
        lambda r: lifecycle.note_ready(r, generation=r.generation),
        lambda r: lifecycle.wish_dormant(r, reason="test"),
        lambda r: lifecycle.note_snapshot(r, generation=r.generation, size_bytes=1, keep=1),
        lambda r: lifecycle.note_dormant(r, generation=r.generation),
    )
    for step in steps:
        services.ledger.instances.change(instance_id, lambda r, _, step=step: step(r))


def events(client: TestClient, instance_id: str) -> str:
    return " | ".join(event["message"] for event in client.get(f"/v2/instances/{instance_id}/events").json())


def test_labels_choose_the_node_and_are_shown(client: TestClient) -> None:
    created = create(client, node_labels={"zone": "2", "arch": "amd64"})
    assert created["node_id"] == "b"
    assert created["node_labels"] == {"zone": "2", "arch": "amd64"}
    assert create(client)["node_labels"] == {}


def test_labels_that_no_node_has_are_503_with_their_name(client: TestClient) -> None:
    answer = client.post("/v2/instances", json={"node_labels": {"gpu": "yes"}})
    assert (answer.status_code, answer.json()["code"]) == (503, "insufficient_resources")
    assert "node a: not labelled gpu=yes" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    "asked",
    [
        {"": "x"},
        {"a b": "x"},
        {"a": "x\n"},
        {"a": 1},
        {"a": "x" * 64},
        {f"k{n}": "v" for n in range(17)},
        [],
        None,
        "a=b",
    ],
)
def test_labels_that_are_none_are_400(client: TestClient, asked: object) -> None:
    answer = client.post("/v2/instances", json={"node_labels": asked})
    assert answer.status_code == 400
    assert "node_labels" in answer.json()["detail"]


def test_a_preference_that_does_not_fit_is_told_of_in_the_events(services: FakeServices, client: TestClient) -> None:
    services.ledger.nodes.observe("a", values={"status": NodeStatus.OFFLINE})
    created = create(client, node_preference="a")
    assert created["node_id"] == "b"
    assert "on node b (node a, which is preferred: offline)" in events(client, created["id"])


def test_a_node_that_another_service_knows_to_be_closed_gets_nothing(
    services: FakeServices, client: TestClient
) -> None:
    a, b = services.cluster.nodes
    services.ledger.nodes.sync([a.model_copy(update={"availability": Availability.CORDONED}), b])
    assert {create(client)["node_id"] for _ in range(4)} == {"b"}
    answer = client.post("/v2/instances", json={"node_preference": "a", "node_strict": True})
    assert (answer.status_code, "node a: cordoned" in answer.json()["detail"]) == (503, True)


def test_a_strict_preference_that_does_not_fit_is_503(client: TestClient) -> None:
    small = {"config": {"memory_gb": 75}, "node_preference": "a", "node_strict": True}
    assert create(client, **small)["node_id"] == "a"
    answer = client.post("/v2/instances", json=small)
    assert answer.status_code == 503
    assert "Node a has no room now" in answer.json()["detail"]


def test_strict_without_a_preference_is_400(client: TestClient) -> None:
    answer = client.post("/v2/instances", json={"node_strict": True})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert "node_preference" in answer.json()["detail"]


def test_a_revive_goes_to_the_node_with_the_copy_while_that_takes_it(
    services: FakeServices, client: TestClient
) -> None:
    created = create(client, node_preference="b")
    sleep(services, created["id"])
    create(client, node_preference="b")  # now the other one is emptier
    answer = client.post(f"/v2/instances/{created['id']}/revive")
    assert (answer.status_code, answer.json()["node_id"]) == (200, "b")

    other = create(client, node_preference="a")
    sleep(services, other["id"])
    spec = services.cluster.spec
    closed = [n.model_copy(update={"availability": Availability.CORDONED}) if n.id == "a" else n for n in spec.nodes]
    services.cluster.replace(spec.model_copy(update={"nodes": tuple(closed)}))
    assert client.post(f"/v2/instances/{other['id']}/revive").json()["node_id"] == "b"
    assert "on node b (node a, which has its copy: cordoned)" in events(client, other["id"])


def test_a_revive_may_ask_for_a_node_too(services: FakeServices, client: TestClient) -> None:
    created = create(client, node_preference="a")
    sleep(services, created["id"])
    path = f"/v2/instances/{created['id']}/revive"
    assert client.post(path, json={"node_preference": "x"}).status_code == 400
    assert client.post(path, json={"node_strict": True}).status_code == 400
    services.ledger.nodes.observe("b", values={"status": NodeStatus.OFFLINE})
    refused = client.post(path, json={"node_preference": "b", "node_strict": True})
    assert refused.status_code == 503
    assert "node b: offline" in refused.json()["detail"]
    assert client.get(f"/v2/instances/{created['id']}").json()["status"] == "dormant"
    services.ledger.nodes.observe("b", values={"status": NodeStatus.ONLINE, "disk_quota": True})
    revived = client.post(path, json={"node_preference": "b"}).json()
    assert (revived["node_id"], revived["disk_enforced"]) == ("b", True)


def test_a_revive_asks_for_the_labels_again(services: FakeServices, client: TestClient) -> None:
    created = create(client, node_labels={"zone": "1"})
    sleep(services, created["id"])
    services.ledger.nodes.observe("a", values={"status": NodeStatus.OFFLINE})
    refused = client.post(f"/v2/instances/{created['id']}/revive")
    assert refused.status_code == 503
    assert "node a: offline; node b: not labelled zone=1" in refused.json()["detail"]


def test_a_node_shows_what_it_is_and_what_it_promised(services: FakeServices, client: TestClient) -> None:
    services.ledger.nodes.observe("a", values={"disk_bytes": 20 * GIB})
    create(client, node_preference="a", config={"memory_gb": 0.5, "cpu_cores": 2, "disk_gb": 1.5})
    node = client.get("/v2/nodes/a").json()
    assert node["labels"] == {"zone": "1", "arch": "amd64"}
    assert node["availability"] == "active"
    assert node["reserved"] == {"memory_gb": 0.5, "cpu_cores": 2, "disk_gb": 1.5}
    assert node["reservable"] == {"memory_gb": 100, "cpu_cores": 64, "disk_gb": 80}
    services.ledger.nodes.observe("b", values={"memory_bytes": None})
    assert client.get("/v2/nodes/b").json()["reservable"] is None


def place_many(location: Path | SecretStr, *, name: str, count: int) -> list[str]:
    """Create instances one after the other, as a service on this ledger does; return their nodes, or "none".

    Begins when both services are there.
    """
    ledger = Ledger.open(location)
    spec = ClusterSpec(name="test", nodes=TIGHT)
    service = InstanceService(
        ledger,
        cluster=Cluster(spec),
        settings=Settings(),
        catalogue=FakeCatalogue(),  # type: ignore[arg-type]
        changes=Changes(),
        port_free=lambda *_: True,
    )
    ledger.write_fact(name, "ready")
    wait_until(lambda: all(ledger.fact(each) for each in PAIR), what="the other one is there")
    found = []
    for _ in range(count):
        try:
            found.append(service.create(TINY).node_id)
        except NoCapacity:
            found.append("none")
    ledger.close()
    return found


def test_services_of_the_same_moment_never_give_one_place_or_port_twice(services: FakeServices) -> None:
    build_cluster(services, *TIGHT)
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        both = [pool.submit(place_many, services.ledger.location, name=name, count=20) for name in PAIR]
        found = Counter(node_id for one in both for node_id in one.result(timeout=60))
    assert found == {"a": 12, "b": 8, "none": 20}
    ports = [(r.node_id, port) for r in services.ledger.instances.all() for port in (r.debug_port, r.stream_port)]
    assert len(set(ports)) == len(ports) == 40


def test_callers_of_the_same_moment_never_get_one_place_or_port_twice(services: FakeServices) -> None:
    few = PortRange(first=21000, last=21005)
    build_cluster(services, NodeSpec(id="a", max_instances=2), NodeSpec(id="b", ports=few))

    def create_one(_: int) -> str:
        try:
            return services.instances.create(TINY).node_id
        except NoCapacity:
            return "none"

    with ThreadPoolExecutor(max_workers=12) as pool:
        found = Counter(pool.map(create_one, range(12)))
    assert found == {"a": 2, "b": 3, "none": 7}
    ports = [(r.node_id, port) for r in services.ledger.instances.all() for port in (r.debug_port, r.stream_port)]
    assert len(set(ports)) == len(ports) == 10
