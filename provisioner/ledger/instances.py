"""Instances, their snapshots and their ports, in the ledger.

The ledger stores; it does not decide. A change is one write transaction: the record is read, a pure function (see
provisioner/lifecycle.py) looks at it and returns an `Update`, and the update is written, or nothing is. So no two
callers ever decide on the same state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sqlalchemy as sa

from provisioner.errors import NotFound
from provisioner.ledger import tables
from provisioner.ledger.database import Database
from provisioner.ledger.events import add_event
from provisioner.ledger.loads import KnownNodes, NodeLoad, note_change, read_loads
from provisioner.ledger.loads import LoadReader as LoadReader  # part of what a decision is given
from provisioner.ledger.records import InstanceRecord, Moving, SnapshotRecord, SnapshotState
from provisioner.states import Status, Wanted

_MANY = 100
"""How many instances one transaction changes, or one query names, at most: nobody else waits long for the next."""
_PROMISING = frozenset({"node_id", "wanted", "body", "memory_gb", "cpu_cores", "disk_gb", "volume"})
"""What an instance's part in its node's load depends on."""
_COLUMNS = [column.name for column in tables.instances.columns]


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What a decision changes about one instance; all of it is written in one transaction."""

    values: Mapping[str, Any] = field(default_factory=dict)
    put_snapshots: tuple[SnapshotRecord, ...] = ()
    drop_snapshots: tuple[int, ...] = ()
    event: tuple[str, str] | None = None
    """Kind and message of the event to record."""
    release_ports: bool = False
    take_ports: tuple[int, ...] = ()
    remove: bool = False


Decide = Callable[[InstanceRecord, LoadReader], Update | None]


class Instances:
    """The table of instances."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._nodes = KnownNodes()

    def create(self, draft: Callable[[LoadReader], tuple[InstanceRecord, str]]) -> InstanceRecord:
        """Insert the instance that `draft` makes of the nodes' load; return it. `draft` returns it with a message."""
        with self._database.write() as connection:
            record, message = draft(LoadReader(connection, self._nodes))
            connection.execute(tables.instances.insert(), _row(record))
            note_change(connection, before=None, after=record)
            _take_ports(connection, record, [p for p in (record.debug_port, record.stream_port) if p is not None])
            add_event(connection, kind="create", message=message, instance_id=record.id, node_id=record.node_id)
            self._database.tell(connection, record.id)
        return record

    def change(self, instance_id: str, decide: Decide) -> InstanceRecord | None:
        """Let `decide` look at the record and write what it returns; return the record as it then is.

        Returns None when the update removed it. Raises NotFound, and whatever `decide` raises: nothing is
        written then.
        """
        with self._database.write() as connection:
            record = _read_one(connection, instance_id)
            update = decide(record, LoadReader(connection, self._nodes))
            if update is None:
                return record
            _write(connection, record, update)
            self._database.tell(connection, record.id)
            return None if update.remove else _read_one(connection, instance_id)

    def change_many(self, instance_ids: Sequence[str], decide: Decide) -> list[str]:
        """Do what `change` does for many instances, a hundred in a transaction; return the ids of those that changed.

        Instances that are gone by now are passed over. Whatever `decide` raises undoes its hundred and ends the rest.
        """
        changed: list[str] = []
        for start in range(0, len(instance_ids), _MANY):
            with self._database.write() as connection:
                found = _read(connection, [tables.instances.c.id.in_(instance_ids[start : start + _MANY])])
                for record in found:
                    update = decide(record, LoadReader(connection, KnownNodes()))  # the one before has written
                    if update is not None:
                        _write(connection, record, update)
                        self._database.tell(connection, record.id)
                        changed.append(record.id)
        return changed

    def get(self, instance_id: str) -> InstanceRecord:
        """Return the instance; raise NotFound."""
        with self._database.read() as connection:
            return _read_one(connection, instance_id)

    def find(self, instance_id: str) -> InstanceRecord | None:
        """Return the instance, or None."""
        try:
            return self.get(instance_id)
        except NotFound:
            return None

    def page(
        self, *, status: Status | None = None, node_id: str | None = None, limit: int = 100, offset: int = 0
    ) -> tuple[list[InstanceRecord], int]:
        """Return one page, oldest first, and how many there are in all. Instances being deleted are still listed."""
        where: list[sa.ColumnElement[bool]] = []
        if status is not None:
            where.append(tables.instances.c.status == status.value)
        if node_id is not None:
            where.append(tables.instances.c.node_id == node_id)
        with self._database.read() as connection:
            total = connection.scalar(sa.select(sa.func.count()).select_from(tables.instances).where(*where)) or 0
            return _read(connection, where, limit=limit, offset=offset), total

    def all(self) -> list[InstanceRecord]:
        """Return every instance, oldest first."""
        with self._database.read() as connection:
            return _read(connection, [])

    def existing(self, instance_ids: Iterable[str]) -> set[str]:
        """Return which of these instances there are."""
        column, ids = tables.instances.c.id, sorted(set(instance_ids))
        found: set[str] = set()
        with self._database.read() as connection:
            for start in range(0, len(ids), _MANY):
                found.update(connection.scalars(sa.select(column).where(column.in_(ids[start : start + _MANY]))))
        return found

    def unsettled(self) -> list[InstanceRecord]:
        """Return the instances that there is something to do about. Oldest first.

        They are not (known to be) what they should be, keep what they no longer need, or are to get a live snapshot.
        """
        table, snapshots = tables.instances, tables.snapshots
        due = sa.select(snapshots.c.instance_id).where(
            sa.or_(
                snapshots.c.state == SnapshotState.EXPIRING.value,
                sa.and_(snapshots.c.state == SnapshotState.PENDING.value, snapshots.c.live),
            )
        )
        with self._database.read() as connection:
            return _read(connection, [sa.or_(table.c.settled_generation < table.c.generation, table.c.id.in_(due))])

    def moving(self) -> list[InstanceRecord]:
        """Return the instances that are being moved to another node, oldest first."""
        with self._database.read() as connection:
            return _read(connection, [tables.instances.c.moving.is_not(None)])

    def on_node(self, node_id: str) -> list[InstanceRecord]:
        """Return the instances that are, or sleep, on a node, oldest first."""
        with self._database.read() as connection:
            return _read(connection, [tables.instances.c.node_id == node_id])

    def failed(self) -> list[InstanceRecord]:
        """Return the instances that have failed, oldest first."""
        with self._database.read() as connection:
            return _read(connection, [tables.instances.c.status == Status.FAILED.value])

    def counts(self) -> dict[Status, int]:
        """Return how many instances are in each status."""
        with self._database.read() as connection:
            rows = connection.execute(
                sa.select(tables.instances.c.status, sa.func.count()).group_by(tables.instances.c.status)
            )
            found = {Status(name): int(count) for name, count in rows}
        return {status: found.get(status, 0) for status in Status}

    def loads(self) -> tuple[NodeLoad, ...]:
        """Return what each node with at least one instance has promised."""
        with self._database.read() as connection:
            return read_loads(connection)

    @contextmanager
    def reader(self) -> Iterator[LoadReader]:
        """Give what decisions are given, outside of one: for asking, not for promising."""
        with self._database.read() as connection:
            yield LoadReader(connection, self._nodes)


def _row(record: InstanceRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in _COLUMNS}
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _record(row: sa.RowMapping, snapshots: Sequence[SnapshotRecord]) -> InstanceRecord:
    values: dict[str, Any] = {str(k): v for k, v in row.items()}
    values["status"] = Status(values["status"])
    values["wanted"] = Wanted(values["wanted"])
    values["moving"] = Moving(values["moving"]) if values["moving"] is not None else None
    return InstanceRecord(**values, snapshots=tuple(snapshots))


def _read_one(connection: sa.Connection, instance_id: str) -> InstanceRecord:
    found = _read(connection, [tables.instances.c.id == instance_id])
    if not found:
        raise NotFound(f"There is no instance '{instance_id}'.")
    return found[0]


def _read(
    connection: sa.Connection, where: Sequence[sa.ColumnElement[bool]], *, limit: int | None = None, offset: int = 0
) -> list[InstanceRecord]:
    table = tables.instances
    query = sa.select(table).where(*where).order_by(table.c.created_at, table.c.id).limit(limit).offset(offset)
    rows = connection.execute(query).mappings().all()
    ids = [row["id"] for row in rows]
    snapshots: dict[str, list[SnapshotRecord]] = {}
    query_snapshots = sa.select(tables.snapshots).order_by(tables.snapshots.c.generation)
    if len(ids) <= 200:  # beyond that, one scan of the small table beats an enormous IN list
        query_snapshots = query_snapshots.where(tables.snapshots.c.instance_id.in_(ids))
    for row in connection.execute(query_snapshots).mappings() if ids else ():
        values = dict(row) | {"state": SnapshotState(row["state"])}
        snapshots.setdefault(row["instance_id"], []).append(SnapshotRecord(**values))
    return [_record(row, snapshots.get(row["id"], ())) for row in rows]


def _write(connection: sa.Connection, record: InstanceRecord, update: Update) -> None:
    if update.event is not None:
        kind, message = update.event
        add_event(connection, kind=kind, message=message, instance_id=record.id, node_id=record.node_id)
    if update.remove:
        note_change(connection, before=record, after=None)
        connection.execute(tables.instances.delete().where(tables.instances.c.id == record.id))
        return
    moved = dataclasses.replace(record, **{k: v for k, v in update.values.items() if k in _PROMISING})
    note_change(connection, before=record, after=moved)
    if update.values:
        values = {name: _plain(value) for name, value in update.values.items()}
        connection.execute(tables.instances.update().where(tables.instances.c.id == record.id).values(**values))
    if update.release_ports:
        connection.execute(tables.ports.delete().where(tables.ports.c.instance_id == record.id))
    _take_ports(connection, moved, update.take_ports)
    mine = tables.snapshots.c.instance_id == record.id
    for generation in (*update.drop_snapshots, *(s.generation for s in update.put_snapshots)):
        connection.execute(tables.snapshots.delete().where(mine, tables.snapshots.c.generation == generation))
    for snapshot in update.put_snapshots:
        values = dataclasses.asdict(snapshot) | {"state": snapshot.state.value}
        connection.execute(tables.snapshots.insert().values(**values))


def _take_ports(connection: sa.Connection, record: InstanceRecord, ports: Sequence[int]) -> None:
    if ports:
        rows = [{"node_id": record.node_id, "port": port, "instance_id": record.id} for port in ports]
        connection.execute(tables.ports.insert(), rows)
