"""Nodes fail while callers create, put to sleep and wake: every accepted call has its outcome, and nothing is lost.

Two real engines on machines of their own. The cluster waits for a node that is lost, so not a byte may be missing.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import docker
import httpx
import pytest

from tests.support.engines import Engine
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
NOTE = "/home/machine/note"
BROKEN_FOR_S = 6
CALLERS = 3


@pytest.fixture(scope="module")
def engines() -> Iterator[Mapping[str, Engine]]:
    with Engine("tcp") as a, Engine() as b:
        yield {"a": a, "b": b}


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service], engines: Mapping[str, Engine]) -> Service:
    return start_service(
        nodes=[engine.node(node_id) for node_id, engine in engines.items()],
        heartbeat_s=0.5,
        node_timeout_s=1,
        offline_after_misses=2,
    )


@dataclass
class Caller:
    """Works with one instance until it is told to stop, and remembers what it was promised."""

    service: Service
    engines: Mapping[str, Engine]
    stopping: threading.Event
    instance_id: str | None = None
    note: str | None = None
    promised: str = ""
    """The last call that was accepted."""
    calls: int = 0
    refusals: list[str] = field(default_factory=list)

    def run(self) -> None:
        for number in itertools.count():
            if self.stopping.is_set():
                return
            self.work(number)
            time.sleep(0.1)

    def work(self, number: int) -> None:
        """Do what comes next: make an instance, write into it, put it to sleep, wake it."""
        if self.instance_id is None:
            answer = self.call("POST", "", json={"config": SMALL})
            if answer.status_code == 201:
                self.instance_id = answer.json()["id"]
                self.promised = "running"
            return
        shown = self.call("GET", self.instance_id).json()
        if shown["operation"] is not None:
            return
        if shown["status"] == "dormant":
            if self.call("POST", f"{self.instance_id}/revive").status_code == 200:
                self.promised = "running"
        elif self.note is None:
            self.write(f"note {number}", node_id=shown["node_id"])
        elif self.call("POST", f"{self.instance_id}/dormant").status_code == 200:
            self.promised = "dormant"

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        began = time.monotonic()
        answer = self.service.http.request(
            method, f"/v2/instances/{path}".rstrip("/"), headers={"Prefer": "wait=3"}, **more
        )
        self.calls += 1
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        assert time.monotonic() - began < 30, f"{method} {path} was held up"
        if answer.status_code >= 400:
            self.refusals.append(f"{method} {path}: {answer.text}")
        return answer

    def write(self, note: str, *, node_id: str) -> None:
        """Write into the instance's home; not while its node is broken."""
        try:
            self._execute(node_id, "sh", "-c", f"echo '{note}' > {NOTE} && sync")
        except (docker.errors.DockerException, OSError):
            return
        self.note = note

    def read(self, *, node_id: str) -> str:
        return self._execute(node_id, "cat", NOTE).strip()

    def _execute(self, node_id: str, *command: str) -> str:
        assert self.instance_id is not None
        client = self.engines[node_id].client(timeout_s=2)
        code, output = client.containers.get(self.service.container_name(self.instance_id)).exec_run(list(command))
        if code != 0:
            raise docker.errors.DockerException(output.decode())
        return str(output.decode())


def await_node(service: Service, node_id: str, status: str) -> None:
    def found() -> bool:
        return bool(service.http.get(f"/v2/nodes/{node_id}").json()["status"] == status)

    wait_until(found, what=f"node {node_id} is {status}", timeout_s=60)


def events_of(service: Service, instance_id: str) -> list[str]:
    events = service.http.get(f"/v2/instances/{instance_id}/events").json()
    return [f"{event['kind']}: {event['message']}" for event in events]


def bodies_on(engine: Engine, service: Service) -> set[str]:
    """Return which instances an engine has a container or a home of."""
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    client = engine.client()
    found = {c.labels["machineuse.instance"] for c in client.containers.list(all=True, filters=mine)}
    homes = (v for v in client.volumes.list(filters=mine) if v.name.endswith("-home"))
    return found | {v.attrs["Labels"]["machineuse.instance"] for v in homes}


@pytest.mark.parametrize(("breaks", "mends"), [("kill", "start"), ("freeze", "thaw"), ("unplug", "plug")])
def test_a_node_that_fails_under_work_loses_nothing(
    service: Service, engines: Mapping[str, Engine], breaks: str, mends: str
) -> None:
    stopping = threading.Event()
    callers = [Caller(service, engines, stopping) for _ in range(CALLERS)]
    with ThreadPoolExecutor(CALLERS) as pool:
        working = [pool.submit(caller.run) for caller in callers]
        try:
            wait_until(lambda: all(caller.note is not None for caller in callers), what="all are at work", timeout_s=60)
            getattr(engines["a"], breaks)()
            try:
                await_node(service, "a", "offline")
                time.sleep(BROKEN_FOR_S)
            finally:
                getattr(engines["a"], mends)()
            await_node(service, "a", "online")
        finally:
            stopping.set()
        for work in working:
            work.result(timeout=60)

    for caller in callers:
        assert caller.instance_id is not None
        shown = wait_until(
            lambda c=caller: found if (found := service.get(c.instance_id))["operation"] is None else None,
            what="its last call has an outcome",
            timeout_s=60,
        )
        # A dormancy that its node did not live to see is refused, and says so: the instance goes on running.
        refused = shown["error"] is not None and shown["error"]["code"] == "snapshot_failed"
        outcome = (shown["status"], caller.promised, events_of(service, caller.instance_id))
        assert shown["status"] == caller.promised or (refused and shown["status"] == "running"), outcome
        if shown["status"] == "dormant":
            answer = service.post(f"{caller.instance_id}/revive")
            assert answer.status_code == 200, answer.text
            shown = answer.json()
        assert shown["status"] in ("running", "idle"), shown
        assert caller.read(node_id=shown["node_id"]) == caller.note
    known = service.http.get("/v2/instances").json()["instances"]
    for node_id, engine in engines.items():
        here = {i["id"] for i in known if i["node_id"] == node_id and i["status"] != "dormant"}
        wait_until(lambda e=engine, h=here: bodies_on(e, service) == h, what=f"node {node_id} has just what it should")
    for caller in callers:
        assert caller.instance_id is not None
        assert service.delete(caller.instance_id).status_code == 200
    for engine in engines.values():
        wait_until(lambda e=engine: bodies_on(e, service) == set(), what="nothing is left")
