"""What the nodes have promised: kept as sums, changed in the transaction that changes an instance.

Adding up 50,000 instances would take longer than everything else that a placement does. So each node has a row of
sums, and whoever writes an instance also writes the difference it makes (`note_change`). Amounts are whole MiB, so
that adding and taking away for years ends where it began; a property test compares them with the instances.

Reading a thousand nodes would take as long as choosing one. So each row of a node has a `revision`: every change of it,
or of its sums, makes that the next number, and whoever has read all up to one number reads only what is above it.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa

from provisioner.ledger import tables
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.states import Wanted
from stacks.spec import Availability

MIB_PER_GB = 1024
_SUMS = ("instances", "memory_mib", "cpu_cores", "disk_mib")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLoad:
    """What a node has promised already."""

    node_id: str
    instances: int
    memory_mib: int
    cpu_cores: int
    disk_mib: int


class NodeState(NamedTuple):
    """A node as a placement sees it: what it has, how busy it is, what it has promised.

    A named tuple, because there may be a thousand of them to make for every instance that is created.
    """

    id: str
    online: bool
    labels_json: str
    cpu_cores: float | None
    memory_bytes: int | None
    disk_bytes: int | None
    disk_quota: bool
    cpu_percent: float | None
    memory_percent: float | None
    disk_percent: float | None
    instances: int = 0
    promised_memory_mib: int = 0
    promised_cpu_cores: int = 0
    promised_disk_mib: int = 0
    availability: str = Availability.ACTIVE.value
    """Whether it takes instances, as the newest reading of the cluster's file says that any service took over."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Return its labels, read only when somebody asks."""
        return _parse_labels(self.labels_json)


class KnownNodes:
    """The nodes as they were read last; only those that have changed since are read again.

    Writers come one after the other, so no number below one that was read appears later. Rows that are gone are found
    by counting. To be read before a transaction writes anything: what is rolled back must not stay known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, NodeState] = {}
        self._revision = -1

    def read(self, connection: sa.Connection) -> list[NodeState]:
        """Return every node as it is for this connection, in no order."""
        with self._lock:
            count, newest = connection.execute(_NEWEST).one()
            if newest >= self._revision:  # else this transaction began before the one that was read last
                self._take(connection, newest=newest)
            if newest < self._revision or len(self._states) != count:
                self._states, self._revision = {}, -1
                self._take(connection, newest=newest)
            return list(self._states.values())

    def _take(self, connection: sa.Connection, *, newest: int) -> None:
        rows = connection.execute(_CHANGED, {"seen": self._revision}).all()
        self._states |= {row[0]: NodeState._make(row) for row in rows}
        self._revision = newest


class LoadReader:
    """Reads what a decision on an instance rests on, inside the transaction that decides.

    On its connection: callers who wait for their turn to write hold all others, so one that asked for a second
    connection would wait for them, and they for it.
    """

    def __init__(self, connection: sa.Connection, known: KnownNodes) -> None:
        """Read over `connection`; `known` is what was read of the nodes before, if nothing is written yet."""
        self._connection = connection
        self._known = known

    def nodes(self) -> list[NodeState]:
        """Return every node, in no order."""
        return self._known.read(self._connection)

    def ports(self, node_id: str) -> frozenset[int]:
        """Return the ports that a node has promised."""
        query = sa.select(tables.ports.c.port).where(tables.ports.c.node_id == node_id)
        return frozenset(self._connection.scalars(query))

    def is_online(self, node_id: str) -> bool:
        """Say whether a node answers; one that is gone does not."""
        query = sa.select(tables.nodes.c.status).where(tables.nodes.c.id == node_id)
        return self._connection.scalar(query) == NodeStatus.ONLINE.value

    def nodes_with_leftovers(self, instance_id: str) -> frozenset[str]:
        """Return the nodes on which something of an instance is left over."""
        table = tables.leftovers
        query = sa.select(table.c.node_id).where(table.c.urn.contains(f"::{instance_id}-", autoescape=True)).distinct()
        return frozenset(self._connection.scalars(query))


def to_mib(gb: float) -> int:
    """Return GiB as whole MiB, rounded up."""
    return math.ceil(gb * MIB_PER_GB)


def read_loads(connection: sa.Connection) -> tuple[NodeLoad, ...]:
    """Return what each node with at least one instance has promised, by id."""
    table = tables.node_loads
    rows = connection.execute(sa.select(table).where(table.c.instances > 0).order_by(table.c.node_id)).mappings()
    return tuple(NodeLoad(**row) for row in rows)


def load_of(record: InstanceRecord) -> NodeLoad:
    """Return what one instance takes of its node: all of it from the wish to run until its body is gone, else nothing.

    A home on a cloud volume takes nothing of the node's disk.
    """
    if not (record.body or record.wanted is Wanted.RUNNING):
        return NodeLoad(node_id=record.node_id, instances=0, memory_mib=0, cpu_cores=0, disk_mib=0)
    return NodeLoad(
        node_id=record.node_id,
        instances=1,
        memory_mib=to_mib(record.memory_gb),
        cpu_cores=record.cpu_cores,
        disk_mib=to_mib(record.disk_gb) if record.volume == "docker" else 0,
    )


def note_change(connection: sa.Connection, *, before: InstanceRecord | None, after: InstanceRecord | None) -> None:
    """Bring the sums up to date with a change of one instance; None is "there is none"."""
    old = load_of(before) if before is not None else None
    new = load_of(after) if after is not None else None
    if old == new:
        return
    if old is not None:
        _add(connection, old, sign=-1)
    if new is not None:
        _add(connection, new, sign=1)


def _add(connection: sa.Connection, load: NodeLoad, *, sign: int) -> None:
    if load.instances == 0:
        return
    amounts = {name: sign * getattr(load, name) for name in _SUMS}
    done = connection.execute(_ADD, {"to": load.node_id} | {f"more_{name}": amounts[name] for name in _SUMS})
    if done.rowcount == 0:
        connection.execute(tables.node_loads.insert(), {"node_id": load.node_id} | amounts)
    connection.execute(_TOUCH, {"to": load.node_id})


@lru_cache(maxsize=4096)
def _parse_labels(text: str) -> Mapping[str, str]:
    labels: Mapping[str, str] = json.loads(text)
    return labels


def _make_query() -> sa.Select[Any]:
    node, load = tables.nodes.c, tables.node_loads.c
    query = sa.select(
        node.id,
        node.status == NodeStatus.ONLINE.value,
        sa.cast(node.labels, sa.Text),
        node.cpu_cores,
        node.memory_bytes,
        node.disk_bytes,
        node.disk_quota,
        node.cpu_percent,
        node.memory_percent,
        node.disk_percent,
        *(sa.func.coalesce(sums, 0) for sums in (load.instances, load.memory_mib, load.cpu_cores, load.disk_mib)),
        node.availability,
    )
    joined = query.select_from(tables.nodes.outerjoin(tables.node_loads, load.node_id == node.id))
    return joined.where(node.revision > sa.bindparam("seen"))


def _make_addition() -> sa.Update:
    table = tables.node_loads
    added = {name: table.c[name] + sa.bindparam(f"more_{name}") for name in _SUMS}
    return table.update().where(table.c.node_id == sa.bindparam("to")).values(**added)


def _make_next_revision() -> sa.ScalarSelect[int]:
    newest = tables.nodes.alias().c.revision
    return sa.select(sa.func.coalesce(sa.func.max(newest), 0) + 1).scalar_subquery()


NEXT_REVISION = _make_next_revision()
"""For whoever changes a node's row, or its sums."""

# Made once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_NEWEST = sa.select(sa.func.count(tables.nodes.c.id), sa.func.coalesce(sa.func.max(tables.nodes.c.revision), 0))
_CHANGED = _make_query()
_ADD = _make_addition()
_TOUCH = tables.nodes.update().where(tables.nodes.c.id == sa.bindparam("to")).values(revision=NEXT_REVISION)
