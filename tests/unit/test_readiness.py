"""What a look at a container says about an instance that is waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner import readiness
from provisioner.browser_status import BrowserStatus, BrowserStatusClient
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.inventory import ContainerState
from provisioner.ledger.records import NodeStatus
from provisioner.readiness import GRACE_S, Outcome, Readiness, Watch, is_awaited, judge
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.records import make_record
from tests.support.watched import wait_until
from tests.support.world import empty_ledger

RUNNING = ContainerState(state="running", exit_code=0, oom_killed=False, restart_count=0, error="")
RESTARTING = dataclasses.replace(RUNNING, state="restarting", exit_code=3, restart_count=3)
EXITED = dataclasses.replace(RUNNING, state="exited", exit_code=137)


def make_watch(*, browser: bool = True, status: Status = Status.CREATING) -> Watch:
    record = make_record(status=status, settled_generation=0, debug_port=21000 if browser else None)
    return Watch(record=record, node=NodeSpec(id="local"), began=100.0, deadline=160.0, look_at=0.0)


def test_only_the_wish_that_the_engine_carried_out_is_awaited() -> None:
    awaited = make_record(generation=2, applied_generation=2, settled_generation=1)
    assert is_awaited(awaited)
    assert not is_awaited(dataclasses.replace(awaited, applied_generation=1))
    assert not is_awaited(dataclasses.replace(awaited, settled_generation=2))
    assert not is_awaited(dataclasses.replace(awaited, wanted=Wanted.DORMANT))


def test_a_container_without_a_browser_is_ready_once_it_stayed_up() -> None:
    watch = make_watch(browser=False)
    assert judge(watch, RUNNING, now=101.0)[0] is Outcome.WAIT
    assert judge(watch, RUNNING, now=101.1 + GRACE_S)[0] is Outcome.READY


def test_a_restart_in_between_starts_the_wait_anew() -> None:
    watch = make_watch(browser=False)
    again = dataclasses.replace(RUNNING, restart_count=1)
    assert judge(watch, RUNNING, now=101.0)[0] is Outcome.WAIT
    for now in (102.0, 102.1):
        assert judge(watch, again, now=now)[0] is Outcome.WAIT
    assert judge(watch, again, now=102.2 + GRACE_S)[0] is Outcome.READY


def test_a_running_container_says_nothing_about_its_browser_before_the_time_is_over() -> None:
    watch = make_watch()
    assert judge(watch, RUNNING, now=159.0)[0] is Outcome.WAIT
    outcome, reason = judge(watch, RUNNING, now=160.0)
    assert outcome is Outcome.FAILED
    assert reason == "Its browser did not answer within 60 s, though its container is running."


@pytest.mark.parametrize("browser", [True, False])
def test_a_container_that_keeps_ending_has_failed_early(browser: bool) -> None:
    outcome, reason = judge(make_watch(browser=browser), RESTARTING, now=101.0)
    assert outcome is Outcome.FAILED
    assert reason == "Its container's command ended 3 times, last with exit code 3."


def test_a_container_that_needs_more_memory_than_it_has_is_told_so() -> None:
    _, reason = judge(make_watch(), dataclasses.replace(RESTARTING, oom_killed=True), now=101.0)
    assert "killed because it needs more than its 1 GB of memory" in reason


def test_restarts_of_the_time_before_do_not_count() -> None:
    watch = make_watch(status=Status.RUNNING)
    assert judge(watch, RESTARTING, now=101.0)[0] is Outcome.WAIT
    more = dataclasses.replace(RESTARTING, restart_count=6)
    assert judge(watch, more, now=102.0)[0] is Outcome.FAILED


@pytest.mark.parametrize(("state", "words"), [(None, "is gone"), (EXITED, "stopped with exit code 137")])
def test_a_missing_or_stopped_container_is_believed_at_the_second_look(
    state: ContainerState | None, words: str
) -> None:
    watch = make_watch()
    assert judge(watch, state, now=101.0)[0] is Outcome.WAIT
    assert judge(watch, RUNNING, now=102.0)[0] is Outcome.WAIT
    assert judge(watch, state, now=103.0)[0] is Outcome.WAIT
    outcome, reason = judge(watch, state, now=104.0)
    assert outcome is Outcome.GONE
    assert words in reason


class Revisited:
    """A failed instance, and what is seen of it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ledger = empty_ledger(path)
        record = make_record(status=Status.FAILED, error_code="not_ready", error_message="It was slow.")
        self.ledger.instances.create(lambda _: (record, "test"))
        self.container: ContainerState | None = RUNNING
        monkeypatch.setattr(readiness, "describe_container", lambda *_, **__: self.container)
        self.readiness = Readiness(
            self.ledger,
            cluster=Cluster(ClusterSpec(name="unit")),
            hosts=DockerHosts(),
            settings=Settings(),
            changes=Changes(),
            ask=lambda urls: dict.fromkeys(urls, BrowserStatus(ready=True)),
        )

    def look(self, container: ContainerState | None) -> Status:
        self.container = container
        self.readiness.revisit_failed()
        return self.ledger.instances.get("mu-test").status


@pytest.fixture
def revisited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Revisited]:
    revisited = Revisited(tmp_path, monkeypatch)
    yield revisited
    revisited.ledger.close()


def test_a_failed_instance_whose_browser_answers_after_all_is_taken_back(revisited: Revisited) -> None:
    assert revisited.look(RUNNING) is Status.FAILED
    assert revisited.look(RUNNING) is Status.RUNNING
    assert revisited.ledger.instances.get("mu-test").error_code is None


@pytest.mark.parametrize("container", [None, EXITED, dataclasses.replace(RUNNING, restart_count=1)])
def test_an_answer_from_elsewhere_or_between_two_crashes_takes_nothing_back(
    revisited: Revisited, container: ContainerState | None
) -> None:
    assert revisited.look(RUNNING) is Status.FAILED
    assert revisited.look(container) is Status.FAILED


class Awaited:
    """Instances that are waited for on two nodes: `dead`, which has missed heartbeats, and `alive`."""

    def __init__(self, path: Path) -> None:
        self.ledger = empty_ledger(path)
        self.nodes = (NodeSpec(id="dead", host="unix:///dead"), NodeSpec(id="alive", host="unix:///alive"))
        self.ledger.nodes.sync(self.nodes)
        for node_id, misses in (("dead", 1), ("alive", 0)):
            self.ledger.nodes.observe(node_id, values={"status": NodeStatus.ONLINE, "misses": misses})
        self.readiness = Readiness(
            self.ledger,
            cluster=Cluster(ClusterSpec(name="unit", nodes=self.nodes)),
            hosts=DockerHosts(),
            settings=Settings(),
            changes=Changes(),
        )

    def add(self, node_id: str, *, number: int = 0, port: int | None = None) -> str:
        fields = {"id": f"mu-{node_id}{number}", "node_id": node_id, "debug_port": port, "stream_port": None}
        record = make_record(status=Status.CREATING, settled_generation=0, **fields)
        return self.ledger.instances.create(lambda _: (record, "test")).id


@pytest.fixture
def awaited(tmp_path: Path) -> Iterator[Awaited]:
    awaited = Awaited(tmp_path)
    yield awaited
    awaited.readiness.stop()
    awaited.ledger.close()


def test_nobody_waits_for_those_on_a_silent_node(awaited: Awaited, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def look(host: DockerHost, **_: object) -> ContainerState | None:
        if host.url == "unix:///dead":
            over.wait(20)
        return RUNNING

    monkeypatch.setattr(readiness, "describe_container", look)
    for number in range(10):
        awaited.add("dead", number=number)
    alive = awaited.add("alive")
    awaited.readiness.start()
    wait_until(lambda: awaited.ledger.instances.get(alive).status is Status.RUNNING, what="it is ready", timeout_s=10)
    awaited.ledger.nodes.observe("dead", values={"misses": 0})
    over.set()
    awaited.readiness.step()
    wait_until(lambda: not awaited.ledger.instances.unsettled(), what="the others are, once their node answers")


def test_few_browsers_of_silent_nodes_are_asked_at_a_time(awaited: Awaited, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = threading.Event()

    class SlowClient(BrowserStatusClient):
        async def ask(self, url: str) -> BrowserStatus | None:
            asked.append(url)
            await asyncio.to_thread(answers.wait, 20)
            return BrowserStatus(ready=True)

    monkeypatch.setattr(readiness, "BrowserStatusClient", SlowClient)
    many = 3 * readiness.ASKED_ON_SILENT_NODES
    for number in range(many):
        awaited.add("dead", number=number, port=21000 + number)
    awaited.readiness.start()
    wait_until(lambda: len(asked) == readiness.ASKED_ON_SILENT_NODES, what="a few are asked")
    awaited.readiness.watch(awaited.ledger.instances.get(awaited.add("alive", port=21000)))
    wait_until(lambda: len(asked) > readiness.ASKED_ON_SILENT_NODES, what="another node's is asked beside them")
    assert len(asked) == readiness.ASKED_ON_SILENT_NODES + 1
    answers.set()
    wait_until(lambda: not awaited.ledger.instances.unsettled(), what="all have answered")


def test_a_thread_that_can_not_run_keeps_nobody_waiting(awaited: Awaited, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> BrowserStatusClient:
        raise OSError("Too many open files")

    monkeypatch.setattr(readiness, "BrowserStatusClient", fail)
    said: list[OSError] = []

    def start() -> None:
        try:
            awaited.readiness.start()
        except OSError as error:
            said.append(error)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    starting.join(10)
    assert [str(error) for error in said] == ["Too many open files"]
