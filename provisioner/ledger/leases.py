"""Leases in the ledger: who may do what only one may, and until when.

Each change is one statement that decides by itself, so two can't both succeed, and none waits for another's
transaction. The time is the database's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from provisioner.ledger import tables
from provisioner.ledger.database import Database


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRecord:
    """One lease, as it was when it was read."""

    name: str
    holder: str
    taken_at: float
    """When this holder got it; renewing does not change that."""
    expires_at: float
    is_over: bool


class Leases:
    """The table of leases."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, name: str, *, holder: str, duration_s: float, instead_of: str | None = None) -> LeaseRecord:
        """Take or renew the lease for `duration_s` seconds from now, unless somebody else holds it; return it.

        Whoever got it is the record's `holder`. `instead_of` names a holder that is known to be dead.
        """
        now = self._database.now()
        until = now + duration_s
        table = tables.leases
        insert = postgresql.insert(table) if self._database.is_shared else sqlite.insert(table)
        free = [table.c.holder == holder, table.c.expires_at < now]
        if instead_of is not None:
            free.append(table.c.holder == instead_of)
        statement = insert.values(name=name, holder=holder, taken_at=now, expires_at=until).on_conflict_do_update(
            index_elements=["name"],
            set_={
                "holder": holder,
                "taken_at": sa.case((table.c.holder == holder, table.c.taken_at), else_=now),
                "expires_at": until,
            },
            where=sa.or_(*free),
        )
        with self._database.write_aside() as connection:
            connection.execute(statement)
            found = self._read(connection, name)
        return found or self.take(name, holder=holder, duration_s=duration_s, instead_of=instead_of)

    def release(self, name: str, *, holder: str) -> None:
        """Give the lease back, if this holder still has it."""
        table = tables.leases
        with self._database.write_aside() as connection:
            connection.execute(table.delete().where(table.c.name == name, table.c.holder == holder))

    def get(self, name: str) -> LeaseRecord | None:
        """Return the lease; None when nobody has it."""
        with self._database.read() as connection:
            return self._read(connection, name)

    def _read(self, connection: sa.Connection, name: str) -> LeaseRecord | None:
        table = tables.leases
        query = sa.select(table, (table.c.expires_at < self._database.now()).label("is_over"))
        row = connection.execute(query.where(table.c.name == name)).mappings().first()
        return (
            None
            if row is None
            else LeaseRecord(**{str(k): v for k, v in row.items()} | {"is_over": bool(row["is_over"])})
        )
