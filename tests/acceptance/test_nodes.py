"""Nodes tell how they are; one whose engine does not answer is offline, harms nobody, and comes back by itself.

The engine is behind a socket of the test's own, which can be frozen or taken away: others need the real one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import psutil
import pytest

from tests.support.containers import execute
from tests.support.engine_proxy import EngineProxy
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProxy]:
    with EngineProxy() as proxy:
        yield proxy


def settings_for(engine: EngineProxy) -> dict[str, Any]:
    return {
        "node": {"host": engine.url, "labels": {"zone": "b"}},
        "heartbeat_s": 0.3,
        "node_timeout_s": 2,
        "offline_after_misses": 2,
    }


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service], engine: EngineProxy) -> Service:
    return start_service(**settings_for(engine))


@pytest.fixture(scope="module")
def instance(service: Service) -> dict[str, Any]:
    return service.create(config=SMALL)


@pytest.fixture(autouse=True)
def _engine_back(service: Service, engine: EngineProxy) -> Iterator[None]:
    yield
    engine.restore()
    service.wait_for_node("local", "online")


def traces_of(service: Service, instance_id: str) -> list[str]:
    """Return what Docker has of an instance."""
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    containers = service.docker.api.containers(all=True, filters=mine)
    images = service.docker.api.images(filters=mine)
    names = [name for found in containers for name in found["Names"]]
    names += [tag for found in images for tag in found["RepoTags"] or []]
    names += service.volumes()
    return [name for name in names if instance_id in name]


def test_a_node_tells_what_it_has_and_how_much_of_it_is_used(service: Service, instance: dict[str, Any]) -> None:
    nodes = service.http.get("/v2/nodes").json()["nodes"]
    assert [node["id"] for node in nodes] == ["local"]
    node = service.node()
    assert node["status"] == "online"
    assert node["error"] is None
    assert (node["instances_count"], node["max_instances"]) == (1, 50)
    assert node["cpu_cores"] == psutil.cpu_count()
    assert node["memory_bytes"] == psutil.virtual_memory().total
    disk = shutil.disk_usage(service.docker.info()["DockerRootDir"])
    assert node["disk_bytes"] == disk.total
    used = node["resources"]
    assert used["disk_percent"] == pytest.approx(100 * disk.used / disk.total, abs=5)
    assert 0 < used["memory_percent"] <= 100
    assert 0 <= used["cpu_percent"] <= 100
    wait_until(lambda: service.node()["resources"]["cpu_percent"] > 0, what="the CPU is seen at work")
    assert service.http.get("/v2/nodes/nowhere").status_code == 404
    assert instance["node_status"] == "online"


def test_an_instance_goes_to_a_node_with_the_labels_that_it_asks_for(service: Service) -> None:
    engine = service.docker.info()
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(engine["Architecture"], engine["Architecture"])
    node = service.node()
    assert node["labels"] == {"zone": "b", "arch": arch, "os": engine["OSType"]}
    before = node["reserved"]

    asked = {"zone": "b", "arch": arch}
    created = service.create(config=SMALL, node_labels=asked, node_preference="local", node_strict=True)
    assert (created["status"], created["node_id"], created["node_labels"]) == ("running", "local", asked)
    reserved = service.node()["reserved"]
    assert reserved["memory_gb"] - before["memory_gb"] == SMALL["memory_gb"]
    assert service.delete(created["id"]).status_code == 200
    assert service.node()["reserved"] == before

    refused = service.http.post("/v2/instances", json={"config": SMALL, "node_labels": {"zone": "b", "gpu": "yes"}})
    assert refused.status_code == 503
    assert "node local: not labelled gpu=yes" in refused.json()["detail"]


def test_heartbeats_follow_each_other(service: Service) -> None:
    def last() -> datetime:
        return datetime.fromisoformat(service.node()["last_heartbeat"])

    first = last()
    second = wait_until(lambda: last() if last() > first else None, what="a second heartbeat")
    wait_until(lambda: last() > second, what="a third heartbeat")


@pytest.mark.parametrize("how", ["freeze", "refuse"])
def test_a_node_that_does_not_answer_is_offline_and_comes_back_by_itself(
    service: Service, engine: EngineProxy, instance: dict[str, Any], how: str
) -> None:
    started_at = service.container(instance["id"]).attrs["State"]["StartedAt"]
    getattr(engine, how)()
    gone = service.wait_for_node("local", "offline")
    assert "does not answer" in gone["error"]
    assert gone["last_heartbeat"] is not None
    assert gone["resources"] == {"cpu_percent": 0, "memory_percent": 0, "disk_percent": 0}
    # What it knew last stays: the time of the last heartbeat, and what its instances were.
    assert service.node()["last_heartbeat"] == gone["last_heartbeat"]
    shown = service.get(instance["id"])
    assert (shown["node_status"], shown["status"]) == ("offline", "running")
    assert service.http.get("/health").json()["nodes_online"] == 0

    engine.restore()
    back = service.wait_for_node("local", "online")
    assert back["error"] is None
    assert datetime.fromisoformat(back["last_heartbeat"]) > datetime.fromisoformat(gone["last_heartbeat"])
    shown = service.get(instance["id"])
    assert (shown["node_status"], shown["status"]) == ("online", "running")
    assert service.container(instance["id"]).attrs["State"]["StartedAt"] == started_at


def test_while_its_only_node_is_offline_a_create_is_refused_and_says_so(service: Service, engine: EngineProxy) -> None:
    engine.freeze()
    service.wait_for_node("local", "offline")
    for image in ("ubuntu:22.04", "an-image-that-nobody-asked-for-yet"):
        answer = service.http.post("/v2/instances", json={"image": image, "config": SMALL})
        assert answer.status_code == 503, answer.text
        assert answer.json()["code"] == "insufficient_resources"
        assert "node local: offline" in answer.json()["detail"]
        assert int(answer.headers["Retry-After"]) > 0
    strict = service.http.post("/v2/instances", json={"node_preference": "local", "node_strict": True})
    assert strict.status_code == 503
    assert "Node local has no room now (node local: offline)" in strict.json()["detail"]
    unknown = service.http.post("/v2/instances", json={"node_preference": "nowhere"})
    assert (unknown.status_code, unknown.json()["code"]) == (400, "unknown_node")


def test_an_instance_whose_node_is_away_can_not_go_dormant_and_loses_nothing(
    service: Service, engine: EngineProxy, instance: dict[str, Any]
) -> None:
    execute(service.container(instance["id"]), "sh", "-c", "echo kept > /home/machine/note")
    engine.freeze()
    service.wait_for_node("local", "offline")
    answer = service.post(f"{instance['id']}/dormant")
    assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_failed")
    assert "does not answer" in answer.json()["detail"]

    engine.restore()
    service.wait_for_node("local", "online")
    shown = service.get(instance["id"])
    assert (shown["status"], shown["operation"], shown["error"]) == ("running", None, None)
    assert execute(service.container(instance["id"]), "cat", "/home/machine/note") == "kept\n"


def test_a_forced_delete_does_not_wait_for_its_node_and_what_is_left_there_is_removed_later(
    service: Service, engine: EngineProxy
) -> None:
    doomed = service.create(config=SMALL)["id"]
    engine.refuse()
    assert_deleted_and_cleaned_up(service, engine, doomed)


def test_a_forced_delete_leaves_nothing_of_a_revived_instance_either(
    service: Service, engine: EngineProxy, instance: dict[str, Any]
) -> None:
    # It has everything that an instance can leave: container, volume, copy, and an image that was built for it.
    execute(service.container(instance["id"]), "touch", "/opt/changed", user="0")
    assert service.post(f"{instance['id']}/dormant").status_code == 200
    assert service.post(f"{instance['id']}/revive").json()["status"] == "running"
    assert len(traces_of(service, instance["id"])) == 4
    engine.freeze()
    assert_deleted_and_cleaned_up(service, engine, instance["id"])


def assert_deleted_and_cleaned_up(service: Service, engine: EngineProxy, instance_id: str) -> None:
    service.wait_for_node("local", "offline")
    gone = service.delete(instance_id, force=True, wait_s=20)
    assert (gone.status_code, gone.json()) == (200, {"message": f"Instance {instance_id} is deleted."})
    assert service.http.get(f"/v2/instances/{instance_id}").status_code == 404
    assert not any(instance_id in urn for urn in service.urns())
    assert traces_of(service, instance_id) != []

    engine.restore()
    service.wait_for_node("local", "online")
    wait_until(lambda: traces_of(service, instance_id) == [], what="nothing is left of it")


def test_a_service_that_starts_while_its_node_is_away_works_once_that_is_back(
    start_service: Callable[..., Service], engine: EngineProxy
) -> None:
    engine.refuse()
    service = start_service(**settings_for(engine))
    assert service.node()["last_heartbeat"] is None
    assert service.http.post("/v2/instances", json={"config": SMALL}).status_code == 503
    engine.restore()
    service.wait_for_node("local", "online")
    created = service.create(config=SMALL)
    assert (created["status"], created["error"]) == ("running", None)

    # And a delete that has to wait for its node does not wait longer than for that.
    engine.refuse()
    service.wait_for_node("local", "offline")
    waiting = service.delete(created["id"], wait_s=1)
    assert (waiting.status_code, waiting.json()) == (200, {"message": f"Instance {created['id']} is being deleted."})
    assert service.get(created["id"])["node_status"] == "offline"
    engine.restore()
    wait_until(lambda: service.http.get(f"/v2/instances/{created['id']}").status_code == 404, what="it is deleted")
    assert traces_of(service, created["id"]) == []
