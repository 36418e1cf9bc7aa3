"""The converger over a real ledger and an engine in memory.

Two properties hold for every workflow: a step that is carried out twice succeeds, and a failure or a kill at any step
loses nothing, because the work is found again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from provisioner import converger, lifecycle
from provisioner.engine import UpdateResult
from provisioner.errors import DockerError, EngineError, LeaseLost, SnapshotFailed
from provisioner.ledger.instances import Update
from provisioner.ledger.records import NodeStatus, SnapshotRecord, SnapshotState
from provisioner.states import Status, Wanted
from provisioner.work import find_error, plan
from stacks.spec import ClusterSpec, NodeSpec, PortRange
from tests.support.fake_engine import Died
from tests.support.records import make_record
from tests.support.world import ID, NAMES, World, empty_ledger

VOLUME, CONTAINER = NAMES.volume_urn(ID), NAMES.container_urn(ID)


@pytest.fixture
def world(ledger_location: Path | SecretStr) -> Iterator[World]:
    world = World(empty_ledger(ledger_location))
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


@pytest.mark.parametrize("where", ["unprepared", "unswept", "down"])
def test_a_lease_that_was_lost_is_no_failure_of_the_step(world: World, where: str) -> None:
    world.wish_step("create")
    world.settle()
    world.engine.made.clear()
    world.engine.resources.clear()
    world.wish_step("delete")
    before = world.record
    lost = LeaseLost("This process does not lead any more.")
    if where == "down":
        world.engine.down = lost
    else:
        getattr(world, where)[ID] = lost
    with pytest.raises(LeaseLost):
        world.converger.step()
    assert world.record == before
    world.engine.down = None
    world.unprepared.clear()
    world.unswept.clear()
    world.crash()  # another one leads
    world.settle()
    assert world.ledger.instances.all() == []


@pytest.mark.parametrize("death", ["before", "during", "after"])
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


def test_a_taken_port_is_changed_for_any_of_the_nodes(world: World) -> None:
    world.cluster.replace(
        ClusterSpec(name="unit", nodes=(NodeSpec(id="local", ports=PortRange(first=20999, last=21002)),))
    )
    world.engine.fail = {CONTAINER: "A port is taken. [port_taken]"}
    world.wish_step("create")
    assert (world.record.debug_port, world.record.stream_port) == (21000, 21001)
    world.converger.step()
    assert (world.record.debug_port, world.record.stream_port) == (21002, 20999)


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
    world.unprepared = {ID: SnapshotFailed("The store is full.")}
    world.settle()
    assert world.record.status is Status.RUNNING
    assert world.record.error_message == "The store is full."
    assert {VOLUME, CONTAINER} <= world.engine.resources


def test_what_the_stack_never_got_to_know_of_a_deleted_instance_is_swept(world: World) -> None:
    world.wish_step("create")
    world.engine.die = "during"
    with pytest.raises(Died):
        world.converger.step()
    world.engine.die = None
    world.crash()
    assert {VOLUME, CONTAINER} <= world.engine.made.keys()
    assert world.engine.resources == set()
    world.wish_step("delete")
    world.unswept = {ID: DockerError("busy")}
    world.converger.step()
    assert world.record.wanted is Wanted.ABSENT
    world.unswept = {}
    world.settle()
    assert world.engine.made == {}
    assert world.ledger.instances.all() == []


def test_what_failed_a_thousand_times_is_tried_again_all_the_same(world: World) -> None:
    world.wish_step("create")
    world.settle()
    world.wish_step("delete")
    world.wish(lambda _: Update(values={"attempts": 5000}))
    world.engine.fail_delete = {VOLUME: "busy [docker_error]"}
    world.converger.step()
    assert world.record.attempts == 5001
    world.engine.fail_delete = {}
    world.settle()
    assert world.ledger.instances.all() == []


def test_more_than_a_batch_in_preparation_holds_up_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converger, "BATCH", 2)
    for name in ("mu-s1", "mu-s2", "mu-s3", "mu-z"):
        world.add(id=name)
    world.preparing = {"mu-s1", "mu-s2", "mu-s3"}
    world.converger.step()
    assert world.ledger.instances.get("mu-z").status is Status.RUNNING


def test_a_preparation_that_crashes_harms_nobody_else(world: World) -> None:
    for name in ("mu-bad", "mu-good"):
        world.add(id=name)
    world.unprepared = {"mu-bad": KeyError("a bug")}
    world.settle()
    assert world.ledger.instances.get("mu-good").status is Status.RUNNING
    assert world.ledger.instances.get("mu-bad").status is Status.FAILED


def test_one_that_fails_whole_updates_is_set_apart_from_the_others(world: World) -> None:
    for name in ("mu-bad", "mu-x", "mu-y"):
        world.add(id=name)
    world.engine.poison = "mu-bad"
    for _ in range(4):
        for record in world.ledger.instances.unsettled():
            world.wish(lambda _: Update(values={"retry_at": 0.0}), record.id)
        world.converger.step()
    assert world.ledger.instances.get("mu-x").status is Status.RUNNING
    assert world.ledger.instances.get("mu-y").status is Status.RUNNING
    assert world.ledger.instances.get("mu-bad").status is Status.CREATING
    world.engine.poison = None
    world.settle()
    assert world.ledger.instances.get("mu-bad").status is Status.RUNNING


def test_repairs_are_not_held_up_by_a_stream_of_other_work(world: World) -> None:
    world.wish_step("create")
    world.settle()
    world.engine.made.pop(CONTAINER)
    world.wish(lambda r: lifecycle.wish_repaired(r, reason="gone"))
    world.add(id="mu-new")
    world.converger.step()
    assert world.record.status is Status.RUNNING
    assert world.engine.made[CONTAINER]


def test_a_snapshot_that_was_whole_before_its_node_was_lost_is_recorded_without_the_node(world: World) -> None:
    world.ledger.nodes.sync(world.cluster.nodes)
    world.ledger.nodes.observe("local", values={"status": NodeStatus.ONLINE})
    for instance_id in (ID, "mu-other"):
        world.wish_step("create", instance_id)
    world.settle()
    for instance_id in (ID, "mu-other"):
        world.wish_step("dormant", instance_id)
    world.ledger.nodes.observe("local", values={"status": NodeStatus.OFFLINE, "misses": 3})
    assert world.converger.step() is None
    world.captured.add(ID)
    world.settle()
    assert world.record.status is Status.DORMANT
    assert world.ledger.instances.get("mu-other").operation == "making_dormant"


def test_an_engine_that_is_down_does_not_stop_the_converger_at_a_node_in_doubt(world: World) -> None:
    world.engine.fail = {CONTAINER: "There is no network. [docker_not_found]"}
    world.wish_step("create")
    world.converger.step()
    world.wish(lambda _: Update(values={"retry_at": 0.0}))
    world.engine.down = EngineError("down")
    world.converger.step()
    assert world.record.retry_at > 0


def test_nobody_is_told_of_another_instance_s_error(world: World) -> None:
    work = plan(world.add(), names=NAMES)
    assert work is not None
    other = NAMES.container_urn("mu-other")
    error = find_error(work, UpdateResult(errors={other: "Its secret is out. [docker_error]"}), names=NAMES)
    assert error is not None
    assert error.message == "The engine did not get to it."


@pytest.mark.parametrize("code", ["docker_error", "port_taken", "invalid_request"])
def test_a_repair_is_never_given_up(world: World, code: str) -> None:
    """Its instance has somebody's profile, and a failed one can only be deleted."""
    world.wish_step("create")
    world.settle()
    world.engine.made.pop(CONTAINER)
    world.wish(lambda r: lifecycle.wish_repaired(r, reason="gone"))
    world.engine.fail = {CONTAINER: f"Not now. [{code}]"}
    for _ in range(5):
        world.wish(lambda _: Update(values={"retry_at": 0.0}))
        world.converger.step()
    assert world.record.status is Status.CREATING
    assert world.record.attempts == 5
    world.engine.fail = {}
    world.settle()
    assert world.record.status is Status.RUNNING


def test_a_snapshot_of_a_dormancy_that_failed_is_removed_once_the_instance_runs_again(world: World) -> None:
    """It may be whole, in the stack, and the only copy that can be reached: until then it is kept."""
    world.wish_step("create")
    world.settle()
    world.wish_step("dormant")
    world.engine.die = "after"
    with pytest.raises(Died):
        world.converger.step()
    world.engine.die = None
    world.crash()
    world.unprepared = {ID: SnapshotFailed("The node does not answer.")}
    world.answering = False
    world.settle()
    snapshot = NAMES.snapshot_urn(ID, 2)
    assert world.record.status is Status.RUNNING
    assert snapshot in world.engine.made
    world.unprepared = {}
    world.wish(lambda r: lifecycle.note_ready(r, generation=r.generation))
    world.settle()
    assert snapshot not in world.engine.made.keys() | world.engine.resources
    assert world.record.snapshots == ()
    assert world.record.error_message == "The node does not answer."


def test_an_archive_that_never_became_a_resource_is_removed_too(world: World) -> None:
    world.wish_step("create")
    world.settle()
    world.wish_step("dormant")
    world.engine.die = "before"
    with pytest.raises(Died):
        world.converger.step()
    world.engine.die = None
    world.crash()
    world.unprepared = {ID: SnapshotFailed("The node does not answer.")}
    world.converger.step()
    world.unprepared = {}
    world.wish_step("dormant")
    world.settle()
    assert world.record.status is Status.DORMANT
    assert [urn for urn in world.engine.made if "Snapshot" in urn] == [NAMES.snapshot_urn(ID, 4)]


def test_a_failed_dormancy_takes_no_older_snapshot_s_place() -> None:
    rows = {2: SnapshotState.VERIFIED, 4: SnapshotState.EXPIRING, 6: SnapshotState.PENDING}
    snapshots = tuple(
        SnapshotRecord(instance_id=ID, generation=g, node_id="local", state=state, bytes=1, created_at=1.0)
        for g, state in rows.items()
    )
    record = make_record(wanted=Wanted.DORMANT, generation=6, snapshot_generation=6, snapshots=snapshots)
    update = lifecycle.note_snapshot(record, generation=6, size_bytes=1, keep=2)
    assert update is not None
    assert [s.generation for s in update.put_snapshots] == [6]  # 2 is the one older that is kept


@pytest.mark.parametrize("die", [None, "during"])
@pytest.mark.parametrize("fail", ["nothing", "Snapshot", "Restore", "volume:", "container:"])
@pytest.mark.parametrize("wishes", [JOURNEY[:1], JOURNEY[:2], JOURNEY[:3]], ids=lambda wishes: wishes[-1])
def test_a_delete_during_an_update_wins_whatever_becomes_of_that(
    world: World, wishes: tuple[str, ...], fail: str, die: str | None
) -> None:
    for wish in wishes[:-1]:
        world.wish_step(wish)
        world.settle()
    world.wish_step(wishes[-1])
    world.engine.fail = {fail: "No. [invalid_request]"}
    world.engine.die = die
    wished: list[str] = []

    def delete() -> None:
        world.wish_step("delete")
        wished.append("delete")

    world.engine.meanwhile = delete
    try:
        world.converger.step()
    except Died:
        world.crash()
    world.engine.fail, world.engine.die, world.engine.meanwhile = {}, None, lambda: None
    if not wished:
        delete()  # there was no update: the capture before it failed
    assert world.record.wanted is Wanted.ABSENT
    world.settle()
    assert world.ledger.instances.all() == []
    assert world.engine.resources == set()
    assert world.engine.made == {}


def test_a_revive_that_was_killed_and_then_failed_leaves_no_body_behind(world: World) -> None:
    """The stack never got to know the body: it would run on, on ports that are somebody else's by then."""
    for wish in ("create", "dormant"):
        world.wish_step(wish)
        world.settle()
    world.wish_step("revive")
    world.engine.die = "during"
    with pytest.raises(Died):
        world.converger.step()
    world.engine.die = None
    world.crash()
    world.engine.fail = {"Restore": "The archive is damaged. [snapshot_corrupt]"}
    world.converger.step()
    world.engine.fail = {}
    world.unswept = {ID: DockerError("busy")}
    world.converger.step()
    assert world.record.settled_generation < world.record.generation
    world.unswept = {}
    world.settle()
    assert world.record.status is Status.DORMANT
    assert list(world.engine.made) == [NAMES.snapshot_urn(ID, 2)]


def test_a_clock_that_was_set_back_delays_no_retry(world: World) -> None:
    world.wish_step("create")
    world.wish(lambda _: Update(values={"retry_at": time.time() + 86400}))
    world.converger.step()
    assert world.record.status is Status.RUNNING
