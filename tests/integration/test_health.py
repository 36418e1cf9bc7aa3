"""Nodes that hang and come back, instances that become ready or don't, containers that get lost: on real engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.health import NodeHealth
from provisioner.ledger.instances import Update
from provisioner.ledger.records import NodeStatus, SnapshotRecord, SnapshotState
from provisioner.readiness import Readiness
from provisioner.repair import Repair
from provisioner.states import Status, Wanted
from stacks.names import CONTAINER_TYPE, VOLUME_TYPE
from stacks.spec import BROWSER_IMAGE
from tests.support.engines import Engine
from tests.support.watched import SLEEPER, Watched, wait_until

AWAITED = {"status": Status.CREATING, "settled_generation": 0}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    watched.clean_up()


# ---- nodes


def test_a_node_that_answers_is_online_with_what_it_has(watched: Watched) -> None:
    health = NodeHealth(watched.ledger, settings=watched.settings, **watched.parts())
    health.beat_once()
    health.beat_once()
    health.close()
    node = watched.ledger.nodes.get("local")
    info = watched.docker.info()
    assert node.status is NodeStatus.ONLINE
    assert node.error is None
    assert node.last_heartbeat is not None
    assert (node.cpu_cores, node.memory_bytes) == (info["NCPU"], info["MemTotal"])
    assert node.disk_bytes is not None
    for percent in (node.cpu_percent, node.memory_percent, node.disk_percent):
        assert percent is not None
        assert 0 <= percent <= 100
    assert len(watched.events("node_online")) == 1
    assert watched.docker.volumes.list(filters={"label": f"machineuse.cluster={watched.cluster.name}"}) == []


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(browser_image=False) as engine:
        yield engine


def test_a_frozen_node_goes_offline_and_comes_back_by_itself(tmp_path: Path, engine: Engine) -> None:
    watched = Watched(tmp_path, url=engine.url, node_timeout_s=2, heartbeat_s=0.1, offline_after_misses=2)
    health = NodeHealth(watched.ledger, settings=watched.settings, **watched.parts())
    try:
        health.beat_once()
        online = watched.ledger.nodes.get("local")
        assert online.status is NodeStatus.ONLINE
        engine.freeze()
        threads = threading.active_count()

        def offline() -> bool:
            health.step()
            assert threading.active_count() <= threads + 1
            return watched.ledger.nodes.get("local").status is NodeStatus.OFFLINE

        wait_until(offline, what="the frozen node is offline")
        frozen = watched.ledger.nodes.get("local")
        assert frozen.last_heartbeat == online.last_heartbeat
        assert "does not answer" in (frozen.error or "")
        health.step()
        engine.thaw()

        def back() -> bool:
            health.step()
            return watched.ledger.nodes.get("local").status is NodeStatus.ONLINE

        wait_until(back, what="the node is back")
        assert watched.ledger.nodes.get("local").error is None
        assert len(watched.events("node_offline")) == 1
        assert len(watched.events("node_online")) == 2
    finally:
        engine.thaw()
        health.close()
        watched.clean_up()


# ---- readiness


@pytest.fixture
def readiness(watched: Watched) -> Iterator[Readiness]:
    readiness = Readiness(watched.ledger, settings=watched.settings, **watched.parts())
    readiness.start()
    yield readiness
    readiness.stop()


def test_a_browser_is_ready_when_it_answers(watched: Watched, readiness: Readiness) -> None:
    record = watched.add_browser(**AWAITED)
    readiness.watch(record)
    readiness.watch(record)
    watched.run(record)
    wait_until(lambda: watched.get(record).status is Status.RUNNING, what="the browser is ready")
    assert watched.get(record).settled_generation == 1
    assert len(watched.events("ready")) == 1


def test_an_instance_that_was_awaited_when_the_service_stopped_is_found_again(watched: Watched) -> None:
    record = watched.add(**AWAITED)
    watched.run(record, command=SLEEPER)
    readiness = Readiness(watched.ledger, settings=watched.settings, **watched.parts())
    readiness.start()
    wait_until(lambda: watched.get(record).status is Status.RUNNING, what="the container is ready")
    readiness.stop()


def test_a_container_whose_command_ends_at_once_has_failed_and_says_so(watched: Watched, readiness: Readiness) -> None:
    record = watched.add(**AWAITED)
    watched.run(
        record, command=["sh", "-c", "echo no such file >&2; exit 7"], restart_policy={"Name": "unless-stopped"}
    )
    readiness.watch(record)
    wait_until(lambda: watched.get(record).status is Status.FAILED, what="it has failed")
    failed = watched.get(record)
    assert failed.error_code == "not_ready"
    assert "exit code 7" in (failed.error_message or "")
    assert "no such file" in (failed.error_message or "")


def test_a_browser_that_does_not_answer_in_time_has_failed(tmp_path: Path) -> None:
    watched = Watched(tmp_path, ready_timeout_s=1.5)
    readiness = Readiness(watched.ledger, settings=watched.settings, **watched.parts())
    readiness.start()
    try:
        record = watched.add_browser(**AWAITED)
        watched.run(record, command=SLEEPER)
        readiness.watch(record)
        wait_until(lambda: watched.get(record).status is Status.FAILED, what="it has failed")
        assert "did not answer within" in (watched.get(record).error_message or "")
    finally:
        readiness.stop()
        watched.clean_up()


def test_a_revived_instance_that_does_not_come_up_is_dormant_again_with_its_snapshot(
    watched: Watched, readiness: Readiness
) -> None:
    record = watched.add_browser(
        **AWAITED | {"generation": 3, "applied_generation": 3, "settled_generation": 2, "restore_generation": 2}
    )
    watched.run(record, command=["false"], restart_policy={"Name": "unless-stopped"})
    readiness.watch(record)
    wait_until(lambda: watched.get(record).wanted is Wanted.DORMANT, what="it is to be dormant again")
    assert watched.get(record).snapshot_generation == 2


def test_an_instance_that_runs_on_after_a_failed_snapshot_gets_a_new_container_for_a_stopped_one(
    watched: Watched, readiness: Readiness
) -> None:
    record = watched.add_browser(status=Status.RUNNING, generation=3, applied_generation=3, settled_generation=1)
    watched.run(record).stop(timeout=5)
    readiness.watch(record)
    wait_until(lambda: watched.get(record).repair, what="it is to be repaired")
    assert watched.get(record).status is Status.CREATING
    assert watched.get(record).generation == 4


# ---- lost and orphaned


def test_a_lost_container_is_to_be_made_again_once_it_was_missed_twice(watched: Watched) -> None:
    gone, stopped, kept = (watched.add() for _ in range(3))
    watched.run(stopped, command=SLEEPER).kill()
    watched.run(kept, command=SLEEPER)
    NodeHealth(watched.ledger, settings=watched.settings, **watched.parts()).beat_once()
    repair = Repair(watched.ledger, **watched.parts())
    repair.step()
    assert not any(watched.get(record).repair for record in (gone, stopped, kept))
    watched.changes.work.clear()
    repair.step()
    assert [watched.get(record).repair for record in (gone, stopped, kept)] == [True, True, False]
    assert watched.changes.work.is_set()
    assert any("is gone" in message for message in watched.events("lost"))
    assert any("Exited (137)" in message for message in watched.events("lost"))
    repair.step()
    assert len(watched.events("lost")) == 2
    repair.close()


def test_a_container_that_was_left_paused_goes_on_unless_its_snapshot_is_still_to_be_taken(watched: Watched) -> None:
    left, pending = (watched.add() for _ in range(2))
    snapshot = SnapshotRecord(
        instance_id=pending.id,
        generation=1,
        node_id="local",
        state=SnapshotState.PENDING,
        bytes=None,
        created_at=0.0,
        live=True,
    )
    watched.ledger.instances.change(pending.id, lambda _, __: Update(put_snapshots=(snapshot,)))
    containers = [watched.run(record, command=SLEEPER) for record in (left, pending)]
    for container in containers:
        container.pause()
    NodeHealth(watched.ledger, settings=watched.settings, **watched.parts()).beat_once()
    repair = Repair(watched.ledger, **watched.parts())
    for states in (["paused", "paused"], ["running", "paused"], ["running", "paused"]):
        repair.step()
        for container in containers:
            container.reload()
        assert [container.status for container in containers] == states
    repair.close()
    assert watched.events("lost") == []


def remove_orphans(watched: Watched) -> None:
    """Look twice: what is seen for the first time is not believed."""
    NodeHealth(watched.ledger, settings=watched.settings, **watched.parts()).beat_once()
    repair = Repair(watched.ledger, **watched.parts())
    repair.step()
    assert watched.events("orphan_removed") == []
    repair.step()
    repair.close()


def test_only_what_the_ledger_knows_to_be_deleted_is_removed_as_an_orphan(watched: Watched) -> None:
    dormant = watched.add(
        wanted=Wanted.DORMANT, status=Status.DORMANT, generation=2, settled_generation=2, applied_generation=2
    )
    failed = watched.add(status=Status.FAILED)
    for record in (dormant, failed):
        watched.run(record, command=SLEEPER)
    watched.docker.volumes.create(f"machineuse-{watched.cluster.name}-a", labels=watched.labels(dormant.id))
    watched.docker.volumes.create(f"machineuse-{watched.cluster.name}-b", labels=watched.labels("mu-nobody"))
    watched.ledger.events.add("deleted", message="it is deleted", instance_id="mu-nobody")
    watched.docker.volumes.create(f"machineuse-{watched.cluster.name}-e", labels=watched.labels("mu-never-known"))
    other = watched.labels("mu-other") | {"machineuse.ledger": "another"}
    watched.docker.volumes.create(f"machineuse-{watched.cluster.name}-c", labels=other)
    watched.docker.containers.create(
        BROWSER_IMAGE, name=f"machineuse-{watched.cluster.name}-d", labels=watched.labels("mu-nobody")
    )
    remove_orphans(watched)
    assert len(watched.events("orphan_removed")) == 2
    assert len(watched.events("orphan_kept")) == 1
    mine = {"label": f"machineuse.cluster={watched.cluster.name}"}
    assert sorted(volume.name[-1] for volume in watched.docker.volumes.list(filters=mine)) == ["a", "c", "e"]
    assert len(watched.docker.containers.list(all=True, filters=mine)) == 2


def test_a_copy_of_a_snapshot_that_went_while_its_node_was_away_is_removed(watched: Watched) -> None:
    record = watched.add(generation=4, applied_generation=4, settled_generation=4)
    taken = [
        SnapshotRecord(
            instance_id=record.id,
            generation=generation,
            node_id="elsewhere",
            state=state,
            bytes=1,
            created_at=0.0,
            live=False,
        )
        for generation, state in ((2, SnapshotState.EXPIRING), (3, SnapshotState.VERIFIED), (4, SnapshotState.PENDING))
    ]
    watched.ledger.instances.change(record.id, lambda _, __: Update(put_snapshots=tuple(taken)))
    copies = [watched.names.docker_copy(record.id, generation) for generation in range(1, 6)]
    for name in (*copies, f"{copies[0]}-of-somebody"):
        watched.docker.volumes.create(name, labels=watched.labels(record.id))
    remove_orphans(watched)
    (told,) = watched.events("orphan_removed")
    assert copies[0] in told
    mine = {"label": f"machineuse.cluster={watched.cluster.name}"}
    left = {volume.name for volume in watched.docker.volumes.list(filters=mine)}
    assert left == {*copies[1:], f"{copies[0]}-of-somebody"}  # the fifth is for an older ledger that was put back


def test_what_a_forced_delete_left_is_removed_once_the_node_answers(watched: Watched) -> None:
    record = watched.add()
    watched.run(record, command=SLEEPER, volumes={watched.names.docker_volume(record.id): {"bind": "/mnt"}})
    watched.docker.volumes.get(watched.names.docker_volume(record.id))
    for urn_type, name in (
        (VOLUME_TYPE, watched.names.docker_volume(record.id)),
        (CONTAINER_TYPE, watched.names.docker_container(record.id)),
    ):
        watched.ledger.leftovers.add(node_id="local", urn=f"urn:pulumi:x::machineuse::{urn_type}::x", name=name)
    repair = Repair(watched.ledger, **watched.parts())
    repair.step()
    assert len(watched.ledger.leftovers.list("local")) == 2, "the node did not answer yet"
    NodeHealth(watched.ledger, settings=watched.settings, **watched.parts()).beat_once()
    repair.step()
    repair.close()
    assert watched.ledger.leftovers.list("local") == []
    assert not [v for v in watched.docker.volumes.list() if v.name == watched.names.docker_volume(record.id)]


def test_an_instance_that_is_being_made_dormant_is_not_repaired(watched: Watched) -> None:
    watched.add(wanted=Wanted.DORMANT, generation=2, applied_generation=1, snapshot_generation=2)
    NodeHealth(watched.ledger, settings=watched.settings, **watched.parts()).beat_once()
    repair = Repair(watched.ledger, **watched.parts())
    for _ in range(3):
        repair.step()
    repair.close()
    assert watched.events("lost") == []
