"""When a running instance gets a snapshot, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.errors import EngineError
from provisioner.ledger.records import InstanceRecord, NodeStatus, SnapshotRecord, SnapshotState
from provisioner.lifecycle import Update
from provisioner.live_snapshots import AT_ONCE, LiveSnapshots, is_due
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import ClusterSpec
from tests.support.records import make_record
from tests.support.world import ID, NAMES, World, empty_ledger

HOME = NAMES.volume_urn(ID)


def snapshot_at(
    created_at: float, *, state: SnapshotState = SnapshotState.VERIFIED, live: bool = True
) -> SnapshotRecord:
    return SnapshotRecord(
        instance_id=ID, generation=1, node_id="local", state=state, bytes=1, created_at=created_at, live=live
    )


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        ({}, True),
        ({"created_at": 950.0}, False),
        ({"snapshots": (snapshot_at(950.0),)}, False),
        ({"snapshots": (snapshot_at(500.0),), "last_active_at": 600.0}, True),
        ({"snapshots": (snapshot_at(500.0),), "last_active_at": 400.0}, False),
        ({"snapshots": (snapshot_at(500.0),), "last_active_at": 400.0, "debug_port": None}, True),
        ({"snapshots": (snapshot_at(500.0, state=SnapshotState.PENDING),)}, False),
        ({"status": Status.IDLE}, True),
        ({"status": Status.DORMANT, "wanted": Wanted.DORMANT}, False),
        ({"status": Status.CREATING}, False),
        ({"generation": 2}, False),
    ],
)
def test_what_is_due(fields: dict[str, object], due: bool) -> None:
    record = make_record(**{"created_at": 100.0, "last_active_at": 900.0} | fields)
    assert is_due(record, now=1000.0, every_s=100.0) is due


@pytest.fixture
def world(ledger_location: Path | SecretStr) -> Iterator[World]:
    world = World(empty_ledger(ledger_location))
    world.ledger.nodes.sync(ClusterSpec(name="unit").nodes)
    world.ledger.nodes.observe("local", values={"status": NodeStatus.ONLINE})
    yield world
    world.ledger.close()


def loop_of(world: World, *, every_minutes: float | None = 1) -> LiveSnapshots:
    cluster = Cluster(ClusterSpec(name="unit", snapshot_every_minutes=every_minutes))
    return LiveSnapshots(world.ledger, cluster=cluster, settings=Settings(), changes=Changes())


def add(world: World, instance_id: str = ID) -> InstanceRecord:
    world.add(id=instance_id)
    world.settle()
    world.engine.made[NAMES.volume_urn(instance_id)] = f"home of {instance_id}"
    return world.ledger.instances.get(instance_id)


def test_a_cluster_that_says_nothing_takes_none(world: World) -> None:
    add(world)
    loop_of(world, every_minutes=None).step()
    assert world.record.snapshots == ()


def test_a_running_instance_gets_one_and_stays_settled_all_the_while(world: World) -> None:
    before = add(world)
    loop_of(world).step()
    assert (world.record.operation, world.record.status) == (None, Status.RUNNING)
    world.settle()
    assert [(s.state, s.live) for s in world.record.snapshots] == [(SnapshotState.VERIFIED, True)]
    assert world.engine.made[NAMES.snapshot_urn(ID, world.record.generation)] == f"home of {ID}"
    assert world.engine.made[HOME] == f"home of {ID}"
    assert world.record.generation == before.generation + 1
    assert world.converger.step() is None


def test_a_newer_one_takes_the_place_of_the_last(world: World) -> None:
    add(world)
    for content in ("first", "second"):
        world.engine.made[HOME] = content
        world.wish(lambda r: lifecycle.wish_live_snapshot(r, reason="test"))
        world.settle()
    assert [s.state for s in world.record.snapshots] == [SnapshotState.VERIFIED]
    kept = [content for urn, content in world.engine.made.items() if "-snapshot-" in urn]
    assert kept == ["second"]


def test_only_a_few_at_once(world: World) -> None:
    for number in range(AT_ONCE + 2):
        add(world, f"mu-n{number}")
    loop = loop_of(world)
    loop.step()
    loop.step()
    assert sum(r.pending_live is not None for r in world.ledger.instances.all()) == AT_ONCE
    world.settle()
    loop.step()
    world.settle()
    assert all(r.last_verified is not None for r in world.ledger.instances.all())


def test_one_that_fails_harms_nobody_and_is_not_tried_again_at_once(world: World) -> None:
    add(world)
    loop = loop_of(world)
    world.engine.fail = {"-snapshot-": "The store is full. [snapshot_failed]"}
    loop.step()
    world.settle()
    world.settle()  # what there may be of it is tidied up
    assert (world.record.status, world.record.error_code, world.record.snapshots) == (Status.RUNNING, None, ())
    loop.step()
    assert world.record.pending_live is None
    assert any(e.kind == "live_snapshot_failed" for e in world.ledger.events.list(instance_id=ID))


@pytest.mark.parametrize("fails_then", [False, True])
def test_an_update_that_failed_as_a_whole_leaves_no_error_on_it_once_it_is_tried_again(
    world: World, fails_then: bool
) -> None:
    add(world)
    world.wish(lambda r: lifecycle.wish_live_snapshot(r, reason="test"))
    world.engine.down = EngineError("It is down.")
    world.converger.step()
    assert world.record.error_code == EngineError.code
    world.engine.down = None
    world.engine.fail = {"-snapshot-": "The store is full. [snapshot_failed]"} if fails_then else {}
    world.settle()
    assert (world.record.status, world.record.error_code, world.record.attempts) == (Status.RUNNING, None, 0)


@pytest.mark.parametrize("wish", ["dormant", "delete", "kill"])
def test_whoever_wants_something_else_meanwhile_gets_it_and_nothing_is_left(world: World, wish: str) -> None:
    add(world)
    world.wish(lambda r: lifecycle.wish_live_snapshot(r, reason="test"))
    world.wish_step(wish)
    world.settle()
    snapshots = [urn for urn in world.engine.made if "-snapshot-" in urn]
    if wish == "dormant":
        assert world.record.status is Status.DORMANT
        assert [s.live for s in world.record.snapshots] == [False]
        assert snapshots == [NAMES.snapshot_urn(ID, world.record.snapshot_generation or 0)]
    else:
        assert world.ledger.instances.find(ID) is None
        assert snapshots == []


def test_a_crash_at_any_point_leaves_one_snapshot_in_the_end(world: World) -> None:
    from tests.support.fake_engine import Died

    add(world)
    for how in ("before", "during", "after"):
        world.wish(lambda r: lifecycle.wish_live_snapshot(r, reason="test"))
        world.engine.die = how
        with pytest.raises(Died):
            world.converger.step()
        world.engine.die = None
        world.crash()
        world.settle()
        assert [(s.state, s.live) for s in world.record.snapshots] == [(SnapshotState.VERIFIED, True)]
        assert world.record.status is Status.RUNNING
    world.wish(lambda _: Update(values={"status": Status.RUNNING}))
    assert len([urn for urn in world.engine.made if "-snapshot-" in urn]) == 1
