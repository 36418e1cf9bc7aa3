"""A node is lost while instances run on it: they are given back elsewhere, and never run in two places once it is back.

Two real engines on machines of their own; seconds stand for minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import docker
import pytest

from tests.support.browsing import version_of
from tests.support.containers import execute
from tests.support.engines import Engine
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
NOTE = "/home/machine/note"


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service], two_engines: Mapping[str, Engine]) -> Service:
    return start_service(
        nodes=[engine.node(node_id) for node_id, engine in two_engines.items()],
        cluster_fields={"offline": {"action": "move", "after_minutes": 1}, "snapshot_every_minutes": 1},
        minute_s=3,
        idle_check_s=0.3,
        heartbeat_s=0.5,
        node_timeout_s=2,
        offline_after_misses=2,
    )


def names_on(engine: Engine, *, service: Service, instance_id: str) -> list[str]:
    """Return what an engine has of an instance."""
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    client = engine.client()
    names = [c.name for c in client.containers.list(all=True, filters=mine, ignore_removed=True)]
    names += [v.name for v in client.volumes.list(filters=mine)]
    return sorted(name for name in names if instance_id in name)


def run(engine: Engine, service: Service, instance_id: str, *command: str) -> str:
    return execute(engine.client().containers.get(service.container_name(instance_id)), *command)


def await_live_snapshot(service: Service, instance: dict[str, Any], *, after: float) -> None:
    """Use the browser until a snapshot has been taken of it, while it runs, that began after that moment."""

    def found() -> bool:
        version_of(instance)
        snapshots = service.get(instance["id"])["snapshots"]
        return any(
            s["live"] and s["state"] == "verified" and datetime.fromisoformat(s["created_at"]).timestamp() > after
            for s in snapshots
        )

    wait_until(found, what="a live snapshot")


def events_of(service: Service, instance_id: str) -> dict[str, str]:
    return {event["kind"]: event["message"] for event in service.events_of(instance_id)}


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_an_instance_of_a_lost_node_runs_elsewhere_and_only_there(
    service: Service, two_engines: Mapping[str, Engine], how: str
) -> None:
    lost, other = two_engines["a"], two_engines["b"]
    moved = service.create(config=SMALL, node_preference="a")
    assert moved["node_id"] == "a"
    run(lost, service, moved["id"], "sh", "-c", f"echo kept > {NOTE}")
    await_live_snapshot(service, moved, after=time.time())
    assert service.get(moved["id"])["operation"] is None

    getattr(lost, how)()
    try:
        service.wait_for_node("a", "offline")
        # Nobody else is held up by it.
        with ThreadPoolExecutor(2) as pool:
            created = list(pool.map(lambda _: service.create(config=SMALL), range(2)))
        assert [(i["status"], i["node_id"]) for i in created] == [("running", "b")] * 2
        there = wait_until(
            lambda: found if (found := service.get(moved["id"]))["node_id"] == "b" and not found["operation"] else None,
            what="it runs on the other node",
        )
        assert (there["status"], there["moving"], there["restored_by"]) == ("running", None, "full_restore")
        assert "Node a was lost" in there["restore_note"]
        assert "what it did after that is lost" in there["restore_note"]
        assert "has not answered" in events_of(service, moved["id"])["move"]
        assert run(other, service, moved["id"], "cat", NOTE) == "kept\n"
        assert "Chrome" in version_of(there)["Browser"]
    finally:
        lost.start() if how == "kill" else lost.thaw()

    service.wait_for_node("a", "online")
    wait_until(lambda: names_on(lost, service=service, instance_id=moved["id"]) == [], what="nothing is left of it")
    assert service.get(moved["id"])["node_id"] == "b"
    assert run(other, service, moved["id"], "cat", NOTE) == "kept\n"
    # Not at any moment: a snapshot that a newer one takes the place of is on its way out every few seconds.
    wait_until(
        lambda: service.pulumi("preview", "--stack", service.cluster, "--expect-no-changes").returncode == 0,
        what="a preview without changes",
        timeout_s=60,
    )
    for instance in (moved, *created):
        assert service.delete(instance["id"]).status_code == 200
    with pytest.raises(docker.errors.NotFound):
        run(other, service, moved["id"], "true")


def test_a_sleeper_of_a_lost_node_wakes_elsewhere_and_says_how(
    service: Service, two_engines: Mapping[str, Engine]
) -> None:
    lost, other = two_engines["a"], two_engines["b"]
    sleeper = service.create(config=SMALL, node_preference="a")
    run(lost, service, sleeper["id"], "sh", "-c", f"echo kept > {NOTE}")
    assert service.post(f"{sleeper['id']}/dormant").json()["status"] == "dormant"
    lost.kill()
    try:
        service.wait_for_node("a", "offline")
        woken = service.post(f"{sleeper['id']}/revive", method="quick_start").json()
        assert (woken["status"], woken["node_id"], woken["restored_by"]) == ("running", "b", "full_restore"), woken
        assert "no copy" in woken["restore_note"]
        assert woken["restore_note"] in events_of(service, sleeper["id"])["restored"]
        assert run(other, service, sleeper["id"], "cat", NOTE) == "kept\n"
        assert service.delete(sleeper["id"]).status_code == 200
    finally:
        lost.start()
    service.wait_for_node("a", "online")
    wait_until(lambda: names_on(lost, service=service, instance_id=sleeper["id"]) == [], what="its copy is gone too")
