"""Decisions about idleness, with agents that say what the test wants."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from provisioner.browser_status import BrowserStatus
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.idle import IdleWatch
from provisioner.images import ImageCatalogue
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.service import InstanceService
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import ClusterSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger

LONG_AGO = 1000.0


class Scene:
    """One idle watch whose agents answer from `says`."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(project_dir=directory)
        self.cluster = Cluster(ClusterSpec(name="test"))
        self.ledger = empty_ledger(self.settings.ledger_location)
        self.ledger.nodes.sync(self.cluster.nodes)
        self.ledger.nodes.observe("local", values={"status": NodeStatus.ONLINE})
        self.changes = Changes()
        self.says: dict[str, BrowserStatus] = {}
        self.asked: list[str] = []
        service = InstanceService(
            self.ledger,
            cluster=self.cluster,
            settings=self.settings,
            catalogue=ImageCatalogue(self.cluster, hosts=DockerHosts()),
            changes=self.changes,
        )
        self.watch = IdleWatch(
            self.ledger,
            cluster=self.cluster,
            settings=self.settings,
            service=service,
            changes=self.changes,
            ask=self.ask,
        )

    def ask(self, urls: Mapping[str, str]) -> Mapping[str, BrowserStatus]:
        self.asked = list(urls)
        return {key: self.says[key] for key in urls if key in self.says}

    def add(self, *, quiet_s: float | None, **changes: Any) -> InstanceRecord:
        number = len(self.says) + len(self.ledger.instances.all())
        fields = {"id": f"mu-{number}", "debug_port": 21000 + 2 * number, "stream_port": 21001 + 2 * number}
        record = make_record(**fields | {"last_active_at": LONG_AGO} | changes)
        self.ledger.instances.create(lambda _: (record, "made by a test"))
        if quiet_s is not None:
            self.says[record.id] = BrowserStatus(ready=True, last_activity_s=quiet_s, counts_activity=True)
        return record

    def get(self, record: InstanceRecord) -> InstanceRecord:
        return self.ledger.instances.get(record.id)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.ledger.close()


def test_a_browser_unused_for_a_while_is_idle(scene: Scene) -> None:
    record = scene.add(quiet_s=61)
    scene.watch.step()
    assert scene.get(record).status is Status.IDLE


def test_use_makes_an_idle_browser_running(scene: Scene) -> None:
    record = scene.add(quiet_s=1, status=Status.IDLE)
    scene.watch.step()
    assert scene.get(record).status is Status.RUNNING
    assert time.time() - scene.get(record).last_active_at < 5


def test_an_agent_that_does_not_answer_decides_nothing(scene: Scene) -> None:
    record = scene.add(quiet_s=None, status=Status.IDLE, idle_timeout_minutes=1)
    scene.watch.step()
    assert scene.get(record) == record


def test_a_browser_that_nobody_counts_for_never_sleeps(scene: Scene) -> None:
    record = scene.add(quiet_s=None, status=Status.RUNNING)
    scene.says[record.id] = BrowserStatus(ready=True)
    scene.watch.step()
    assert scene.get(record) == record


def test_the_absence_of_the_service_is_not_idleness(scene: Scene) -> None:
    record = scene.add(quiet_s=120, status=Status.IDLE, idle_timeout_minutes=30)
    scene.watch.step()
    assert scene.get(record).wanted is Wanted.RUNNING


def test_a_long_idle_browser_is_to_be_dormant(scene: Scene) -> None:
    record = scene.add(quiet_s=30 * 60 + 1, status=Status.IDLE)
    scene.watch.step()
    assert scene.get(record).wanted is Wanted.DORMANT
    assert scene.changes.work.is_set()
    assert scene.ledger.events.list(instance_id=record.id)[-1].message == "idle for 30 minutes"


@pytest.mark.parametrize("policy", [{"auto_snapshot": False}, {"idle_timeout_minutes": 0}])
def test_without_the_policy_it_stays_idle(scene: Scene, policy: dict[str, Any]) -> None:
    record = scene.add(quiet_s=1e6, status=Status.IDLE, **policy)
    scene.watch.step()
    assert scene.get(record).status is Status.IDLE
    assert scene.get(record).wanted is Wanted.RUNNING


def test_after_a_failed_snapshot_it_is_not_tried_again_at_once(scene: Scene) -> None:
    record = scene.add(quiet_s=1e6, status=Status.RUNNING, last_active_at=time.time())
    scene.watch.step()
    assert scene.get(record).status is Status.RUNNING


def test_only_browsers_that_are_up_on_nodes_that_answer_are_asked(scene: Scene) -> None:
    up = scene.add(quiet_s=1)
    scene.add(quiet_s=1, status=Status.CREATING, settled_generation=0)
    scene.add(quiet_s=1, browser=False, debug_port=None, stream_port=None)
    scene.watch.step()
    assert scene.asked == [up.id]
    scene.ledger.nodes.observe("local", values={"status": NodeStatus.OFFLINE})
    scene.watch.step()
    assert scene.asked == []


def test_an_instance_that_vanishes_meanwhile_is_passed_over(scene: Scene) -> None:
    record = scene.add(quiet_s=61)
    answer = scene.ask

    def ask(urls: Mapping[str, str]) -> Mapping[str, BrowserStatus]:
        from provisioner import lifecycle

        scene.ledger.instances.change(record.id, lambda r, _: lifecycle.note_gone(r))
        return answer(urls)

    scene.watch._ask = ask
    scene.watch.step()
    assert scene.ledger.instances.all() == []
