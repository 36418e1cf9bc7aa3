"""Moves to other nodes, with the real ledger, service and converger around an engine in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from provisioner import lifecycle, placer
from provisioner.errors import Conflict, NoCapacity, SnapshotCorrupt
from provisioner.ledger.records import Moving, NodeStatus, SnapshotRecord, SnapshotState
from provisioner.lifecycle import Update
from provisioner.moves import MAX_PAUSE_S
from provisioner.placement import Place, choose_place
from provisioner.service import QUICK_START
from provisioner.states import Status, Wanted
from stacks.spec import Availability, NodeSpec, OfflinePolicy, PortRange
from tests.support.moves import DAY_S, Moves
from tests.support.records import make_record
from tests.support.world import ID, NAMES

HOME = NAMES.volume_urn(ID)


@pytest.fixture
def moves(ledger_location: Path | SecretStr) -> Iterator[Moves]:
    moves = Moves(ledger_location)
    yield moves
    moves.ledger.close()


def test_an_instance_of_a_lost_node_is_given_back_elsewhere_from_its_last_snapshot(moves: Moves) -> None:
    moves.add()
    moves.lose("a")
    moves.run()
    record = moves.record
    assert (record.status, record.node_id, record.moving, record.operation) == (Status.RUNNING, "b", None, None)
    assert moves.world.engine.made[HOME] == "old"
    assert record.restore_note is not None
    assert "Node a was lost" in record.restore_note
    assert "what it did after that is lost" in record.restore_note
    assert any("has not answered for" in message for message in moves.events("move"))


def test_a_node_is_waited_for_before_anything_is_given_up(moves: Moves) -> None:
    moves.add()
    moves.lose("a", ago_s=30)
    moves.run()
    assert (moves.record.node_id, moves.record.moving, moves.world.engine.made[HOME]) == ("a", None, "new")


def test_waiting_is_what_a_cluster_does_that_says_nothing(tmp_path: Path) -> None:
    moves = Moves(tmp_path, action="wait")
    moves.add()
    moves.lose("a")
    moves.run()
    assert (moves.record.node_id, moves.record.moving) == ("a", None)
    assert OfflinePolicy().action == "wait"


@pytest.mark.parametrize("applied", [False, True], ids=["before it was made", "before its browser answered"])
def test_what_was_to_be_revived_on_a_node_that_is_lost_is_revived_elsewhere_whatever_the_policy(
    tmp_path: Path, *, applied: bool
) -> None:
    moves = Moves(tmp_path, action="wait")
    moves.add()
    moves.world.wish(lambda r: lifecycle.wish_dormant(r, reason="test"))
    moves.world.settle()
    moves.service.revive(ID, method=QUICK_START, node_preference="a")
    if applied:
        moves.world.answering = False
        moves.world.settle()
        assert moves.record.applied_generation == moves.record.generation > moves.record.settled_generation
        moves.world.answering = True
    moves.lose("a", ago_s=1)
    moves.run()
    record = moves.record
    assert (record.status, record.node_id, record.moving) == (Status.RUNNING, "b", None)
    assert record.restore_note is not None
    assert "Node a was lost while it was being restored there." in record.restore_note
    assert not any("is lost" in message for message in moves.events("move"))


def test_who_came_back_just_before_its_node_was_lost_waits_for_it(tmp_path: Path) -> None:
    moves = Moves(tmp_path, action="wait")
    moves.add()
    moves.world.wish(lambda r: lifecycle.wish_dormant(r, reason="test"))
    moves.world.settle()
    moves.service.revive(ID, method=QUICK_START, node_preference="a")
    moves.world.settle()
    moves.lose("a")
    moves.service.give_up_body(ID, away_s=DAY_S, even_running=False)
    moves.run()
    assert (moves.record.status, moves.record.node_id, moves.record.moving) == (Status.RUNNING, "a", None)
    moves.world.wish(lambda r: lifecycle.wish_repaired(r, reason="its container is gone"))
    moves.mover.step()
    assert (moves.record.status, moves.record.node_id, moves.record.moving) == (Status.CREATING, "a", None)


def test_an_instance_without_a_snapshot_waits_for_its_node_and_says_so_once(moves: Moves) -> None:
    moves.add(snapshot=False)
    moves.lose("a")
    moves.run()
    assert (moves.record.node_id, moves.record.moving, moves.world.engine.made[HOME]) == ("a", None, "new")
    assert len(moves.events("not_moved")) == 1
    assert "has no snapshot" in moves.events("not_moved")[0]


def test_nothing_is_given_up_where_no_other_node_has_room(moves: Moves) -> None:
    moves.add()
    moves.lose("a")
    moves.lose("b")
    moves.run()
    assert (moves.record.wanted, moves.record.moving) == (Wanted.RUNNING, None)
    moves.observe("b", status=NodeStatus.ONLINE)
    moves.run()
    assert (moves.record.node_id, moves.record.status) == ("b", Status.RUNNING)


def test_no_more_are_given_up_than_other_nodes_have_room_for(moves: Moves) -> None:
    moves.observe("b", status=NodeStatus.ONLINE, memory_bytes=2 * 2**30)
    for number in range(4):
        moves.add(f"mu-n{number}", memory_gb=1.0)
    moves.lose("a")
    moves.mover.step()
    assert len(moves.ledger.instances.moving()) == 2
    moves.run()
    records = moves.ledger.instances.all()
    assert sorted((r.node_id, r.status) for r in records) == [("a", Status.RUNNING)] * 2 + [("b", Status.RUNNING)] * 2
    assert {moves.world.engine.made[NAMES.volume_urn(r.id)] for r in records if r.node_id == "a"} == {"new"}


def test_no_more_are_given_up_than_other_nodes_have_ports_for(moves: Moves) -> None:
    nodes = (moves.cluster.spec.nodes[0], NodeSpec(id="b", host="unix:///b", ports=PortRange(first=21000, last=21003)))
    moves.cluster.replace(moves.cluster.spec.model_copy(update={"nodes": nodes}))
    for number in range(3):
        moves.add(f"mu-n{number}")
    moves.lose("a")
    moves.mover.step()
    assert len(moves.ledger.instances.moving()) == 2


def test_where_those_go_that_leave_already_is_not_chosen_again_for_each_that_follows(
    moves: Moves, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        moves.add(f"mu-n{number}")
    moves.lose("a")
    chosen = 0

    def count(*args: Any, **kwargs: Any) -> Place:
        nonlocal chosen
        chosen += 1
        return choose_place(*args, **kwargs)

    monkeypatch.setattr(placer, "choose_place", count)
    moves.mover.step()
    assert (chosen, len(moves.ledger.instances.moving())) == (6, 6)


def test_who_leaves_already_is_counted_on_elsewhere_once_its_place_is_taken(moves: Moves) -> None:
    nodes = (*moves.cluster.spec.nodes, NodeSpec(id="c", host="unix:///c"))
    moves.cluster.replace(moves.cluster.spec.model_copy(update={"nodes": nodes}))
    moves.ledger.nodes.sync(nodes)
    for node_id in "bc":
        moves.observe(node_id, status=NodeStatus.ONLINE, memory_bytes=2**30)
    for number in range(2):
        moves.add(f"mu-n{number}", memory_gb=1.0)
    moves.lose("a")
    moves.service.give_up_body("mu-n0", away_s=DAY_S, even_running=True)
    counted_on = moves.service._placer._arriving["mu-n0"][1].node.id
    moves.ledger.instances.create(
        lambda _: (make_record(id="mu-new", node_id=counted_on, memory_gb=1.0, debug_port=22000, stream_port=22001), "")
    )
    with pytest.raises(NoCapacity):  # the other node's room is for the first one now
        moves.service.give_up_body("mu-n1", away_s=DAY_S, even_running=True)


def test_a_drain_that_its_node_does_not_live_to_see_the_end_of_becomes_a_move(moves: Moves) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    drained = moves.record.snapshot_generation
    moves.lose("a")
    moves.run()
    record = moves.record
    assert (record.node_id, record.status, record.moving) == ("b", Status.RUNNING, None)
    assert moves.world.engine.made[HOME] == "old"
    assert "what it did after that is lost" in (record.restore_note or "")
    assert record.snapshot(drained) is None
    assert NAMES.snapshot_urn(ID, drained or 0) not in moves.world.engine.made


def test_a_drain_whose_snapshot_was_whole_loses_nothing_with_its_node(moves: Moves) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    moves.world.converger.step()  # the snapshot
    moves.lose("a")
    moves.run()
    assert (moves.record.node_id, moves.record.restore_note) == ("b", None)
    assert moves.world.engine.made[HOME] == "new"


def test_a_drain_that_waits_for_its_node_holds_up_no_other(tmp_path: Path) -> None:
    moves = Moves(tmp_path, action="wait")
    moves.add("mu-stuck")
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    moves.lose("a")
    moves.world.add(id=ID, node_id="b")
    moves.world.settle()
    nodes = (*moves.cluster.spec.nodes, NodeSpec(id="c", host="unix:///c"))
    moves.cluster.replace(moves.cluster.spec.model_copy(update={"nodes": nodes}))
    moves.ledger.nodes.sync(nodes)
    moves.observe("c", status=NodeStatus.ONLINE)
    moves.mark("b", Availability.DRAINING)
    moves.run()
    assert (moves.record.node_id, moves.record.status) == ("c", Status.RUNNING)


def test_a_failed_instance_stays_with_its_lost_node_and_that_is_said_once(moves: Moves) -> None:
    moves.add()
    moves.world.wish(lambda _: Update(values={"status": Status.FAILED}))
    moves.lose("a")
    moves.run()
    assert (moves.record.node_id, moves.record.status, moves.world.engine.made[HOME]) == ("a", Status.FAILED, "new")
    assert len(moves.events("not_moved")) == 1
    assert "a failed instance can't be moved" in moves.events("not_moved")[0]


def test_that_the_room_elsewhere_changes_all_the_time_is_no_news(moves: Moves) -> None:
    moves.add(memory_gb=4.0)
    moves.lose("a")
    for memory_gib in (1, 2, 3):
        moves.observe("b", status=NodeStatus.ONLINE, memory_bytes=memory_gib * 2**30)
        moves.run(rounds=1)
    assert len(moves.events("not_moved")) == 1


def test_a_move_that_worked_long_ago_slows_down_no_later_one(moves: Moves) -> None:
    moves.add()
    moves.mover._pauses[ID] = (time.monotonic() - MAX_PAUSE_S - 1, MAX_PAUSE_S)
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    assert moves.record.moving is Moving.DRAIN
    assert moves.mover._pauses[ID][1] < 2


def test_an_instance_that_goes_to_sleep_or_is_deleted_is_not_moved(moves: Moves) -> None:
    moves.add()
    moves.world.wish(lambda r: lifecycle.wish_dormant(r, reason="test"))
    moves.lose("a")
    moves.mover.step()
    assert (moves.record.wanted, moves.record.moving) == (Wanted.DORMANT, None)
    moves.world.wish(lambda r: lifecycle.wish_absent(r, force=False))
    moves.mover.step()
    assert (moves.record.wanted, moves.record.moving) == (Wanted.ABSENT, None)


def test_steps_on_a_silent_node_stay_out_of_updates_until_it_answers(moves: Moves) -> None:
    moves.add()
    moves.cluster.replace(moves.cluster.spec.model_copy(update={"offline": OfflinePolicy()}))
    moves.world.wish(lambda r: lifecycle.wish_dormant(r, reason="test"))
    for values in ({"status": NodeStatus.OFFLINE, "misses": 3}, {"status": NodeStatus.ONLINE, "misses": 1}):
        moves.observe("a", **values)
        before = len(moves.world.engine.updates)
        assert moves.world.converger.step() is None
        assert len(moves.world.engine.updates) == before
    moves.observe("a", status=NodeStatus.ONLINE)
    moves.world.settle()
    assert moves.record.status is Status.DORMANT


def test_a_delete_waits_for_its_node_unless_it_is_forced(moves: Moves) -> None:
    moves.add()
    moves.lose("a", ago_s=1)
    moves.world.wish(lambda r: lifecycle.wish_absent(r, force=False))
    assert moves.world.converger.step() is None
    moves.world.wish(lambda r: lifecycle.wish_absent(r, force=True))
    moves.world.settle()
    assert moves.ledger.instances.find(ID) is None


def test_what_sleeps_safely_is_given_up_on_a_lost_node_without_waiting(moves: Moves) -> None:
    moves.add()
    moves.world.wish(lambda r: lifecycle.wish_dormant(r, reason="test"))
    moves.world.converger.step()  # the snapshot
    assert moves.record.sleeps_safely
    moves.lose("a", ago_s=1)
    moves.world.settle()
    assert (moves.record.status, moves.record.moving) == (Status.DORMANT, None)


def test_a_drained_node_is_left_by_one_instance_after_the_other_those_in_use_last(moves: Moves) -> None:
    moves.add(ID, status=Status.RUNNING, last_active_at=100.0)
    moves.add("mu-busy", last_active_at=100.0)
    moves.add("mu-idle", last_active_at=900.0)
    for instance_id, status, at in ((ID, "running", 100.0), ("mu-busy", "running", 500.0), ("mu-idle", "idle", 900.0)):
        moves.world.wish(lambda _, s=status, t=at: Update(values={"status": s, "last_active_at": t}), instance_id)
    moves.mark("a", Availability.DRAINING)
    order: list[str] = []
    for _ in range(12):
        moves.mover._pauses.clear()
        moves.mover.step()
        begun = [r.id for r in moves.ledger.instances.moving() if r.moving is Moving.DRAIN]
        assert len(begun) <= 1
        order += [instance_id for instance_id in begun if instance_id not in order]
        moves.world.settle()
    assert order == ["mu-idle", ID, "mu-busy"]
    assert {r.node_id for r in moves.ledger.instances.all()} == {"b"}
    assert {moves.world.engine.made[NAMES.volume_urn(instance_id)] for instance_id in order} == {"new"}


@pytest.mark.parametrize("crash_after", range(1, 8))
def test_a_drain_that_is_interrupted_anywhere_loses_nothing_and_goes_on(moves: Moves, crash_after: int) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    for step in range(24):
        if step == crash_after:
            moves.restart()
        if step % 2:
            moves.world.wish(lambda _: Update(values={"retry_at": 0.0}))
            moves.world.converger.step()
        else:
            moves.mover._pauses.clear()
            moves.mover.step()
        assert "new" in moves.world.engine.made.values()
    assert (moves.record.node_id, moves.record.status, moves.record.moving) == ("b", Status.RUNNING, None)
    assert moves.world.engine.made[HOME] == "new"


def test_uncordoning_ends_the_drain_and_what_was_on_its_way_arrives(moves: Moves) -> None:
    moves.add()
    moves.add("mu-other")
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    moves.mark("a", Availability.ACTIVE)
    moves.run()
    assert sorted(r.node_id for r in moves.ledger.instances.all()) in (["a", "a"], ["a", "b"])
    assert {r.status for r in moves.ledger.instances.all()} == {Status.RUNNING}


def test_a_drain_waits_while_no_other_node_has_room(moves: Moves) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.mark("b", Availability.CORDONED)
    moves.run()
    assert (moves.record.node_id, moves.record.status) == ("a", Status.RUNNING)
    assert len(moves.events("not_moved")) == 1
    moves.mark("b", Availability.ACTIVE)
    moves.run()
    assert moves.record.node_id == "b"


@pytest.mark.parametrize("lost", [True, False])
def test_what_is_too_large_for_any_node_by_now_keeps_no_other_from_being_moved(moves: Moves, *, lost: bool) -> None:
    moves.add(memory_gb=4.0)
    moves.add("mu-small", memory_gb=1.0)
    for node_id in "ab":  # both machines were given less
        moves.observe(node_id, status=NodeStatus.ONLINE, memory_bytes=2 * 2**30)
    if lost:
        moves.observe("a", status=NodeStatus.OFFLINE, misses=9, offline_since=1.0, memory_bytes=2 * 2**30)
    else:
        moves.mark("a", Availability.DRAINING)
    moves.run()
    assert moves.ledger.instances.get("mu-small").node_id == "b"
    assert (moves.record.node_id, moves.record.wanted) == ("a", Wanted.RUNNING)
    assert "4 GB is more than any node has" in moves.events("not_moved")[0]


def test_a_drain_whose_snapshot_fails_leaves_the_instance_running(moves: Moves) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.world.engine.fail = {"-snapshot-": "The store is full. [snapshot_failed]"}
    moves.run(rounds=3)
    assert (moves.record.node_id, moves.record.status, moves.world.engine.made[HOME]) == ("a", Status.RUNNING, "new")
    moves.world.engine.fail = {}
    moves.run()
    assert (moves.record.node_id, moves.record.status) == ("b", Status.RUNNING)


def test_who_wants_a_moving_instance_asleep_gets_it_and_it_stays_asleep(moves: Moves) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    assert moves.record.moving is Moving.DRAIN
    moves.service.make_dormant(ID)
    moves.run()
    assert (moves.record.status, moves.record.moving) == (Status.DORMANT, None)


def test_a_damaged_snapshot_ends_the_move_and_stays(moves: Moves) -> None:
    moves.add()
    moves.lose("a")
    moves.world.engine.fail = {"-restore": "It is damaged. [snapshot_corrupt]"}
    moves.run()
    assert (moves.record.status, moves.record.moving, moves.record.error_code) == (
        Status.DORMANT,
        None,
        SnapshotCorrupt.code,
    )
    assert [s.state for s in moves.record.snapshots] == [SnapshotState.VERIFIED]


def test_an_instance_never_goes_where_something_of_it_is_left_over(moves: Moves) -> None:
    moves.add()
    moves.lose("a")
    moves.run()
    moves.ledger.leftovers.add(node_id="a", urn=NAMES.container_urn(ID), name="c")
    moves.ledger.leftovers.add(node_id="b", urn=NAMES.container_urn("mu-testing"), name="of another")
    moves.observe("a", status=NodeStatus.ONLINE)
    moves.mark("b", Availability.DRAINING)
    moves.run()
    assert (moves.record.node_id, moves.record.status) == ("b", Status.RUNNING)
    moves.ledger.leftovers.remove(moves.ledger.leftovers.list("a")[0].id)
    moves.run()
    assert moves.record.node_id == "a"


def test_a_revive_of_what_is_being_moved_waits_for_the_move(moves: Moves) -> None:
    moves.add()
    moves.lose("a")
    moves.mover.step()
    with pytest.raises(Conflict, match="being made dormant"):
        moves.service.revive(ID, method=QUICK_START)
    moves.world.settle()
    moves.mover._pauses.clear()
    moves.mover.step()
    generation = moves.record.generation
    assert moves.service.revive(ID, method=QUICK_START).generation == generation


def test_who_wakes_what_was_given_up_is_told_what_is_lost(moves: Moves) -> None:
    moves.add()
    moves.lose("a")
    moves.mover.step()
    moves.world.settle()
    assert moves.service.revive(ID, method=QUICK_START).restore_note == moves.record.restore_note
    assert "Node a was lost" in (moves.record.restore_note or "")


def test_a_drained_instance_that_is_being_deleted_is_not_moved(moves: Moves) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    moves.world.wish(lambda r: lifecycle.wish_absent(r, force=False))
    moves.lose("a")
    moves.mover.step()
    assert moves.record.wanted is Wanted.ABSENT


def test_only_what_runs_gets_a_live_snapshot() -> None:
    assert lifecycle.wish_live_snapshot(make_record(status=Status.DORMANT), reason="r") is None
    assert lifecycle.wish_live_snapshot(make_record(generation=2), reason="r") is None
    pending = SnapshotRecord(
        instance_id=ID, generation=1, node_id="a", state=SnapshotState.PENDING, bytes=None, created_at=1.0, live=True
    )
    assert lifecycle.wish_live_snapshot(make_record(snapshots=(pending,)), reason="r") is None
