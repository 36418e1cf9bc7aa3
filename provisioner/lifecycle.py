"""What may be done to an instance, and what the ledger then says: pure functions from a record to an `Update`.

Three groups: wishes (a caller, or the idle timeout, wants something: a new generation), outcomes (the converger tells
what became of it), and observations (health and idleness). All go through the one table in states.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from provisioner.errors import Conflict, MachineuseError, SnapshotCorrupt, SnapshotMissing
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord, Moving, SnapshotRecord, SnapshotState
from provisioner.states import UP, Event, Status, Wanted, next_status

DELETED = "deleted"
"""The kind of the last event of an instance that was deleted."""

_FORGET_ERROR: dict[str, Any] = {"error_code": None, "error_message": None, "error_generation": None}

# ---- wishes


def wish_dormant(record: InstanceRecord, *, reason: str) -> Update | None:
    """Want the instance dormant; None when that is under way already. Raises Conflict."""
    if record.wanted is Wanted.ABSENT:
        raise Conflict(f"Instance {record.id} is being deleted.")
    if record.wanted is Wanted.DORMANT and record.moving is not None:
        return Update(values={"moving": None}, event=("dormant", reason))  # it need not be given back elsewhere then
    if record.wanted is Wanted.DORMANT and record.settled_generation < record.generation:
        return None
    if record.status is Status.CREATING and record.settled_generation < record.generation:
        raise Conflict(
            f"Instance {record.id} is {record.status.value}: it can be made dormant once it runs.",
            resolution="Wait until its status is running.",
        )
    if record.status not in UP:
        raise Conflict(
            f"Instance {record.id} is {record.status.value}, and only a running or idle one can be made dormant."
        )
    generation = record.generation + 1
    snapshot = SnapshotRecord(
        instance_id=record.id,
        generation=generation,
        node_id=record.node_id,
        state=SnapshotState.PENDING,
        bytes=None,
        created_at=time.time(),
        volume=record.volume,
    )
    return Update(
        values=_new_wish(record, wanted=Wanted.DORMANT, event=Event.SLEEP) | {"snapshot_generation": generation},
        put_snapshots=(snapshot,),
        event=("dormant", reason),
    )


def wish_drained(record: InstanceRecord) -> Update | None:
    """Want the instance dormant, to be revived on another node; None while something else is under way."""
    if record.settled_generation < record.generation or record.status not in UP:
        return None
    slept = wish_dormant(record, reason=f"to be moved: node {record.node_id} is drained")
    if slept is None:
        return None
    return dataclasses.replace(slept, values={**slept.values, "moving": Moving.DRAIN})


def wish_moved(record: InstanceRecord, *, away_s: float) -> Update | None:
    """Want an instance whose node is lost given back elsewhere, from its last snapshot; None where there is none.

    What came after that snapshot is lost, and event and note say so. Whatever was under way is overtaken, a drain's own
    dormancy too; but a caller's dormancy and a delete wait for the node, and so does what has failed.
    """
    last = record.last_verified
    if last is None or record.status is Status.FAILED or not waits_for_node(record):
        return None
    if is_coming_back(record):
        what = "to be restored on another node instead"
        note = _add_note(record.restore_note, f"Node {record.node_id} was lost while it was being restored there.")
    else:
        what = f"to be given back on another node {tell_loss(last)}"
        note = f"Node {record.node_id} was lost: given back {tell_loss(last)}."
    return Update(
        values=_new_wish(record, wanted=Wanted.DORMANT, event=Event.MOVE)
        | {"snapshot_generation": last.generation, "moving": Moving.OFFLINE, "restore_note": note},
        put_snapshots=_cut_off(record),
        event=("move", f"node {record.node_id} has not answered for {_for_people(away_s)}: {what}"),
    )


def is_coming_back(record: InstanceRecord) -> bool:
    """Say whether an instance is being restored from its last snapshot, and nobody has had it back yet."""
    last = record.last_verified
    is_from_last = last is not None and record.restore_generation == last.generation
    is_under_way = record.wanted is Wanted.RUNNING and record.status is Status.CREATING
    return is_from_last and is_under_way and not record.repair  # what is repaired has run since


def waits_for_node(record: InstanceRecord) -> bool:
    """Say whether an instance that should run can't go on without its node: it runs there, or is drained from there."""
    is_drained = record.wanted is Wanted.DORMANT and record.moving is Moving.DRAIN
    return record.wanted is Wanted.RUNNING or (is_drained and not record.sleeps_safely)


def _cut_off(record: InstanceRecord) -> tuple[SnapshotRecord, ...]:
    """Return the snapshots that won't be taken any more: what there may be of them is to be removed."""
    pending = (s for s in record.snapshots if s.state is SnapshotState.PENDING)
    return tuple(dataclasses.replace(s, state=SnapshotState.EXPIRING) for s in pending)


def tell_loss(snapshot: SnapshotRecord) -> str:
    """Say, for people, what may be lost by going back to a snapshot."""
    taken_at = datetime.fromtimestamp(snapshot.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"from snapshot {snapshot.generation} of {taken_at}; what it did after that is lost"


def _for_people(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def wish_live_snapshot(record: InstanceRecord, *, reason: str) -> Update | None:
    """Want a snapshot of an instance that goes on running; None when that can't be now.

    It is no new wish of what the instance should be: it stays settled all the while, only its number goes up.
    """
    if record.status not in UP or record.wanted is not Wanted.RUNNING or record.pending_live is not None:
        return None
    if record.settled_generation < record.generation:
        return None
    generation = record.generation + 1
    snapshot = SnapshotRecord(
        instance_id=record.id,
        generation=generation,
        node_id=record.node_id,
        state=SnapshotState.PENDING,
        live=True,
        bytes=None,
        created_at=time.time(),
    )
    counted = dict.fromkeys(("generation", "applied_generation", "settled_generation"), generation)
    return Update(values=counted, put_snapshots=(snapshot,), event=("live_snapshot", reason))


def check_revivable(record: InstanceRecord) -> None:
    """Raise Conflict unless the instance is dormant, with nothing under way, and has a snapshot."""
    if record.wanted is Wanted.ABSENT:
        raise Conflict(f"Instance {record.id} is being deleted.")
    if record.wanted is Wanted.DORMANT and record.settled_generation < record.generation:
        asleep = record.status is Status.DORMANT  # then a revival has failed
        raise Conflict(
            f"What a revival of instance {record.id} left when it failed is being removed."
            if asleep
            else f"Instance {record.id} is being made dormant.",
            resolution="Wait until no operation is under way, then revive it.",
        )
    if record.status is not Status.DORMANT:
        raise Conflict(f"Instance {record.id} is {record.status.value}, and only a dormant one can be revived.")
    if not record.sleeps_safely:
        raise Conflict(f"Instance {record.id} has no snapshot to restore.")


def wish_revived(
    record: InstanceRecord,
    *,
    method: str,
    node_id: str,
    ports: tuple[int, ...],
    volume: str,
    disk_enforced: bool,
    why_there: str | None = None,
) -> Update:
    """Want a dormant instance back, on that node and those ports (debug and stream, where it has them).

    `volume` and `disk_enforced` are the node's: another node may do it otherwise. `why_there` tells people why it is
    that one. What `wish_moved` noted of the loss of its node stays with it.
    """
    check_revivable(record)
    note = record.restore_note if record.moving is Moving.OFFLINE else None
    debug_port, stream_port = ports if record.browser else (None, None)
    remarks = "; ".join(remark for remark in (why_there, note) if remark)
    return Update(
        values=_new_wish(record, wanted=Wanted.RUNNING, event=Event.REVIVE)
        | {
            "restore_generation": record.snapshot_generation,
            "restore_method": method,
            "restored_by": None,
            "restore_note": note,
            "node_id": node_id,
            "debug_port": debug_port,
            "stream_port": stream_port,
            "volume": volume,
            "disk_enforced": disk_enforced,
            "body": True,
        },
        take_ports=ports,
        event=("revive", f"to be restored by {method} on node {node_id}" + (f" ({remarks})" if remarks else "")),
    )


def wish_absent(record: InstanceRecord, *, force: bool) -> Update | None:
    """Want the instance gone, whatever is under way; None when that changes nothing."""
    if record.wanted is Wanted.ABSENT and (record.force or not force):
        return None
    message = "to be deleted at once" if force else "to be deleted"
    return Update(
        values=_new_wish(record, wanted=Wanted.ABSENT, event=Event.DELETE) | {"force": force},
        event=("delete", message),
    )


def wish_abandoned(record: InstanceRecord) -> Update | None:
    """Want nothing more of the instance's node, which is gone for good; None for one that has nothing there.

    It is dormant with its newest verified snapshot; without any it is lost, and deleted. Neither waits for the node.
    """
    if not record.body:
        return None
    kept = record.last_verified
    if kept is None or record.wanted is Wanted.ABSENT:
        return wish_absent(record, force=True)
    return Update(
        values=_new_wish(record, wanted=Wanted.DORMANT, event=Event.ABANDON)
        | {"snapshot_generation": kept.generation, "moving": None, "force": True},
        put_snapshots=_cut_off(record),
        event=("abandon", f"node {record.node_id} is gone for good: it is dormant, to be revived {tell_loss(kept)}"),
    )


def wish_repaired(record: InstanceRecord, *, reason: str) -> Update | None:
    """Want a lost container made again (its volume is kept); None when something is under way anyway."""
    if record.wanted is not Wanted.RUNNING or record.settled_generation < record.generation:
        return None
    if record.status not in UP and not record.repair:
        return None
    values = _new_wish(record, wanted=Wanted.RUNNING, event=Event.LOST) | {"repair": True}
    if record.status in UP:  # what it says went wrong is of its caller's last wish, and a repair is nobody's wish
        values = {name: value for name, value in values.items() if name not in _FORGET_ERROR}
    return Update(values=values, event=("lost", reason))


def _new_wish(record: InstanceRecord, *, wanted: Wanted, event: Event) -> dict[str, Any]:
    return (
        {
            "wanted": wanted,
            "generation": record.generation + 1,
            "attempts": 0,
            "retry_at": 0.0,
            "repair": False,
        }
        | _FORGET_ERROR
        | _become(record, event)
    )


def _become(record: InstanceRecord, event: Event) -> dict[str, Any]:
    status = next_status(record.status, event)
    if status is record.status:
        return {}
    return {"status": status, "status_since": time.time()}


# ---- outcomes


def note_created(
    record: InstanceRecord, *, generation: int, restored_by: str | None, restore_note: str | None
) -> Update | None:
    """The engine made volume and container; whether its browser answers is still open."""
    if record.generation != generation:
        return None
    return Update(
        values={
            "applied_generation": generation,
            "body": True,
            "restored_by": restored_by or record.restored_by,
            "restore_note": _add_note(record.restore_note, restore_note),
        }
        | _forget_retries(record),
        event=("restored", f"restored by {restored_by}" + (f": {restore_note}" if restore_note else ""))
        if restored_by
        else ("created", "its container has started"),
    )


def _add_note(said: str | None, more: str | None) -> str | None:
    if said is None or more is None or more in said:
        return said or more
    return f"{said} {more}"


def note_ready(record: InstanceRecord, *, generation: int) -> Update | None:
    """Its browser answers (or, without one, its container runs)."""
    if record.generation != generation or record.wanted is not Wanted.RUNNING:
        return None
    return Update(
        values={
            "settled_generation": generation,
            "repair": False,
            "moving": None,
            "attempts": 0,
            "last_active_at": time.time(),
        }
        | (_FORGET_ERROR if record.status is Status.FAILED else {})
        | _become(record, Event.READY),
        event=("ready", "it can be used"),
    )


def note_snapshot(record: InstanceRecord, *, generation: int, size_bytes: int, keep: int) -> Update | None:
    """The snapshot of that generation is verified; older ones beyond `keep` expire."""
    taken = record.snapshot(generation)
    if taken is None or record.wanted is Wanted.ABSENT:
        return None
    verified = dataclasses.replace(taken, state=SnapshotState.VERIFIED, bytes=size_bytes)
    older = [s for s in record.snapshots if s.generation < generation and s.state is SnapshotState.VERIFIED]
    older.sort(key=lambda s: s.generation, reverse=True)
    expiring = tuple(dataclasses.replace(s, state=SnapshotState.EXPIRING) for s in older[keep - 1 :])
    return Update(
        values={"attempts": 0} | _forget_retries(record),
        put_snapshots=(verified, *expiring),
        event=("snapshot", f"snapshot {generation} is verified ({size_bytes} bytes)"),
    )


def note_live_snapshot_failed(record: InstanceRecord, *, generation: int, error: MachineuseError) -> Update | None:
    """No live snapshot this time: what there may be of it goes, and the instance runs on."""
    failed = record.snapshot(generation)
    if failed is None or failed.state is not SnapshotState.PENDING:
        return None
    return Update(
        values={"attempts": 0} | _forget_retries(record),
        put_snapshots=(dataclasses.replace(failed, state=SnapshotState.EXPIRING),),
        event=("live_snapshot_failed", error.explain()),
    )


def note_dormant(record: InstanceRecord, *, generation: int) -> Update | None:
    """Container and volume are gone; the verified snapshot is all there is, and all that is needed."""
    if record.generation != generation or record.wanted is not Wanted.DORMANT:
        return None
    return Update(
        values={
            "applied_generation": generation,
            "settled_generation": generation,
            "body": False,
            "force": False,
            "restore_generation": None,
            "restore_method": None,
            "debug_port": None,
            "stream_port": None,
            "attempts": 0,
        }
        | _forget_retries(record)
        | _become(record, Event.SLEPT),
        drop_snapshots=tuple(record.obsolete_snapshots),
        release_ports=True,
        event=("slept", "it is dormant"),
    )


def note_sleep_failed(record: InstanceRecord, *, generation: int, error: MachineuseError) -> Update | None:
    """No snapshot: want it running again, with the error on it.

    What there may be of the snapshot is kept until the instance runs again: the failure may have come after it was
    whole, and be one of the node.
    """
    if record.generation != generation or record.wanted is not Wanted.DORMANT:
        return None
    new = generation + 1
    failed = record.snapshot(generation)
    return Update(
        values={
            "wanted": Wanted.RUNNING,
            "generation": new,
            "applied_generation": new,
            "snapshot_generation": None,
            "attempts": 0,
            "repair": False,
            "moving": None,
            "error_code": error.code,
            "error_message": error.explain(),
            "error_generation": generation,
        }
        | {"last_active_at": time.time()}
        | _become(record, Event.SLEEP_FAILED),
        put_snapshots=(dataclasses.replace(failed, state=SnapshotState.EXPIRING),) if failed is not None else (),
        event=("sleep_failed", error.explain()),
    )


def note_revive_failed(record: InstanceRecord, *, generation: int, error: MachineuseError) -> Update | None:
    """Could not be restored: dormant again, snapshot kept; what was made of its body is taken away again."""
    if record.generation != generation or record.restore_generation is None:
        return None
    return Update(
        values={
            "wanted": Wanted.DORMANT,
            "generation": generation + 1,
            "snapshot_generation": record.restore_generation,
            "moving": None if isinstance(error, SnapshotCorrupt | SnapshotMissing) else record.moving,
            "attempts": 0,
            "error_code": error.code,
            "error_message": error.explain(),
            "error_generation": generation,
        }
        | _become(record, Event.REVIVE_FAILED),
        event=("revive_failed", error.explain()),
    )


def note_failed(record: InstanceRecord, *, generation: int, error: MachineuseError) -> Update | None:
    """Given up: it stays as it is, failed, until it is deleted or its browser answers after all."""
    if record.generation != generation or record.wanted is Wanted.ABSENT:
        return None
    return Update(
        values={
            "applied_generation": generation,
            "settled_generation": generation,
            "error_code": error.code,
            "error_message": error.explain(),
            "error_generation": generation,
        }
        | _become(record, Event.FAIL),
        event=("failed", error.explain()),
    )


def note_tidied(record: InstanceRecord, *, generations: Collection[int]) -> Update | None:
    """Nothing is left of these snapshots, which nobody needed."""
    gone = tuple(g for g in record.obsolete_snapshots if g in generations)
    return Update(values={"attempts": 0} | _forget_retries(record), drop_snapshots=gone) if gone else None


def note_retry(record: InstanceRecord, *, generation: int, error: MachineuseError, delay_s: float) -> Update | None:
    """It did not work yet; try again later. The error that ended a wish stays, or its caller would be told this one."""
    if record.generation != generation:
        return None
    said = {"error_code": error.code, "error_message": error.explain()} if record.error_generation is None else {}
    return Update(
        values={"attempts": record.attempts + 1, "retry_at": time.time() + delay_s} | said,
        event=("retry", f"{error.explain()} Trying again in {delay_s:.0f} s.")
        if _is_telling(record.attempts)
        else None,
    )


def _is_telling(attempts: int) -> bool:
    """Say whether one more failed try is worth an event: the first few are, then about one an hour."""
    return attempts < 5 or attempts % 60 == 0


def note_node_back(record: InstanceRecord) -> Update | None:
    """Its node answers again: what waits for its next try need not wait any longer."""
    return Update(values={"retry_at": 0.0}) if record.retry_at > time.time() else None


def _forget_retries(record: InstanceRecord) -> dict[str, Any]:
    """Take back the error of a try that another one has made good; the error that ended a wish stays."""
    return {"error_code": None, "error_message": None} if record.error_generation is None else {}


def note_gone(_record: InstanceRecord) -> Update:
    """Everything of it is deleted."""
    return Update(remove=True, event=(DELETED, "it is deleted"))


# ---- observations


def observe_activity(record: InstanceRecord, *, last_active_at: float, idle_after_s: float) -> Update | None:
    """Set idle or running by when it was last used; None when nothing changes worth a write."""
    if record.status not in UP or record.settled_generation < record.generation:
        return None
    last = max(last_active_at, record.last_active_at)
    quiet = time.time() - last >= idle_after_s
    change = _become(record, Event.QUIET if quiet else Event.ACTIVE)
    if change:
        return Update(
            values=change | {"last_active_at": last},
            event=("idle", "nobody uses it") if quiet else ("active", "it is used again"),
        )
    return Update(values={"last_active_at": last}) if last > record.last_active_at + 1 else None
