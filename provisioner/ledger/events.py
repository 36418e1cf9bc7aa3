"""What happened, for people: kept bounded, newest last."""

from __future__ import annotations

import time

import sqlalchemy as sa

from provisioner.ledger import tables
from provisioner.ledger.database import Database
from provisioner.ledger.records import EventRecord

KEEP = 50_000
"""How many events the ledger keeps in all."""


def add_event(
    connection: sa.Connection, *, kind: str, message: str, instance_id: str | None = None, node_id: str | None = None
) -> None:
    """Write one event inside the transaction of what it tells about."""
    row = {"at": time.time(), "instance_id": instance_id, "node_id": node_id, "kind": kind, "message": message}
    connection.execute(tables.events.insert(), row)


class Events:
    """The table of events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, kind: str, *, message: str, instance_id: str | None = None, node_id: str | None = None) -> None:
        """Record one event."""
        with self._database.write() as connection:
            add_event(connection, kind=kind, message=message, instance_id=instance_id, node_id=node_id)

    def list(self, *, instance_id: str | None = None, limit: int = 100) -> list[EventRecord]:
        """Return the newest `limit` events, oldest first."""
        table = tables.events
        query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
        if instance_id is not None:
            query = query.where(table.c.instance_id == instance_id)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [EventRecord(**row) for row in reversed(rows)]

    def tell_of(self, kind: str, *, instance_id: str) -> bool:
        """Say whether an event of that kind is recorded of the instance."""
        table = tables.events
        query = sa.select(table.c.id).where(table.c.instance_id == instance_id, table.c.kind == kind).limit(1)
        with self._database.read() as connection:
            return connection.scalar(query) is not None

    def prune(self) -> None:
        """Delete all but the newest events."""
        with self._database.write() as connection:
            newest = connection.scalar(sa.select(sa.func.max(tables.events.c.id))) or 0
            connection.execute(tables.events.delete().where(tables.events.c.id <= newest - KEEP))
