"""What is done ahead of updates never outlives what was wished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from provisioner import image_supply, lifecycle, preparation
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import NodeUnreachable, SnapshotFailed
from provisioner.ledger.records import InstanceRecord
from provisioner.preparation import Preparation
from provisioner.settings import Settings
from provisioner.snapshots.capture import CaptureRequest
from provisioner.snapshots.directory import DirectoryStore
from provisioner.specs import spec_of
from provisioner.states import Status
from provisioner.work import Work, plan
from stacks.names import Names
from stacks.spec import ClusterSpec
from tests.support.records import make_record
from tests.support.watched import wait_until as until
from tests.support.world import empty_ledger

NAMES = Names("unit")
ID = "mu-test"


class FakeDocker:
    """Makes things when it is let."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.begun = threading.Event()
        self.may_go_on = threading.Event()

    def create_ahead(self, urn: str, **_: Any) -> None:
        self.begun.set()
        assert self.may_go_on.wait(10)
        self.made.append(urn)


class FakeCloudPreparation:
    """Makes and releases volumes when it is let; says in which order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.asked: list[str] = []
        self.begun = threading.Event()
        self.may_go_on = threading.Event()

    def make_volume(self, record: InstanceRecord) -> None:
        self.asked.append(record.id)
        self.begun.set()
        assert self.may_go_on.wait(30)
        self.done.append(f"make {record.generation}")

    def release(self, record: InstanceRecord) -> None:
        self.done.append(f"release {record.generation}")

    def discard(self, record: InstanceRecord, *, generation: int) -> None: ...

    def home_keeper(self, record: InstanceRecord, *, generation: int) -> None: ...

    def close(self) -> None: ...


class World:
    """A preparation over a real ledger."""

    def __init__(self, path: Path) -> None:
        self.ledger = empty_ledger(path)
        self.docker = FakeDocker()
        self.cloud = FakeCloudPreparation()
        self.preparation = Preparation(
            self.ledger,
            cluster=Cluster(ClusterSpec(name="unit")),
            hosts=DockerHosts(timeout_s=0.1),
            store=DirectoryStore(path / "snapshots"),
            settings=Settings(),
            changes=Changes(),
            docker=self.docker,  # type: ignore[arg-type]
            cloud=self.cloud,  # type: ignore[arg-type]
        )

    def add(self, **changes: Any) -> InstanceRecord:
        record = make_record(status=Status.CREATING, applied_generation=0, settled_generation=0, **changes)
        return self.ledger.instances.create(lambda _: (record, "test"))

    @property
    def work(self) -> Work:
        work = plan(self.ledger.instances.get(ID), names=NAMES)
        assert work is not None
        return work

    def change(self, decide: Callable[[InstanceRecord], Any]) -> None:
        self.ledger.instances.change(ID, lambda record, _: decide(record))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(preparation, "find_usable_image", lambda *_, **__: object())
    monkeypatch.setattr(image_supply, "find_usable_image", lambda *_, **__: object())
    world = World(tmp_path)
    yield world
    world.docker.may_go_on.set()
    world.cloud.may_go_on.set()
    world.preparation.close()
    world.ledger.close()


def test_a_body_is_made_ahead(world: World) -> None:
    world.add()
    world.docker.may_go_on.set()
    assert world.preparation.prepare(world.work)
    until(lambda: world.docker.made == [NAMES.volume_urn(ID), NAMES.container_urn(ID)])


def test_what_a_node_did_not_say_long_ago_is_no_answer_of_today(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.docker.may_go_on.set()
    silence, asked = threading.Event(), 0

    def find_image(*_: object, **__: object) -> object:
        nonlocal asked
        asked += 1
        if asked == 1:
            assert silence.wait(10)
            raise NodeUnreachable("It does not answer.")
        return object()

    monkeypatch.setattr(preparation, "find_usable_image", find_image)
    world.add()
    assert not world.preparation.prepare(world.work)
    silence.set()  # its instance is kept out of updates by now; the node comes back much later
    until(lambda: all(look.done() for look, _ in world.preparation._looks.values()))
    monkeypatch.setattr(preparation, "IMAGE_KNOWN_S", 0.0)
    assert world.preparation.prepare(world.work)


def test_the_next_step_waits_for_what_is_still_being_made_ahead(world: World) -> None:
    """Else a fresh, empty volume could appear after the dormancy's delete, and be taken for a restored one."""
    world.add()
    assert world.preparation.prepare(world.work)
    assert world.docker.begun.wait(10)
    world.change(lambda r: lifecycle.note_created(r, generation=1, restored_by=None, restore_note=None))
    world.change(lambda r: lifecycle.note_ready(r, generation=1))
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    world.change(lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1))
    assert not world.preparation.prepare(world.work)
    world.docker.may_go_on.set()
    until(lambda: world.preparation.prepare(world.work))
    assert len(world.docker.made) == 2


@pytest.mark.parametrize("live", [False, True])
def test_a_live_snapshot_is_captured_as_one(world: World, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    asked: list[bool] = []

    class Taken:
        def __init__(self, request: CaptureRequest, **_: Any) -> None:
            asked.append(request.live)

        def run(self) -> None:
            pass

    monkeypatch.setattr(preparation, "Capture", Taken)
    world.ledger.instances.create(lambda _: (make_record(), "test"))
    wish = lifecycle.wish_live_snapshot if live else lifecycle.wish_dormant
    world.change(lambda r: wish(r, reason="test"))
    until(lambda: world.preparation.prepare(world.work))
    assert asked == [live]
    (ref,) = (spec_of(world.ledger.instances.get(ID)) or pytest.fail("no spec")).snapshots
    assert ref.live == live


@pytest.mark.parametrize("fails", [False, True])
def test_a_snapshot_is_captured_once_its_capture_has_ended_well(
    world: World, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    may_end = threading.Event()

    class Taken:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self) -> None:
            may_end.wait(10)
            if fails:
                raise SnapshotFailed("No snapshot was taken.")

    monkeypatch.setattr(preparation, "Capture", Taken)
    world.ledger.instances.create(lambda _: (make_record(), "test"))
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    assert not world.preparation.is_captured(world.work)
    assert not world.preparation.prepare(world.work)
    assert not world.preparation.is_captured(world.work)
    world.preparation._changes.work.clear()
    may_end.set()
    assert world.preparation._changes.work.wait(10)
    assert world.preparation.is_captured(world.work) is not fails


def test_nothing_is_made_ahead_for_a_wish_that_was_overtaken(world: World) -> None:
    world.add()
    stale = world.work
    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    world.docker.may_go_on.set()
    assert world.preparation.prepare(stale)
    until(lambda: world.preparation.prepare(world.work))
    assert world.docker.made == []


def test_a_cloud_volume_is_made_before_the_update_and_nothing_on_it_ahead(world: World) -> None:
    world.add(volume="ebs")
    assert not world.preparation.prepare(world.work)
    world.cloud.may_go_on.set()
    until(lambda: world.preparation.prepare(world.work))
    assert world.cloud.done == ["make 1"]
    assert world.docker.made == []


def test_nobody_waits_for_what_others_wait_for_in_the_cloud(world: World) -> None:
    ids = [f"mu-{number}" for number in range(2 * preparation.WORKERS)]
    for number, instance_id in enumerate(ids):
        ports = {"debug_port": 22000 + 2 * number, "stream_port": 22001 + 2 * number}
        work = plan(world.add(id=instance_id, volume="ebs", **ports), names=NAMES)
        assert work is not None
        assert not world.preparation.prepare(work)
    until(lambda: sorted(world.cloud.asked) == ids)


def test_a_delete_waits_for_the_cloud_volume_that_is_being_made_and_removes_it(world: World) -> None:
    world.add(volume="ebs")
    world.preparation.prepare(world.work)
    assert world.cloud.begun.wait(10)
    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    assert not world.preparation.prepare(world.work)
    time.sleep(0.05)
    assert world.cloud.done == []
    world.cloud.may_go_on.set()
    until(lambda: world.preparation.prepare(world.work))
    assert world.cloud.done == ["make 1", "release 2"]


def test_a_node_that_does_not_say_whether_it_has_an_image_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(preparation, "find_usable_image", lambda *_, **__: answers.wait(10))
    world.add()
    world.docker.may_go_on.set()
    assert not world.preparation.prepare(world.work)
    assert not world.preparation.prepare(world.work)
    answers.set()
    until(lambda: world.preparation.prepare(world.work))
    until(lambda: len(world.docker.made) == 2)


def test_a_node_that_goes_silent_while_it_is_asked_for_an_image_fails_the_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_silent(*_: Any, **__: Any) -> None:
        raise NodeUnreachable("It does not answer.")

    monkeypatch.setattr(preparation, "find_usable_image", be_silent)
    world.add()
    for _ in range(2):
        with pytest.raises(NodeUnreachable):
            world.preparation.prepare(world.work)
