"""Opens the ledger's database and brings it to the newest schema.

SQLite in WAL mode by default: readers never wait, one writer at a time, and what is committed survives a power cut. A
write transaction begins with BEGIN IMMEDIATE, so two processes (the service and an operator's `pulumi up`) queue
instead of failing halfway.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext

from provisioner.errors import LedgerMismatch
from provisioner.ledger import tables

SCHEMA = "0002"
"""The newest migration."""

BUSY_TIMEOUT_S = 30


class Database:
    """One database file and its connections; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = sa.create_engine(
            f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
        )
        sa.event.listen(self.engine, "connect", _prepare_connection)
        sa.event.listen(self.engine, "begin", _begin)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection for reading one consistent state."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection inside a write transaction; commits at the end, rolls back on any error."""
        with self.engine.connect().execution_options(machineuse_write=True) as connection, connection.begin():
            yield connection

    def migrate(self) -> None:
        """Bring the schema to the newest version; does nothing, quickly, when it is there already."""
        with self.engine.connect() as connection:
            if MigrationContext.configure(connection).get_current_revision() == SCHEMA:
                return
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def ledger_id(self) -> str:
        """Return this ledger's id, made when the ledger was."""
        value = self.fact("ledger_id")
        if value is None:
            raise LedgerMismatch(f"{self.path} is not a ledger of Machineuse: it has no id.")
        return value

    def make_id(self) -> str:
        """Give this ledger an id unless it has one; return the id it has."""
        with self.write() as connection:
            value = connection.scalar(sa.select(tables.facts.c.value).where(tables.facts.c.name == "ledger_id"))
            if value is None:
                value = secrets.token_hex(8)
                connection.execute(tables.facts.insert().values(name="ledger_id", value=value))
        return str(value)

    def fact(self, name: str) -> str | None:
        """Return a fact about the cluster that was written down, or None."""
        with self.read() as connection:
            value = connection.scalar(sa.select(tables.facts.c.value).where(tables.facts.c.name == name))
        return None if value is None else str(value)

    def write_fact(self, name: str, value: str) -> None:
        """Write down a fact about the cluster, in place of what it was before."""
        with self.write() as connection:
            connection.execute(tables.facts.delete().where(tables.facts.c.name == name))
            connection.execute(tables.facts.insert().values(name=name, value=value))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _prepare_connection(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the BEGIN is ours, see _begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # Every commit is on the disk before anybody acts on it: a power cut must not bring back the wish to run of an
    # instance whose volume is deleted already. NORMAL, which only keeps the file whole, forgets the last half minute.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("machineuse_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
