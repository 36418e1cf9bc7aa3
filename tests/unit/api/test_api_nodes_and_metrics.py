"""Health, nodes and metrics."""

from __future__ import annotations

import time
from collections.abc import Collection

import pytest
from fastapi.testclient import TestClient

from provisioner.lease import LEASE
from provisioner.ledger.records import NodeRecord, NodeStatus
from provisioner.ledger.samples import Sample, Scope, Usage
from stacks.spec import NodeSpec
from tests.unit.api.conftest import FakeServices


def test_health_counts_instances_and_nodes(services: FakeServices, client: TestClient) -> None:
    client.post("/v2/instances", json={})
    assert client.get("/health").json() == {
        "status": "healthy",
        "instances_count": 1,
        "running_instances": 0,
        "nodes_count": 1,
        "nodes_online": 1,
        "leader": None,
        "leading": True,
    }
    services.ledger.nodes.observe("local", values={"status": NodeStatus.OFFLINE})
    assert client.get("/health").json()["nodes_online"] == 0


def test_a_node_shows_its_heartbeat_and_its_instances(services: FakeServices, client: TestClient) -> None:
    client.post("/v2/instances", json={})
    services.ledger.nodes.observe("local", values={"cpu_percent": 12.0, "memory_percent": 34.0, "disk_percent": None})
    [node] = client.get("/v2/nodes").json()["nodes"]
    assert client.get("/v2/nodes/local").json() == node
    assert node["status"] == "online"
    assert (node["instances_count"], node["max_instances"]) == (1, 50)
    assert node["resources"] == {"cpu_percent": 12, "memory_percent": 34, "disk_percent": 0}
    assert node["last_heartbeat"] == "2023-11-14T22:13:20Z"


def test_to_show_an_instance_only_its_own_node_is_read(
    services: FakeServices, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = client.post("/v2/instances", json={}).json()["id"]
    services.ledger.nodes.sync([*services.cluster.nodes, NodeSpec(id="other", host="unix:///other")])
    read: list[str] = []
    read_nodes = services.ledger.nodes.list

    def note(node_ids: Collection[str] | None = None) -> list[NodeRecord]:
        found = read_nodes(node_ids)
        read.extend(node.id for node in found)
        return found

    monkeypatch.setattr(services.ledger.nodes, "list", note)
    assert client.get(f"/v2/instances/{instance_id}").json()["node_status"] == "online"
    assert read == ["local"]


def test_an_unknown_node_is_404(client: TestClient) -> None:
    assert client.get("/v2/nodes/nope").status_code == 404
    assert client.get("/v2/metrics?node_id=nope").status_code == 404


@pytest.mark.parametrize("period", ["1h", "24h", "7d"])
def test_metrics_are_lists_of_one_length(services: FakeServices, client: TestClient, period: str) -> None:
    usage = Usage(cpu_percent=10, memory_percent=20, disk_percent=30)
    services.ledger.samples.add([Sample(scope=Scope.NODE, subject="local", usage=usage)], at=time.time())
    found = client.get("/v2/metrics", params={"period": period, "node_id": "local"}).json()
    assert found["cluster"]["avg_cpu_percent"] == 10
    assert found["timeseries"]["cpu"] == [10]
    assert found["timeseries"]["memory"] == [20]
    [at] = found["timeseries"]["timestamps"]
    assert at.endswith("Z")


def test_another_period_is_400(client: TestClient) -> None:
    assert client.get("/v2/metrics?period=1y").status_code == 400


def test_prometheus_finds_instances_and_nodes(client: TestClient) -> None:
    client.post("/v2/instances", json={})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'machineuse_instances{status="creating"} 1.0' in answer.text
    assert 'machineuse_node_online{node="local"} 1.0' in answer.text


def test_who_leads_is_told(services: FakeServices, client: TestClient) -> None:
    assert client.get("/health").json()["leader"] is None
    services.ledger.leases.take(LEASE, holder="somewhere|7|m|1", duration_s=60)
    health = client.get("/health").json()
    assert (health["leader"], health["leading"]) == ("somewhere:7", True)
    assert "machineuse_leading 1.0" in client.get("/metrics").text
