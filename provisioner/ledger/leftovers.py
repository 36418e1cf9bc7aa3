"""What a forced delete had to leave on a node that did not answer; removed when the node is back."""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from provisioner.ledger import tables
from provisioner.ledger.database import Database


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """One Docker object that is no resource any more, but may still exist."""

    id: int
    node_id: str
    urn: str
    name: str


class Leftovers:
    """The table of leftovers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, *, node_id: str, urn: str, name: str) -> None:
        """Note one object."""
        with self._database.write() as connection:
            connection.execute(tables.leftovers.insert().values(node_id=node_id, urn=urn, name=name, at=time.time()))

    def list(self, node_id: str) -> list[Leftover]:
        """Return what is noted for a node, oldest first (a container before its volume)."""
        table = tables.leftovers
        query = sa.select(table.c.id, table.c.node_id, table.c.urn, table.c.name)
        with self._database.read() as connection:
            rows = connection.execute(query.where(table.c.node_id == node_id).order_by(table.c.id)).mappings().all()
        return [Leftover(**row) for row in rows]

    def remove(self, leftover_id: int) -> None:
        """Forget one that is gone."""
        with self._database.write() as connection:
            connection.execute(tables.leftovers.delete().where(tables.leftovers.c.id == leftover_id))
