"""A node is drained while its browsers are in use and the service is killed: one leaves after the other, all arrive.

Two real engines on machines of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.acceptance.test_chaos import assert_marked, await_rest, bodies_on, mark
from tests.support.engines import Engine
from tests.support.service import COMMAND, Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service], two_engines: Mapping[str, Engine]) -> Service:
    return start_service(
        nodes=[engine.node(node_id) for node_id, engine in two_engines.items()],
        heartbeat_s=0.5,
        idle_after_s=2,
        idle_check_s=0.3,
    )


@contextlib.contextmanager
def in_use(instance: Mapping[str, Any]) -> Iterator[None]:
    """Use a browser all the time."""
    over = threading.Event()

    def use() -> None:
        while not over.wait(0.2):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{instance['urls']['debug']}/json/version", timeout=1)

    user = threading.Thread(target=use)
    user.start()
    try:
        yield
    finally:
        over.set()
        user.join()


def steps_of(service: Service, instance_id: str) -> dict[str, int]:
    """Return when each thing happened to an instance last, as the order of all events."""
    return {e["kind"]: e["id"] for e in service.events_of(instance_id)}


def test_a_drain_goes_on_after_the_service_was_killed_and_those_in_use_leave_last(
    service: Service, two_engines: Mapping[str, Engine]
) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: service.create(config=SMALL, node_preference="a"), range(3)))
    assert {instance["node_id"] for instance in made} == {"a"}
    busy, *others = made
    for instance in made:
        mark(two_engines["a"], instance, instance["id"])

    def any_is(what: Callable[[dict[str, Any]], bool]) -> bool:
        return any(what(service.get(instance["id"])) for instance in made)

    with in_use(busy):
        for instance in others:
            service.wait_for(instance["id"], "idle")
        assert service.get(busy["id"])["status"] == "running"
        draining = subprocess.Popen(
            [str(COMMAND), "node", "drain", "a"],
            cwd=service.project,
            env=service.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            wait_until(lambda: any_is(lambda i: i["moving"] == "drain"), what="one falls asleep")
            service.kill()
            service.start()
            wait_until(lambda: any_is(lambda i: i["moving"] and i["node_id"] == "b"), what="one wakes")
            service.kill()
            service.start()
            said, _ = draining.communicate(timeout=180)
        finally:
            draining.kill()
    assert draining.returncode == 0, said
    assert all(f"{instance['id']} has left" in said for instance in made), said
    assert "Node a is empty." in said

    for instance in made:
        there = await_rest(service, instance["id"])
        assert (there["node_id"], there["error"]) == ("b", None)
        assert there["status"] in ("running", "idle")
        assert_marked(two_engines["b"], there, instance["id"])
    steps = {instance["id"]: steps_of(service, instance["id"]) for instance in made}
    order = sorted(steps, key=lambda instance_id: steps[instance_id]["dormant"])
    assert order[-1] == busy["id"]
    for one, next_one in itertools.pairwise(order):
        assert steps[one]["ready"] < steps[next_one]["dormant"], "one leaves once the other has arrived"
    wait_until(lambda: bodies_on(two_engines["a"], service) == set(), what="nothing is left on the drained node")
