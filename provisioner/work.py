"""What the next update should do about an instance, and whether it has: pure functions.

Per instance the steps are

    wanted running   CREATE                    then readiness.py settles it
    wanted dormant   SNAPSHOT, then SHED       SHED (delete container and volume) only of what is snapshotted, verified
                                               and recorded; never in the same update
    wanted absent    DELETE
    as wanted        TIDY                      what is left of a dormancy that failed, once the instance runs again
    running on       LIVE_SNAPSHOT             taken while it runs

Each is idempotent: after a crash at any point the same step is found again and run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from provisioner.engine import UpdateResult
from provisioner.errors import MachineuseError
from provisioner.ledger.records import InstanceRecord
from provisioner.outcomes import error_of
from provisioner.plugins.failures import read_code
from provisioner.specs import all_urns, body_urns
from provisioner.states import UP, Wanted
from stacks.names import COMPONENT_TYPE, Names, if_there


class Step(Enum):
    """What the next update does about an instance."""

    CREATE = auto()
    SNAPSHOT = auto()
    SHED = auto()
    DELETE = auto()
    TIDY = auto()
    LIVE_SNAPSHOT = auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One instance's part in an update."""

    record: InstanceRecord
    step: Step
    targets: tuple[str, ...]


def plan(record: InstanceRecord, *, names: Names) -> Work | None:
    """Return what the next update should do about this instance; None when it is not the engine's turn."""
    component = names.component_urn(record.id)
    obsolete = [names.snapshot_urn(record.id, generation) for generation in record.obsolete_snapshots]
    if record.settled_generation >= record.generation:
        if record.status not in UP:
            return None
        if obsolete:
            return Work(record=record, step=Step.TIDY, targets=_if_there(obsolete))
        if (live := record.pending_live) is not None:
            return Work(
                record=record, step=Step.LIVE_SNAPSHOT, targets=(names.snapshot_urn(record.id, live.generation),)
            )
        return None
    if record.wanted is Wanted.ABSENT:
        return Work(record=record, step=Step.DELETE, targets=_if_there(all_urns(record, names=names)))
    if record.wanted is Wanted.RUNNING:
        if record.applied_generation >= record.generation:
            return None  # readiness is awaited
        return Work(record=record, step=Step.CREATE, targets=(component, *body_urns(record, names=names)))
    if not record.sleeps_safely:
        taken = record.snapshot_generation or record.generation
        return Work(record=record, step=Step.SNAPSHOT, targets=(names.snapshot_urn(record.id, taken),))
    return Work(record=record, step=Step.SHED, targets=_if_there([*body_urns(record, names=names), *obsolete]))


def needs_node(work: Work) -> bool:
    """Say whether a step needs an answer of the node that the instance is on."""
    if work.step is Step.DELETE:
        return work.record.body and not work.record.force
    return work.step not in (Step.SHED, Step.TIDY)


def find_error(work: Work, result: UpdateResult, *, names: Names) -> MachineuseError | None:
    """Return what kept this instance's step from being done; None when it is done."""
    mine = set(all_urns(work.record, names=names))
    said = [text for urn, text in result.errors.items() if urn in mine]
    if said:
        return error_of(max(said, key=lambda text: (read_code(text) is not None, len(text))))
    if work.step is Step.CREATE:
        done = names.container_urn(work.record.id) in result.outputs
    elif work.step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT):
        done = work.targets[0] in result.outputs
    else:
        done = not any(urn == "" for urn in result.errors)
    common = (text for urn, text in result.errors.items() if COMPONENT_TYPE not in urn)  # of a node, or of the whole
    return None if done else error_of(next(common, "The engine did not get to it."))


def _if_there(urns: Sequence[str]) -> tuple[str, ...]:
    return tuple(if_there(urn) for urn in urns)
