"""Keeps the cluster as its file says, while the service runs: nodes come and go with an edit of it.

An edit is taken over as a whole or not at all. A file with a mistake, or one that asks for what can't be, changes
nothing: it is told of once, in an event and the log, and looked at again. What can't be, clustercheck.py says.

What is taken over, in this order; a crash between any two is made good by the full update of the next start:

1. The stack gets the new nodes (provider, network), before an instance can be placed there.
2. Ledger and `Cluster` change. The ledger refuses, in that same transaction, to lose a node that got an instance
   meanwhile; from then on nothing is placed on a node that is gone.
3. The stack loses the nodes that are gone, and the snapshots of who slept there forget them: their quick copies go.

The updates name just the resources of these nodes, so they take no longer than any other, in a cluster of any size.
Only what changes what all of a node's instances consist of (its engine, the address its ports are bound to) needs a
full update. Engine runs one update at a time: those here and the converger's wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import structlog

from provisioner.changes import Changes
from provisioner.cluster import APPLIED, Cluster, fingerprint, in_stack
from provisioner.clustercheck import ClusterCheck
from provisioner.clusterfile import parse_cluster, path_of, read_text
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.engine import Engine, Program
from provisioner.errors import EngineError, LedgerMismatch, MachineuseError
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeStatus
from provisioner.outcomes import error_of
from provisioner.prepull import note_images
from provisioner.retry import Retry
from provisioner.settings import Settings
from provisioner.specs import all_urns, specs_of
from provisioner.states import Wanted
from stacks.cluster import declare
from stacks.names import (
    NETWORK_TYPE,
    PROVIDER_TYPE,
    Names,
    network_name,
    node_if_there,
    provider_name,
)
from stacks.spec import Availability, ClusterSpec, NodeSpec

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 1.0
MAX_PAUSE_S = 10.0
"""How long at most something that did not work waits for its next try."""


class Reload:
    """Takes over what one cluster's file says; `step` is run again and again, by one thread."""

    def __init__(
        self, ledger: Ledger, *, cluster: Cluster, settings: Settings, hosts: DockerHosts, changes: Changes
    ) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._changes = changes
        self._names = Names(cluster.name)
        self._path: Path = path_of(settings.project_dir, cluster=cluster.name)
        self._check = ClusterCheck(ledger, hosts=hosts, cluster=cluster.name, file=self._path.name)
        self._engine: Engine | None = None
        self._last_look: tuple[int, ...] | None = None
        self._seen: tuple[int, ...] | None = None
        """What the file system said of the file when it was last read."""
        self._wanted: ClusterSpec | None = None
        """What the file says, where that is not what the cluster is yet."""
        self._owed: Callable[[Engine], bool] | None = None
        """An update that the stack still needs for what was taken over already; returns whether it worked."""
        self._emptying = False
        """Whether instances still leave a node that the file does not name since before the start."""
        self._told: str | None = None
        self._next_try = Retry(first_s=LOOK_EVERY_S, longest_s=MAX_PAUSE_S)
        self._next_update = Retry(first_s=LOOK_EVERY_S, longest_s=MAX_PAUSE_S)

    # ---- at the service's start

    def sync(self) -> None:
        """Give the ledger the file's nodes. Raises Conflict for what `step` would refuse."""
        known = {node.id: node.host for node in self._ledger.nodes.list()}
        if known:
            added = [node for node in self._cluster.nodes if node.id not in known]
            self._check.refuse_known_engines(added, spec=self._cluster.spec)
        moved = [node for node in self._cluster.nodes if known.get(node.id, node.host) != node.host]
        self._emptying = not self._check.may_take_over(
            gone=known.keys() - {node.id for node in self._cluster.nodes}, moved=moved, nodes=self._cluster.nodes
        )
        self._ledger.nodes.sync(self._cluster.nodes)

    def apply_all(self, engine: Engine) -> None:
        """Run a full update where the stack is new or the cluster's file has changed since the last one.

        What can't be applied now (a node is away) is logged. Raises LedgerMismatch for a stack of another ledger, and
        EngineError.
        """
        new = engine.ensure_stack()
        self._engine = engine
        if new or self._ledger.fact(APPLIED) != fingerprint(self._cluster.spec):
            self._update_all(engine)

    # ---- while it runs

    def step(self) -> None:
        """Look at the file, and take over what is new in it; tell once what can't be."""
        if self._engine is None:
            return
        try:
            self._read()
            if self._wanted is not None and self._next_try.is_due() and self._take_over(self._wanted, self._engine):
                self._wanted, self._told = None, None
        except MachineuseError as error:
            self._next_try.put_off()
            self._tell(error.explain(), detail=error.detail)
            if self._owed is None:
                self._hosts.keep_only(self._cluster.nodes)  # whoever was asked, and is none of ours after all
        if self._emptying:
            self.sync()
        if self._owed is not None and self._next_update.is_due():
            self._next_update.put_off()
            if self._owed(self._engine):  # raises EngineError into the loop's log, and is tried again
                self._owed = None
                self._next_update.forget()
                self._hosts.keep_only(self._cluster.nodes)  # only now: the update still talked to who is gone

    def _read(self) -> None:
        """Read the file once it has changed, and is the same at two looks: nobody writes it any more then.

        Raises SettingsError, once for each version of the file.
        """
        look = _look_at(self._path)
        before, self._last_look = self._last_look, look
        if look == self._seen or look != before:
            return
        self._seen, self._wanted = look, None
        self._next_try.forget()
        spec = parse_cluster(read_text(self._path), cluster=self._cluster.name, file=self._path.name)
        if spec != self._cluster.spec:
            self._wanted = spec
        elif self._told is not None:
            log.info("the cluster's file is as before")
            self._told = None

    def _take_over(self, spec: ClusterSpec, engine: Engine) -> bool:
        """Make the cluster what the file says; return whether that is done. Raises Conflict and EngineError."""
        old = self._cluster.spec
        added = [node for node in spec.nodes if old.node(node.id) is None]
        gone = [node for node in old.nodes if spec.node(node.id) is None]
        changed = [(node, now) for node in old.nodes if (now := spec.node(node.id)) is not None and now != node]
        moved = [now for was, now in changed if (was.host, was.ssh_opts) != (now.host, now.ssh_opts)]
        if not self._check.may_take_over(gone=[node.id for node in gone], moved=moved, nodes=spec.nodes):
            self._close([node.id for node in gone])
            return False
        if added:
            self._check.refuse_known_engines(added, spec=spec)
            self._join_stack(added, spec=spec, engine=engine)
        self._ledger.nodes.sync(spec.nodes, whole=True)
        self._cluster.replace(spec)
        self._tell_changes(added=added, gone=gone, changed=changed)
        self._changes.work.set()
        if self._owed is not None or any(in_stack(was) != in_stack(now) for was, now in changed):
            self._owed = self._update_all
        elif gone:
            names = [node.id for node in gone]
            self._owed = lambda engine: self._leave_stack(names, engine=engine)
        elif added:
            self._ledger.write_fact(APPLIED, fingerprint(spec))
        self._next_update.forget()
        return True

    def _close(self, node_ids: Collection[str]) -> None:
        """Let nothing new come to nodes that go once they are empty."""
        spec = self._cluster.spec
        nodes = tuple(
            node.model_copy(update={"availability": Availability.CORDONED})
            if node.id in node_ids and node.availability is Availability.ACTIVE
            else node
            for node in spec.nodes
        )
        if nodes != spec.nodes:
            self._ledger.nodes.sync(nodes)
            self._cluster.replace(spec.model_copy(update={"nodes": nodes}))

    # ---- the stack

    def _join_stack(self, added: Iterable[NodeSpec], *, spec: ClusterSpec, engine: Engine) -> None:
        """Put providers and networks of new nodes into the stack. A node that is away gets its network later.

        The converger makes it when the first instance misses it. Raises EngineError.
        """
        urns = [urn for node in added for urn in self._urns_of(node.id)]
        result = engine.update(self._program(spec), targets=urns)
        for urn, words in result.errors.items():
            log.warning("a new node's network could not be made yet", urn=urn or None, error=error_of(words).message)
        providers = {self._names.urn(PROVIDER_TYPE, provider_name(node.id)) for node in added}
        if missing := providers - result.outputs.keys():
            raise EngineError(
                "A new node could not be put into the stack.",
                detail=f"{sorted(missing)}: {'; '.join(result.errors.values())}",
            )

    def _leave_stack(self, node_ids: Collection[str], *, engine: Engine) -> bool:
        """Take what nodes that are gone had in the stack out of it, and the nodes out of the snapshots made there."""
        sleepers = [
            record
            for record in self._ledger.instances.all()
            if record.wanted is not Wanted.ABSENT and any(s.node_id in node_ids for s in record.snapshots)
        ]
        specs = [spec for spec in specs_of(sleepers) if spec.snapshots]
        snapshots = [
            self._names.snapshot_urn(spec.id, ref.generation)
            for spec in specs
            for ref in spec.snapshots
            if ref.node_id in node_ids
        ]
        nodes = [node_if_there(urn) for node_id in node_ids for urn in self._urns_of(node_id)]
        nodes += [self._names.node_images(node_id) for node_id in node_ids]
        spec = self._cluster.spec

        async def program() -> None:
            await declare(spec, ledger_id=self._ledger.id, instances=specs, claim=False)

        return self._record(engine, program, targets=[*nodes, *snapshots], spec=spec)

    def _update_all(self, engine: Engine) -> bool:
        spec, wanted = self._cluster.spec, specs_of(self._ledger.instances.all())

        async def program() -> None:
            await declare(spec, ledger_id=self._ledger.id, instances=wanted)

        return self._record(engine, program, excludes=self._urns_on_silent_nodes(), spec=spec)

    def _urns_on_silent_nodes(self) -> list[str]:
        """Return what would wait for a node that does not answer, and fail.

        The converger makes its network when the first instance misses it, and brings it the images they need; and it
        goes on with its instances once it answers.
        """
        silent = [node.id for node in self._ledger.nodes.list() if node.status is NodeStatus.OFFLINE]
        urns = [self._names.urn(NETWORK_TYPE, network_name(node_id)) for node_id in silent]
        urns += [self._names.node_images(node_id) for node_id in silent]
        waiting = [r for r in self._ledger.instances.unsettled() if r.node_id in silent and r.wanted is Wanted.RUNNING]
        return urns + [urn for record in waiting for urn in all_urns(record, names=self._names)]

    def _record(
        self,
        engine: Engine,
        program: Program,
        *,
        targets: Collection[str] = (),
        excludes: Collection[str] = (),
        spec: ClusterSpec,
    ) -> bool:
        """Run an update after which the stack is as `spec` says; return whether it is."""
        result = engine.update(program, targets=tuple(targets), excludes=tuple(excludes))
        note_images(self._ledger, result)
        for urn, words in result.errors.items():
            error = error_of(words)
            if isinstance(error, LedgerMismatch):
                raise error
            log.error("the cluster's file could not be applied", urn=urn or None, error=error.message)
        if result.errors:
            return False
        self._ledger.write_fact(APPLIED, fingerprint(spec))
        log.info("cluster applied", nodes=len(spec.nodes), took_s=round(result.duration_s, 2))
        return True

    def _program(self, spec: ClusterSpec) -> Program:
        async def program() -> None:
            await declare(spec, ledger_id=self._ledger.id, instances=(), claim=False)

        return program

    def _urns_of(self, node_id: str) -> tuple[str, str]:
        return (
            self._names.urn(PROVIDER_TYPE, provider_name(node_id)),
            self._names.urn(NETWORK_TYPE, network_name(node_id)),
        )

    # ---- telling

    def _tell_changes(
        self, *, added: Iterable[NodeSpec], gone: Iterable[NodeSpec], changed: Iterable[tuple[NodeSpec, NodeSpec]]
    ) -> None:
        told = [("node_added", node.id, f"node {node.id} was added: {node.host}") for node in added]
        told += [("node_removed", node.id, f"node {node.id} was removed") for node in gone]
        told += [("node_changed", now.id, f"node {now.id}: {describe_change(was, now)}") for was, now in changed]
        for kind, node_id, message in told:
            log.info("the cluster's file changed", change=message)
            self._ledger.events.add(kind, message=message, node_id=node_id)

    def _tell(self, message: str, *, detail: str | None) -> None:
        if message == self._told:
            return
        self._told = message
        log.error("the cluster's file is not taken over", error=message, detail=detail)
        self._ledger.events.add("cluster_file_refused", message=f"the cluster stays as it was: {message}")


def _look_at(path: Path) -> tuple[int, ...]:
    """Return what tells one version of a file from another; nothing where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def describe_change(was: NodeSpec, now: NodeSpec) -> str:
    """Say for people what changed about a node."""
    before, after = was.model_dump(mode="json"), now.model_dump(mode="json")
    return ", ".join(f"{name} is {_show(after[name])}" for name in after if after[name] != before[name])


def _show(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items()) or "nothing"
    return str(value) if value not in (None, "", []) else "nothing"
