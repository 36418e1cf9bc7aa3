"""What the nodes have promised: kept as sums, changed in the transaction that changes an instance.

Adding up 50,000 instances would take longer than everything else that a placement does. So each node has a row of
sums, and whoever writes an instance also writes the difference it makes (`note_change`). Amounts are whole MiB, so
that adding and taking away for years ends where it began; a property test compares them with the instances.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa

from provisioner.ledger import tables
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.states import Wanted

MIB_PER_GB = 1024


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

    @property
    def labels(self) -> Mapping[str, str]:
        """Return its labels, read only when somebody asks."""
        return _parse_labels(self.labels_json)


class LoadReader:
    """Reads what a decision on an instance rests on, inside the transaction that decides.

    On its connection: callers who wait for their turn to write hold all others, so one that asked for a second
    connection would wait for them, and they for it.
    """

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def nodes(self) -> list[NodeState]:
        """Return every node, in no order."""
        return list(map(NodeState._make, self._connection.execute(_STATES)))

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
    table = tables.node_loads
    amounts = {name: sign * getattr(load, name) for name in ("instances", "memory_mib", "cpu_cores", "disk_mib")}
    added = {name: table.c[name] + amount for name, amount in amounts.items()}
    done = connection.execute(table.update().where(table.c.node_id == load.node_id).values(**added))
    if done.rowcount == 0:
        connection.execute(table.insert().values(node_id=load.node_id, **amounts))


@lru_cache(maxsize=4096)
def _parse_labels(text: str) -> Mapping[str, str]:
    labels: Mapping[str, str] = json.loads(text)
    return labels


def _make_query() -> sa.Select[Any]:
    node, load = tables.nodes.c, tables.node_loads.c
    return sa.select(
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
    ).select_from(tables.nodes.outerjoin(tables.node_loads, load.node_id == node.id))


_STATES = _make_query()
