"""The converger over a real ledger and an engine in memory.

Two properties hold for every workflow: a step that is carried out twice succeeds, and a failure or a kill at any step
loses nothing, because the work is found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.converger import Converger, Work
from provisioner.errors import EngineError, MachineuseError, SnapshotFailed
from provisioner.guard import LedgerGuard
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.names import Names
from stacks.spec import ClusterSpec
from tests.support.fake_engine import Died, FakeEngine
from tests.support.records import make_record

NAMES = Names("unit")
ID = "mu-test"
VOLUME, CONTAINER = NAMES.volume_urn(ID), NAMES.container_urn(ID)


class World:
    """A converger with everything around it; `crash` throws the converger away like a kill -9 does."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger.create(path / "ledger.db")
        self.engine = FakeEngine()
        self.preparing: set[str] = set()
        self.unprepared: MachineuseError | None = None
        self.engine.before_delete = self._guard
        self.crash()

    def crash(self) -> None:
        self.converger = Converger(
            self.ledger,
            cluster=ClusterSpec(name="unit"),
            settings=Settings(create_attempts=2),
            engine=self.engine,
            changes=Changes(),
            await_ready=self._ready,
            prepare=self._prepare,
        )

    def _prepare(self, work: Work) -> bool:
        if self.unprepared is not None and work.record.id == ID:
            raise self.unprepared
        return work.record.id not in self.preparing

    def _ready(self, record: InstanceRecord) -> None:
        self.ledger.instances.change(record.id, lambda r, _: lifecycle.note_ready(r, generation=r.generation))

    def _guard(self, urn: str) -> None:
        """Every delete is asked for as the plugins do."""
        kind = next((k for k in ("volume", "container", "Snapshot") if f"{k}:" in urn or k in urn), "other").lower()
        decision = LedgerGuard(self.ledger, stop_timeout_s=1).check_delete(
            urn=urn, labels={"machineuse.instance": ID}, kind=kind, replacing=False
        )
        assert decision.allowed, decision.reason

    def add(self, **fields: object) -> InstanceRecord:
        record = make_record(**{"status": Status.CREATING, "applied_generation": 0, "settled_generation": 0} | fields)
        return self.ledger.instances.create(lambda _: (record, "test"))

    def wish(self, decide: Callable[[InstanceRecord], object], instance_id: str = ID) -> None:
        self.ledger.instances.change(instance_id, lambda r, _: decide(r))  # type: ignore[arg-type, return-value]

    def wish_step(self, wish: str) -> None:
        """Wish by name; `create` adds the instance."""
        if wish == "create":
            self.add()
        elif wish == "dormant":
            self.wish(lambda r: lifecycle.wish_dormant(r, reason="test"))
        elif wish == "revive":
            self.wish(lambda r: lifecycle.wish_revived(r, method="quick_start", node_id="local", ports=(21000, 21001)))
        else:
            self.wish(lambda r: lifecycle.wish_absent(r, force=False))

    def settle(self, *, rounds: int = 20) -> None:
        """Step until nothing is due, taking no notice of how long a retry should wait."""
        for _ in range(rounds):
            for record in self.ledger.instances.unsettled():
                self.wish(lambda _: Update(values={"retry_at": 0.0}), record.id)
            if self.converger.step() is None:
                return
        raise AssertionError(f"still unsettled: {self.ledger.instances.unsettled()}")

    @property
    def record(self) -> InstanceRecord:
        return self.ledger.instances.get(ID)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.ledger.close()


JOURNEY = ("create", "dormant", "revive", "dormant", "revive", "delete")


def test_an_instance_goes_the_whole_way(world: World) -> None:
    world.wish_step("create")
    world.settle()
    assert world.record.status is Status.RUNNING
    assert {VOLUME, CONTAINER} <= world.engine.resources
    world.wish_step("dormant")
    world.settle()
    assert world.record.status is Status.DORMANT
    assert {urn.rsplit("::", 1)[1] for urn in world.engine.resources} == {ID, f"{ID}-snapshot-2"}
    world.wish_step("revive")
    world.settle()
    assert world.record.status is Status.RUNNING
    assert world.record.restored_by == "quick_start"
    assert NAMES.restore_urn(ID) in world.engine.resources
    world.wish_step("delete")
    world.settle()
    assert world.engine.resources == set()
    assert world.ledger.instances.all() == []


@pytest.mark.parametrize("death", ["before", "after"])
@pytest.mark.parametrize("fatal", range(9))
def test_a_kill_at_any_update_loses_nothing(world: World, death: str, fatal: int) -> None:
    survived = 0
    for wish in JOURNEY:
        world.wish_step(wish)
        for _ in range(20):
            world.engine.die = death if len(world.engine.updates) == fatal else None
            try:
                if world.converger.step() is None:
                    break
            except Died:
                world.crash()
                survived += 1
    assert survived == 1 or fatal >= len(world.engine.updates)
    assert world.ledger.instances.all() == []
    assert world.engine.resources == set()


@pytest.mark.parametrize("fatal", range(9))
def test_an_engine_that_fails_once_is_asked_again(world: World, fatal: int) -> None:
    for wish in JOURNEY:
        world.wish_step(wish)
        for _ in range(20):
            world.engine.down = EngineError("down") if len(world.engine.updates) == fatal else None
            if world.converger.step() is None:
                break
            for record in world.ledger.instances.unsettled():
                world.wish(lambda _: Update(values={"retry_at": 0.0}), record.id)
    assert world.ledger.instances.all() == []


def test_a_failed_snapshot_leaves_volume_and_container_and_the_error(world: World) -> None:
    world.wish_step("create")
    world.settle()
    world.engine.fail = {"Snapshot": "error: The store is full. [snapshot_failed]"}
    world.wish_step("dormant")
    world.settle()
    assert world.record.status is Status.RUNNING
    assert world.record.error_message == "The store is full."
    assert {VOLUME, CONTAINER} <= world.engine.resources


def test_a_corrupt_snapshot_leaves_the_instance_dormant_without_half_a_body(world: World) -> None:
    for wish in ("create", "dormant"):
        world.wish_step(wish)
        world.settle()
    world.engine.fail = {"Restore": "The archive is damaged. [snapshot_corrupt]", CONTAINER: "skipped"}
    world.wish_step("revive")
    world.settle()
    assert world.record.status is Status.DORMANT
    assert world.record.error_code == "snapshot_corrupt"
    assert VOLUME not in world.engine.resources
    world.engine.fail = {}
    world.wish_step("revive")
    world.settle()
    assert world.record.status is Status.RUNNING


def test_a_create_that_keeps_failing_ends_failed_and_can_be_deleted(world: World) -> None:
    world.engine.fail = {CONTAINER: "The engine refuses. [docker_error]"}
    world.wish_step("create")
    world.settle()
    assert world.record.status is Status.FAILED
    assert world.record.error_message == "The engine refuses."
    assert len(world.engine.updates) == 2
    world.engine.fail = {}
    world.wish_step("delete")
    world.settle()
    assert world.ledger.instances.all() == []


def test_a_taken_port_is_changed(world: World) -> None:
    world.engine.fail = {CONTAINER: "A port is taken. [port_taken]"}
    world.wish_step("create")
    world.converger.step()
    world.engine.fail = {}
    world.settle()
    assert world.record.status is Status.RUNNING
    assert (world.record.debug_port, world.record.stream_port) == (24999, 24998)


def test_wishes_of_one_moment_share_updates_and_a_failing_one_harms_nobody(world: World) -> None:
    for name in ("mu-a", "mu-b"):
        world.add(id=name, debug_port=None, stream_port=None)
    world.settle()
    before = len(world.engine.updates)
    world.engine.fail = {"mu-bad-": "No. [invalid_request]"}
    world.add(id="mu-c", debug_port=None, stream_port=None)
    world.add(id="mu-bad", debug_port=None, stream_port=None)
    world.wish(lambda r: lifecycle.wish_dormant(r, reason="test"), "mu-a")
    world.wish(lambda r: lifecycle.wish_absent(r, force=False), "mu-b")
    world.engine.before_delete = lambda _: None
    world.settle()
    statuses = {r.id: r.status for r in world.ledger.instances.all()}
    assert statuses == {"mu-a": Status.DORMANT, "mu-c": Status.RUNNING, "mu-bad": Status.FAILED}
    assert len(world.engine.updates) - before <= 3


def test_a_delete_that_fails_is_tried_again_and_stays_wanted(world: World) -> None:
    world.wish_step("create")
    world.settle()
    world.engine.fail_delete = {VOLUME: "busy [docker_error]"}
    world.wish_step("delete")
    world.converger.step()
    assert world.record.wanted is Wanted.ABSENT
    assert world.record.retry_at > 0
    world.engine.fail_delete = {}
    world.settle()
    assert world.ledger.instances.all() == []


def test_what_is_being_prepared_holds_up_nobody_else(world: World) -> None:
    world.preparing = {"mu-slow"}
    world.add(id="mu-slow", debug_port=None, stream_port=None)
    world.add(id="mu-quick", debug_port=None, stream_port=None)
    world.settle()
    statuses = {r.id: r.status for r in world.ledger.instances.all()}
    assert statuses == {"mu-slow": Status.CREATING, "mu-quick": Status.RUNNING}
    world.preparing = set()
    world.settle()
    assert world.ledger.instances.get("mu-slow").status is Status.RUNNING


def test_a_preparation_that_fails_is_the_step_failing(world: World) -> None:
    world.wish_step("create")
    world.settle()
    world.wish_step("dormant")
    world.unprepared = SnapshotFailed("The store is full.")
    world.settle()
    assert world.record.status is Status.RUNNING
    assert world.record.error_message == "The store is full."
    assert {VOLUME, CONTAINER} <= world.engine.resources
