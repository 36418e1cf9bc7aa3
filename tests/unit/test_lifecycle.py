"""Wishes, outcomes and observations, on records alone."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from provisioner import lifecycle
from provisioner.errors import Conflict, DockerError, SnapshotCorrupt, SnapshotFailed
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord, SnapshotRecord, SnapshotState
from provisioner.states import Status, Wanted
from tests.support.records import make_record


def apply(record: InstanceRecord, update: Update | None) -> InstanceRecord:
    assert update is not None
    snapshots = {s.generation: s for s in record.snapshots if s.generation not in update.drop_snapshots}
    snapshots |= {s.generation: s for s in update.put_snapshots}
    values: dict[str, Any] = dict(update.values)
    return dataclasses.replace(record, **values, snapshots=tuple(snapshots.values()))


def sleeping(record: InstanceRecord | None = None) -> InstanceRecord:
    """Return a record that went dormant as the converger takes it there."""
    record = apply(record or make_record(), lifecycle.wish_dormant(record or make_record(), reason="test"))
    generation = record.generation
    record = apply(record, lifecycle.note_snapshot(record, generation=generation, size_bytes=7, keep=1))
    return apply(record, lifecycle.note_dormant(record, generation=generation))


def test_a_wish_for_dormancy_asks_for_a_snapshot_of_its_generation() -> None:
    record = apply(make_record(), lifecycle.wish_dormant(make_record(), reason="test"))
    assert record.wanted is Wanted.DORMANT
    assert record.status is Status.RUNNING
    assert record.operation == "making_dormant"
    snapshot = record.snapshot(record.generation)
    assert snapshot is not None
    assert snapshot.state is SnapshotState.PENDING
    assert not record.sleeps_safely


def test_a_second_wish_for_dormancy_joins_the_first() -> None:
    record = apply(make_record(), lifecycle.wish_dormant(make_record(), reason="test"))
    assert lifecycle.wish_dormant(record, reason="again") is None


def test_after_a_failed_snapshot_the_next_wish_for_dormancy_need_not_wait() -> None:
    record = apply(make_record(), lifecycle.wish_dormant(make_record(), reason="test"))
    failed = lifecycle.note_sleep_failed(record, generation=record.generation, error=SnapshotFailed("full"))
    record = apply(record, failed)
    assert record.settled_generation < record.generation
    again = apply(record, lifecycle.wish_dormant(record, reason="again"))
    assert (again.wanted, again.generation, again.error_code) == (Wanted.DORMANT, record.generation + 1, None)


@pytest.mark.parametrize("status", [Status.CREATING, Status.DORMANT, Status.FAILED])
def test_only_what_runs_can_be_made_dormant(status: Status) -> None:
    with pytest.raises(Conflict):
        lifecycle.wish_dormant(make_record(status=status), reason="test")


@pytest.mark.parametrize("status", [Status.CREATING, Status.RUNNING, Status.IDLE, Status.FAILED])
def test_only_what_is_dormant_can_be_revived(status: Status) -> None:
    with pytest.raises(Conflict):
        lifecycle.check_revivable(make_record(status=status))


def test_dormant_is_settled_without_body_and_ports() -> None:
    record = sleeping()
    assert record.status is Status.DORMANT
    assert record.sleeps_safely
    assert not record.body
    assert record.debug_port is None
    assert record.settled_generation == record.generation


def test_a_revive_restores_the_snapshot_of_the_dormancy() -> None:
    record = sleeping()
    slept = record.generation
    record = apply(
        record,
        lifecycle.wish_revived(
            record, method="quick_start", node_id="local", ports=(1, 2), volume="docker", disk_enforced=False
        ),
    )
    assert record.status is Status.CREATING
    assert record.restore_generation == slept
    assert record.debug_port == 1
    assert record.operation == "reviving"


def test_a_failed_snapshot_leaves_it_running_with_the_error_on_it() -> None:
    record = apply(make_record(), lifecycle.wish_dormant(make_record(), reason="test"))
    wished = record.generation
    error = SnapshotFailed("The disk is full.")
    record = apply(record, lifecycle.note_sleep_failed(record, generation=wished, error=error))
    assert record.wanted is Wanted.RUNNING
    assert record.status is Status.RUNNING
    assert record.error_generation == wished
    assert record.error_message == "The disk is full."
    assert record.obsolete_snapshots == [wished]


def test_a_failed_revive_leaves_it_dormant_with_its_snapshot() -> None:
    record = sleeping()
    slept = record.generation
    record = apply(
        record,
        lifecycle.wish_revived(
            record, method="full_restore", node_id="local", ports=(1, 2), volume="docker", disk_enforced=False
        ),
    )
    wished = record.generation
    error = SnapshotCorrupt("The archive is damaged.")
    record = apply(record, lifecycle.note_revive_failed(record, generation=wished, error=error))
    with pytest.raises(Conflict, match="left when it failed is being removed"):
        lifecycle.check_revivable(record)
    assert record.status is Status.DORMANT
    assert record.sleeps_safely
    assert record.snapshot_generation == slept
    assert record.settled_generation < record.generation  # what was made of its body is still to be taken away
    record = apply(record, lifecycle.note_dormant(record, generation=record.generation))
    assert record.error_code == "snapshot_corrupt"
    assert not record.body


def test_an_older_snapshot_expires_only_when_a_newer_one_is_verified() -> None:
    old = SnapshotRecord(
        instance_id="mu-test", generation=2, node_id="local", state=SnapshotState.VERIFIED, bytes=1, created_at=0
    )
    record = make_record(generation=4, settled_generation=4, applied_generation=4, snapshots=(old,))
    record = apply(record, lifecycle.wish_dormant(record, reason="test"))
    assert {s.state for s in record.snapshots} == {SnapshotState.VERIFIED, SnapshotState.PENDING}
    record = apply(record, lifecycle.note_snapshot(record, generation=5, size_bytes=1, keep=1))
    states = {s.generation: s.state for s in record.snapshots}
    assert states == {2: SnapshotState.EXPIRING, 5: SnapshotState.VERIFIED}


def test_a_later_wish_makes_earlier_outcomes_void() -> None:
    record = make_record(status=Status.CREATING, generation=1, applied_generation=0, settled_generation=0)
    deleted = apply(record, lifecycle.wish_absent(record, force=False))
    error = DockerError("no")
    assert lifecycle.note_created(deleted, generation=1, restored_by=None, restore_note=None) is None
    assert lifecycle.note_ready(deleted, generation=1) is None
    assert lifecycle.note_failed(deleted, generation=1, error=error) is None
    assert lifecycle.note_sleep_failed(deleted, generation=1, error=error) is None


@pytest.mark.parametrize("status", list(Status))
def test_anything_can_be_deleted(status: Status) -> None:
    record = apply(make_record(status=status), lifecycle.wish_absent(make_record(status=status), force=True))
    assert record.wanted is Wanted.ABSENT
    assert record.force


def test_a_forced_delete_overtakes_a_graceful_one() -> None:
    record = apply(make_record(), lifecycle.wish_absent(make_record(), force=False))
    assert lifecycle.wish_absent(record, force=False) is None
    assert apply(record, lifecycle.wish_absent(record, force=True)).force


def test_quiet_makes_idle_and_use_makes_running() -> None:
    now = time.time()
    quiet = make_record(last_active_at=now - 100)
    idle = apply(quiet, lifecycle.observe_activity(quiet, last_active_at=now - 100, idle_after_s=60))
    assert idle.status is Status.IDLE
    used = apply(idle, lifecycle.observe_activity(idle, last_active_at=now, idle_after_s=60))
    assert used.status is Status.RUNNING


def test_what_is_under_way_is_not_made_idle() -> None:
    record = make_record(generation=2, last_active_at=0)
    assert lifecycle.observe_activity(record, last_active_at=0, idle_after_s=60) is None


def test_a_lost_container_is_wanted_again() -> None:
    record = apply(make_record(), lifecycle.wish_repaired(make_record(), reason="gone"))
    assert record.status is Status.CREATING
    assert record.repair
    assert lifecycle.wish_repaired(record, reason="gone") is None


def test_a_repair_does_not_hide_how_the_last_wish_ended() -> None:
    failed = make_record(error_code="snapshot_failed", error_message="The store is full.", error_generation=1)
    repaired = apply(failed, lifecycle.wish_repaired(failed, reason="its container has stopped"))
    assert (repaired.repair, repaired.error_code, repaired.error_generation) == (True, "snapshot_failed", 1)


def test_what_is_lost_again_after_its_repair_was_given_up_is_repaired_again() -> None:
    record = apply(make_record(), lifecycle.wish_repaired(make_record(), reason="gone"))
    given_up = apply(
        record, lifecycle.note_failed(record, generation=record.generation, error=DockerError("It is silent."))
    )
    assert (given_up.status, given_up.repair) == (Status.FAILED, True)
    again = apply(given_up, lifecycle.wish_repaired(given_up, reason="gone again"))
    assert (again.status, again.repair, again.error_code) == (Status.CREATING, True, None)


def test_the_error_of_a_try_is_taken_back_when_a_later_one_succeeds() -> None:
    creating = make_record(status=Status.CREATING, applied_generation=0, settled_generation=0)
    retried = apply(creating, lifecycle.note_retry(creating, generation=1, error=DockerError("no"), delay_s=60))
    assert retried.error_code == "docker_error"
    created = lifecycle.note_created(retried, generation=1, restored_by=None, restore_note=None)
    assert apply(retried, created).error_code is None


def test_the_error_that_ended_a_revive_stays_when_it_is_dormant_again() -> None:
    asleep = sleeping()
    reviving = apply(
        asleep,
        lifecycle.wish_revived(
            asleep, method="full_restore", node_id="local", ports=(1, 2), volume="docker", disk_enforced=False
        ),
    )
    generation = reviving.generation
    error = SnapshotCorrupt("damaged")
    again = apply(reviving, lifecycle.note_revive_failed(reviving, generation=generation, error=error))
    settled = apply(again, lifecycle.note_dormant(again, generation=again.generation))
    assert (settled.status, settled.error_code) == (Status.DORMANT, "snapshot_corrupt")


def test_what_waits_for_its_next_try_need_not_wait_once_its_node_is_back() -> None:
    record = make_record(wanted=Wanted.ABSENT, generation=2)
    waiting = apply(record, lifecycle.note_retry(record, generation=2, error=DockerError("away"), delay_s=60))
    assert apply(waiting, lifecycle.note_node_back(waiting)).retry_at == 0
    assert lifecycle.note_node_back(record) is None


def test_endless_retries_do_not_flood_the_events() -> None:
    """A delete that waits for its node for weeks must not push out what happened to everybody else."""
    told = []
    for attempts in range(2000):
        record = make_record(attempts=attempts)
        update = lifecycle.note_retry(record, generation=1, error=DockerError("It is away."), delay_s=60)
        assert update is not None
        told.append(update.event is not None)
    assert all(told[:5])
    assert sum(told) < 50
