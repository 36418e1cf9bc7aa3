"""Moves instances to what is wanted: gathers everything unsettled, runs one update, records what became of it.

Level-triggered: what is wanted and not yet so is work, whoever wished it and however often this process was killed.
Wishes that come while an update runs share the next one. What the next step of an instance is, work.py says.

Steps on a node that does not answer stay out of updates until it does: they would hold up everybody else's. Only what
needs nothing of the node goes on: recording a snapshot that is whole already, giving up the body of an instance whose
snapshot is verified, and forced deletes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Protocol

import structlog

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.engine import Program, UpdateResult
from provisioner.errors import (
    DockerNotFound,
    EngineError,
    LeaseLost,
    MachineuseError,
    NodeUnreachable,
    PortTaken,
    SnapshotFailed,
    StackLocked,
)
from provisioner.ledger import Ledger
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.outcomes import PERMANENT
from provisioner.settings import Settings
from provisioner.specs import specs_of
from provisioner.work import Step, Work, find_error, needs_node, plan
from stacks.cluster import declare
from stacks.names import NETWORK_TYPE, Names, if_there, network_name

log = structlog.get_logger(__name__)

BATCH = 200
"""Instances in one update at most: bounds the command line, and the wait of whoever comes next."""
GATHER_S = 0.01
"""How long the first wish of a batch waits for company."""
MAX_RETRY_S = 60.0


class UpdateRunner(Protocol):
    """What the converger needs of an engine."""

    def update(self, program: Program, *, targets: Sequence[str] = (), refresh: bool = False) -> UpdateResult:
        """Run one update."""


class Converger:
    """One cluster's converger; run by one thread."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: Cluster,
        settings: Settings,
        engine: UpdateRunner,
        changes: Changes,
        await_ready: Callable[[InstanceRecord], None],
        prepare: Callable[[Work], bool],
        sweep: Callable[[InstanceRecord], None],
        is_captured: Callable[[Work], bool] = lambda _: False,
    ) -> None:
        """Run updates with `engine`. `prepare` says whether a step may be run now, or raises why it never may;
        `sweep` removes an instance's container and volume where the stack does not know them;
        `await_ready` is told of every instance whose container has started; `is_captured` says whether the snapshot
        that a step is to take is whole already."""
        self._ledger = ledger
        self._cluster = cluster
        self._settings = settings
        self._engine = engine
        self._changes = changes
        self._await_ready = await_ready
        self._prepare = prepare
        self._sweep = sweep
        self._is_captured = is_captured
        self._names = Names(cluster.name)
        self._doubtful_nodes: set[str] = set()
        """Nodes that may lack what their instances need: their network."""
        self._suspects: set[str] = set()
        """Instances of an update that failed as a whole: one of them may be why, so each is tried alone."""

    def step(self) -> float | None:
        """Run an update of what is due; return in how many seconds something is due again, None when nothing is.

        Repairs have an update of their own, and so has one suspect. Raises LeaseLost, and nothing is recorded of what
        became of an update that outlived its lease: whoever leads now finds the work again.
        """
        now = time.time()
        planned = self._leave_out_silent_nodes(
            work for record in self._ledger.instances.unsettled() if (work := plan(record, names=self._names))
        )
        self._suspects &= {work.record.id for work in planned}
        # A time further away than any retry was written by a clock that has been set back since.
        due = [work for work in planned if not now < work.record.retry_at <= now + MAX_RETRY_S]
        if not due:
            return max(min(work.record.retry_at for work in planned) - now, 0.0) if planned else None
        batch = list(islice((work for work in self._set_apart(due) if self._is_prepared(work)), BATCH))
        if not batch:
            return None
        if doubtful := self._doubtful_nodes & {work.record.node_id for work in batch}:
            self._restore_nodes(doubtful)
        alone = [work for work in batch if work.record.id in self._suspects]
        together = [work for work in batch if work.record.id not in self._suspects]
        # A repair looks at the real container first, which would slow the others down: those go ahead.
        plain, repairs = _split(together, lambda work: not work.record.repair)
        for works in (plain, repairs, alone):
            if works:
                self._run(works, refresh=works[0].record.repair)
        return 0.0

    def _leave_out_silent_nodes(self, works: Iterable[Work]) -> list[Work]:
        """Leave out what would wait for a node that does not answer; health.py wakes us when that changes."""
        nodes = self._ledger.nodes.list()
        away = {node.id for node in nodes if node.status is NodeStatus.OFFLINE}
        in_doubt = {node.id for node in nodes if node.status is NodeStatus.ONLINE and node.misses}
        return [
            work
            for work in works
            if work.record.node_id not in in_doubt
            and (work.record.node_id not in away or not needs_node(work) or self._is_captured(work))
        ]

    def _set_apart(self, due: Sequence[Work]) -> Sequence[Work]:
        """Leave out all suspects but one: each has an update of its own, and nobody else waits for all of them."""
        others, suspects = _split(due, lambda work: work.record.id not in self._suspects)
        return [*sorted(suspects, key=lambda work: work.record.attempts)[:1], *others]

    def _restore_nodes(self, node_ids: set[str]) -> None:
        """Make these nodes' networks: the node was away when the cluster was applied, or somebody removed them."""

        async def program() -> None:
            await declare(self._cluster.spec, ledger_id=self._ledger.id, instances=(), claim=False)

        networks = [self._names.urn(NETWORK_TYPE, network_name(node_id)) for node_id in sorted(node_ids)]
        try:
            result = self._engine.update(program, targets=networks, refresh=True)
            if result.errors:  # a refresh can't be of what the stack has not got to know yet
                result = self._engine.update(program, targets=networks)
        except EngineError as error:
            log.error("nodes not looked at", nodes=sorted(node_ids), error=error.message, detail=error.detail)
            return
        if not result.errors:
            self._doubtful_nodes -= node_ids
        log.warning("nodes looked at", nodes=sorted(node_ids), changed=result.changed, errors=result.errors or None)

    def _is_prepared(self, work: Work) -> bool:
        try:
            return self._prepare(work)
        except LeaseLost:
            raise  # no failure of the step: somebody else takes it
        except MachineuseError as error:
            self._record_failure(work, error)
            return False
        except Exception as error:  # a bug that one instance meets must not stop the others
            log.error("preparation crashed", instance=work.record.id, error=str(error), exc_info=error)
            self._record_failure(work, MachineuseError("An internal error kept it from being done."))
            return False

    def _run(self, batch: Sequence[Work], *, refresh: bool) -> None:
        specs = specs_of(work.record for work in batch)

        async def program() -> None:
            await declare(self._cluster.spec, ledger_id=self._ledger.id, instances=specs, claim=False)

        # A refresh fails for a target that the stack does not have: a container that could not be made again at first.
        targets = [if_there(urn) if refresh else urn for work in batch for urn in work.targets]
        try:
            result = self._engine.update(program, targets=targets, refresh=refresh)
        except EngineError as error:
            log.error("update failed", error=error.message, detail=error.detail, instances=len(batch))
            if len(batch) > 1 and not isinstance(error, StackLocked):
                self._suspects |= {work.record.id for work in batch}
            for work in batch:
                self._retry(work, error)
            return
        self._suspects -= {work.record.id for work in batch}
        log.info(
            "update done",
            steps=_count(batch),
            failed=len(result.errors) or None,
            duration_s=round(result.duration_s, 2),
        )
        for work in batch:
            self._record(work, result)

    def _record(self, work: Work, result: UpdateResult) -> None:
        error = find_error(work, result, names=self._names)
        if error is not None:
            log.warning(
                "step failed",
                instance=work.record.id,
                step=work.step.name.lower(),
                code=error.code,
                error=error.message,
                detail=error.detail,
            )
            self._record_failure(work, error)
            return
        record, generation = work.record, work.record.generation
        if work.step is Step.CREATE:
            restored = result.outputs.get(self._names.restore_urn(record.id), {}) if record.restore_generation else {}
            now = self._change(
                record,
                lambda r: lifecycle.note_created(
                    r,
                    generation=generation,
                    restored_by=None if record.repair else restored.get("methodUsed"),
                    restore_note=restored.get("fallbackReason") or None,
                ),
            )
            if now is not None:
                self._await_ready(now)
        elif work.step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT):
            outputs = result.outputs[work.targets[0]]
            taken = record.pending_live.generation if record.pending_live else record.snapshot_generation or generation
            self._change(
                record,
                lambda r: lifecycle.note_snapshot(
                    r,
                    generation=taken,
                    size_bytes=int(outputs.get("bytes") or 0),
                    keep=self._settings.snapshot_keep,
                ),
            )
        elif work.step is Step.TIDY:
            self._change(record, lambda r: lifecycle.note_tidied(r, generations=record.obsolete_snapshots))
        elif self._is_swept(work, result):
            if work.step is Step.SHED:
                self._change(record, lambda r: lifecycle.note_dormant(r, generation=generation))
            else:
                self._change(record, lifecycle.note_gone)

    def _is_swept(self, work: Work, result: UpdateResult) -> bool:
        """Remove the body of an instance that should have none, unless the update did; return whether it is gone."""
        record = work.record
        body = {self._names.container_urn(record.id), self._names.volume_urn(record.id)}
        if record.volume == "ebs":
            body.add(self._names.cloud_volume_urn(record.id))
        try:
            if not body <= result.deleted:
                self._sweep(record)
        except LeaseLost:
            raise
        except MachineuseError as error:
            self._retry(work, error)
            return False
        return True

    def _record_failure(self, work: Work, error: MachineuseError) -> None:
        record, generation = work.record, work.record.generation
        if work.step is Step.SNAPSHOT:
            failed = (
                error if isinstance(error, SnapshotFailed) else SnapshotFailed(error.explain(), detail=error.detail)
            )
            now = self._change(record, lambda r: lifecycle.note_sleep_failed(r, generation=generation, error=failed))
            if now is not None:
                self._await_ready(now)
            return
        if work.step is Step.LIVE_SNAPSHOT and record.pending_live is not None:
            taken = record.pending_live.generation
            self._change(record, lambda r: lifecycle.note_live_snapshot_failed(r, generation=taken, error=error))
            return
        if work.step is not Step.CREATE:
            self._retry(work, error)  # nothing is lost meanwhile, and giving up would leave a half-deleted instance
            return
        if isinstance(error, DockerNotFound) and self._cluster.node(record.node_id) is not None:
            self._doubtful_nodes.add(record.node_id)
        # A node that does not answer says nothing about the instance: it is tried again when the node is back.
        last = record.attempts + 1 >= self._settings.create_attempts and not isinstance(error, NodeUnreachable)
        if isinstance(error, PortTaken) and (record.repair or not last):
            self._ledger.instances.change(
                record.id, lambda r, loads: self._other_ports(r, loads=loads, generation=generation, error=error)
            )
        elif record.repair or not (last or isinstance(error, PERMANENT)):
            self._retry(work, error)  # a repair is of somebody's profile: it is never given up
        elif record.restore_generation is not None:
            self._change(record, lambda r: lifecycle.note_revive_failed(r, generation=generation, error=error))
        else:
            self._change(record, lambda r: lifecycle.note_failed(r, generation=generation, error=error))

    def _retry(self, work: Work, error: MachineuseError) -> None:
        record = work.record
        delay_s = _delay_s(record.attempts)
        self._change(
            record, lambda r: lifecycle.note_retry(r, generation=record.generation, error=error, delay_s=delay_s)
        )

    def _other_ports(
        self, record: InstanceRecord, *, loads: LoadReader, generation: int, error: MachineuseError
    ) -> Update | None:
        """Give the instance other ports: something outside the ledger holds one of those it has."""
        node = self._cluster.node(record.node_id)
        if record.generation != generation or node is None or record.debug_port is None or record.stream_port is None:
            return None
        taken = loads.ports(node.id)
        free = [p for p in range(node.ports.last, node.ports.first - 1, -1) if p not in taken][:2]
        # The first tries are made at once; a repair, which is never given up, then takes its time.
        delay_s = _delay_s(record.attempts) if record.attempts >= self._settings.create_attempts else 0.0
        if len(free) < 2:
            return lifecycle.note_retry(record, generation=generation, error=error, delay_s=_delay_s(record.attempts))
        return Update(
            values={
                "debug_port": free[0],
                "stream_port": free[1],
                "attempts": record.attempts + 1,
                "retry_at": time.time() + delay_s,
            },
            release_ports=True,
            take_ports=tuple(free),
            event=("ports", f"{error.message} It gets ports {free[0]} and {free[1]} instead."),
        )

    def _change(
        self, record: InstanceRecord, decide: Callable[[InstanceRecord], Update | None]
    ) -> InstanceRecord | None:
        now = self._ledger.instances.change(record.id, lambda r, _: decide(r))
        self._changes.notify(record.id)
        return now


def _delay_s(attempts: int) -> float:
    return min(2.0 ** min(attempts, 10), MAX_RETRY_S)


def _split(works: Sequence[Work], first: Callable[[Work], bool]) -> tuple[list[Work], list[Work]]:
    """Return those for which `first` is true, and the others."""
    return [work for work in works if first(work)], [work for work in works if not first(work)]


def _count(batch: Sequence[Work]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for work in batch:
        counts[work.step.name.lower()] = counts.get(work.step.name.lower(), 0) + 1
    return counts
