"""Nodes fail while callers create, put to sleep, wake and delete: every accepted call has its outcome, nothing is lost.

Three real engines on machines of their own, reached by TCP, SSH and a Unix socket. One of them loses its power, freezes
or has its cable pulled. A cluster that waits for a lost node may not lose a byte; one that moves its instances may give
back an older home, where its events say so.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import docker
import httpx
import pytest

from tests.support.browsing import new_page
from tests.support.engines import Engine
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
NOTE = "/home/machine/note"
PAGE = "http://marker.test/"
WRITE = "mark => { localStorage.setItem('mark', mark); document.cookie = `mark=${mark}; max-age=86400`; }"
READ = "() => [localStorage.getItem('mark'), document.cookie]"
CALLERS = 3
BREAKS = {"kill": "start", "freeze": "thaw", "unplug": "plug"}
"""How a node fails, and how it comes back."""


@pytest.fixture(scope="module")
def engines() -> Iterator[Mapping[str, Engine]]:
    with Engine("tcp") as tcp, Engine("ssh") as ssh, Engine() as unix:
        yield {"tcp": tcp, "ssh": ssh, "unix": unix}


@pytest.fixture(scope="module")
def services(start_service: Callable[..., Service], engines: Mapping[str, Engine]) -> Callable[[str], Service]:
    """Give a function that starts a service whose cluster has that policy about lost nodes; one runs at a time."""
    nodes = [engine.node(node_id) for node_id, engine in engines.items()]
    fields = {"snapshot_every_minutes": 1}
    return services_by_policy(start_service, nodes=nodes, after_minutes=1, cluster_fields=fields, idle_check_s=0.5)


def services_by_policy(
    start_service: Callable[..., Service],
    *,
    nodes: Sequence[Mapping[str, object]],
    after_minutes: int,
    cluster_fields: Mapping[str, object] | None = None,
    **settings: object,
) -> Callable[[str], Service]:
    """Return a function that starts a service with a policy about lost nodes; one runs at a time, its minutes short."""
    started: dict[str, Service] = {}

    def start(policy: str) -> Service:
        for other in started.keys() - {policy}:
            started.pop(other).stop()
        if policy not in started:
            offline = {"action": policy, "after_minutes": after_minutes}
            started[policy] = start_service(
                nodes=nodes,
                cluster_fields={"offline": offline, **(cluster_fields or {})},
                minute_s=3,
                heartbeat_s=0.5,
                node_timeout_s=1,
                offline_after_misses=2,
                **settings,
            )
        return started[policy]

    return start


@dataclass
class Caller:
    """Works with one instance until it is told to stop, and remembers what it was promised."""

    service: Service
    engines: Mapping[str, Engine]
    stopping: threading.Event
    node_id: str
    """Where it would like its instance to be."""
    instance_id: str | None = None
    notes: list[str] = field(default_factory=list)
    has_written: bool = False
    """Whether it wrote since its instance woke."""
    promised: str = ""
    """The last call that was accepted."""
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
            answer = self.call("POST", "", json={"config": SMALL, "node_preference": self.node_id})
            if answer.status_code == 201:
                self.instance_id = answer.json()["id"]
                self.promised = "running"
            return
        shown = self.call("GET", self.instance_id).json()
        if shown["operation"] is not None:
            return
        if shown["status"] == "dormant":
            if self.call("POST", f"{self.instance_id}/revive", json={}).status_code == 200:
                self.promised = "running"
                self.has_written = False
        elif not self.has_written:
            self.write(f"note {number}", node_id=shown["node_id"])
        elif self.call("POST", f"{self.instance_id}/dormant").status_code == 200:
            self.promised = "dormant"

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        began = time.monotonic()
        answer = self.service.http.request(
            method, f"/v2/instances/{path}".rstrip("/"), headers={"Prefer": "wait=3"}, **more
        )
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        assert time.monotonic() - began < 30, f"{method} {path} was held up"
        if answer.status_code >= 400:
            self.refusals.append(f"{method} {path}: {answer.text}")
        return answer

    def write(self, note: str, *, node_id: str) -> None:
        """Write into the instance's home; not while its node is broken."""
        self.notes.append(note)  # whether it got there or not
        try:
            self._execute(node_id, "sh", "-c", f"echo '{note}' > {NOTE} && sync")
        except (docker.errors.DockerException, OSError):
            return
        self.has_written = True
        self.notes[:] = [note]

    def read(self, *, node_id: str) -> str:
        return self._execute(node_id, "cat", NOTE).strip()

    def _execute(self, node_id: str, *command: str) -> str:
        assert self.instance_id is not None
        client = self.engines[node_id].client(timeout_s=2)
        code, output = client.containers.get(self.service.container_name(self.instance_id)).exec_run(list(command))
        if code != 0:
            raise docker.errors.DockerException(output.decode())
        return str(output.decode())


@dataclass
class Visitor(Caller):
    """Makes an instance, and deletes it when it runs; then the next one."""

    made: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    def work(self, number: int) -> None:
        preferred = list(self.engines)[number % len(self.engines)]
        if len(self.made) - len(self.deleted) < CALLERS:
            answer = self.call("POST", "", json={"config": SMALL, "node_preference": preferred})
            if answer.status_code == 201:
                self.made.append(answer.json()["id"])
        for instance_id in [each for each in self.made if each not in self.deleted]:
            shown = self.call("GET", instance_id).json()
            if shown["operation"] is None and self.call("DELETE", instance_id).status_code == 200:
                self.deleted.append(instance_id)


def await_rest(service: Service, instance_id: str) -> dict[str, Any]:
    """Return an instance once nothing is under way for it."""

    def found() -> dict[str, Any] | None:
        shown = service.get(instance_id)
        return shown if shown["operation"] is None else None

    return wait_until(found, what="its last call has an outcome", timeout_s=90)


def events_of(service: Service, instance_id: str) -> list[tuple[str, str]]:
    return [(event["kind"], event["message"]) for event in service.events_of(instance_id)]


def last(kind: str, events: list[tuple[str, str]]) -> int:
    return max((number for number, event in enumerate(events) if event[0] == kind), default=-1)


def bodies_on(engine: Engine, service: Service, *, with_copies: bool = False) -> set[str]:
    """Return which instances an engine has a container or a home of (or a copy of a home, or a helper)."""
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    client = engine.client()
    containers = client.containers.list(all=True, filters=mine, ignore_removed=True)
    found = {c.labels.get("machineuse.instance", c.name) for c in containers}
    homes = (v for v in client.volumes.list(filters=mine) if with_copies or v.name.endswith("-home"))
    return found | {v.attrs["Labels"]["machineuse.instance"] for v in homes}


def mark(engine: Engine, instance: Mapping[str, Any], text: str) -> None:
    """Leave something in the profile of an instance's browser."""
    with new_page(instance, host=engine.address) as page:
        page.route(f"{PAGE}**", lambda route: route.fulfill(body="marked", content_type="text/html"))
        page.goto(PAGE)
        page.evaluate(WRITE, text)


def assert_marked(engine: Engine, instance: Mapping[str, Any], text: str) -> None:
    with new_page(instance, host=engine.address) as page:
        page.route(f"{PAGE}**", lambda route: route.fulfill(body="marked", content_type="text/html"))
        page.goto(PAGE)
        assert page.evaluate(READ) == [text, f"mark={text}"]


def make_marked(service: Service, engines: Mapping[str, Engine], node_id: str) -> dict[str, Any]:
    """Make an instance on a node whose browser has something in its profile, which a snapshot has too."""
    made = service.create(config=SMALL, node_preference=node_id)
    assert made["node_id"] == node_id
    mark(engines[node_id], made, made["id"])
    assert service.post(f"{made['id']}/dormant").json()["status"] == "dormant"
    woken = service.post(f"{made['id']}/revive", node_preference=node_id).json()
    assert (woken["status"], woken["node_id"]) == ("running", node_id)
    return dict(woken)


@pytest.mark.parametrize(
    ("policy", "breaks", "node_id", "until"),
    [
        ("wait", "kill", "tcp", "rest"),
        ("wait", "freeze", "ssh", "rest"),
        ("wait", "unplug", "tcp", "rest"),
        ("move", "kill", "ssh", "moved"),
        ("move", "freeze", "tcp", "moving"),
        ("move", "unplug", "ssh", "moved"),
    ],
)
def test_a_node_that_fails_under_work_loses_nothing(
    services: Callable[[str], Service],
    engines: Mapping[str, Engine],
    policy: str,
    breaks: str,
    node_id: str,
    until: str,
) -> None:
    """The node is back after a rest, once its instances were moved, or in the middle of their move."""
    service, broken = services(policy), engines[node_id]
    resident = make_marked(service, engines, node_id)["id"]
    stopping = threading.Event()
    callers = [Caller(service, engines, stopping, node_id) for _ in range(CALLERS)]
    visitor = Visitor(service, engines, stopping, node_id)

    def over() -> bool:
        shown = service.get(resident)
        return bool(shown["moving"] if until == "moving" else shown["node_id"] != node_id and not shown["moving"])

    with ThreadPoolExecutor(CALLERS + 1) as pool:
        working = [pool.submit(caller.run) for caller in (*callers, visitor)]
        try:
            wait_until(lambda: all(caller.has_written for caller in callers), what="all are at work")
            made_before = len(visitor.made)
            getattr(broken, breaks)()
            try:
                service.wait_for_node(node_id, "offline")
                if until == "rest":
                    time.sleep(6)
                else:
                    wait_until(over, what=f"the resident is {until}")
                if until != "moving":  # which is over too soon
                    wait_until(lambda: len(visitor.made) > made_before, what="others go on creating")
            finally:
                getattr(broken, BREAKS[breaks])()
            service.wait_for_node(node_id, "online")
        finally:
            stopping.set()
        for work in working:
            work.result(timeout=60)

    for caller in callers:
        assert caller.instance_id is not None
        shown = await_rest(service, caller.instance_id)
        events = events_of(service, caller.instance_id)
        # A dormancy that its node did not live to see is refused, and says so: the instance goes on running.
        refused = caller.promised == "dormant" and last("sleep_failed", events) > last("dormant", events)
        outcome = (shown["status"], caller.promised, events)
        assert shown["status"] == ("running" if refused else caller.promised), outcome
        if shown["status"] == "dormant":
            answer = service.post(f"{caller.instance_id}/revive")
            assert answer.status_code == 200, answer.text
            shown = answer.json()
        assert shown["status"] in ("running", "idle"), shown
        # What was only being revived there is revived elsewhere, whatever the policy, and loses nothing by it.
        losses = [text for kind, text in events if kind == "move" and "what it did after that is lost" in text]
        if policy == "wait":
            assert losses == []
        if not losses:
            assert caller.read(node_id=shown["node_id"]) in caller.notes
    for instance_id in visitor.deleted:
        wait_until(
            lambda i=instance_id: service.http.get(f"/v2/instances/{i}").status_code == 404,
            what="what was to be deleted is gone",
        )
    for instance_id in [each for each in visitor.made if each not in visitor.deleted]:
        assert await_rest(service, instance_id)["status"] in ("running", "idle")
        assert service.delete(instance_id).status_code == 200

    shown = await_rest(service, resident)
    assert shown["status"] in ("running", "idle")
    if policy == "wait":
        assert shown["node_id"] == node_id
    else:
        assert last("move", events_of(service, resident)) >= 0
    assert_marked(engines[shown["node_id"]], shown, resident)

    known = service.http.get("/v2/instances").json()["instances"]
    for each, engine in engines.items():
        here = {i["id"] for i in known if i["node_id"] == each and i["status"] != "dormant"}
        wait_until(lambda e=engine, h=here: bodies_on(e, service) == h, what=f"node {each} has just what it should")
    for instance_id in (resident, *(caller.instance_id for caller in callers)):
        assert instance_id is not None
        assert service.delete(instance_id).status_code == 200
    for engine in engines.values():
        wait_until(lambda e=engine: bodies_on(e, service, with_copies=True) == set(), what="nothing is left")
    assert not any("mu-" in urn for urn in service.urns())
