"""Opens the ledger's database and brings it to the newest schema.

A SQLite file by default, or a PostgreSQL database by URL; what holds for both:

- a reader sees one consistent state, and waits for nobody;
- there is one writer at a time, in whatever process, and it begins by waiting for its turn: what it reads stays true
  until it commits, and two never fail halfway because of each other;
- what is committed survives a power cut.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from provisioner.errors import LedgerMismatch, LedgerUnavailable
from provisioner.ledger import postgresql, sqlite, tables

SCHEMA = "0003"
"""The newest migration."""

Location = Path | SecretStr
"""Where a ledger is: a SQLite file, or the URL of a PostgreSQL database, which may have a password in it."""


class Database:
    """One database and this process's connections to it; safe to use from several threads."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.is_shared = not isinstance(location, Path)
        """Whether it is a server that processes on other hosts may use too."""
        self.token = secrets.token_hex(4)
        """Names this process in what it tells the others."""
        self._kind = sqlite if isinstance(location, Path) else postgresql
        if isinstance(location, Path):
            self.engine = sqlite.make_engine(location)
            self.name = str(location)
        else:
            self.engine = postgresql.make_engine(location)
            self.name = self.engine.url.render_as_string(hide_password=True).replace("+psycopg", "", 1)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection for reading one consistent state. Raises LedgerUnavailable."""
        with (
            self._told_apart(),
            self.engine.connect().execution_options(**self._kind.READ) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection inside a write transaction; commits at the end, rolls back on any error.

        Raises LedgerUnavailable. Whether what was to be committed just then was, is unknown in that case.
        """
        with (
            self._told_apart(),
            self.engine.connect().execution_options(**self._kind.WRITE) as connection,
            connection.begin(),
        ):
            self._kind.take_turn(connection)
            yield connection

    @contextmanager
    def write_aside(self) -> Iterator[sa.Connection]:
        """Give a connection for one statement that decides by itself, and must not wait for other writers' turns."""
        with (
            self._told_apart(),
            self.engine.connect().execution_options(**self._kind.WRITE) as connection,
            connection.begin(),
        ):
            yield connection

    def now(self) -> sa.ColumnElement[float]:
        """Return the time in seconds since the epoch, by the one clock that all users of the database share."""
        return postgresql.now() if self.is_shared else sqlite.now()

    def migrate(self) -> None:
        """Bring the schema to the newest version; does nothing, quickly, when it is there already.

        Of several processes that start at once, one does it and the others wait.
        """
        if self.revision() == SCHEMA:
            return
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def revision(self) -> str | None:
        """Return the version of the schema; None where there is none yet."""
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def ledger_id(self) -> str:
        """Return this ledger's id, made when the ledger was."""
        value = self.fact("ledger_id")
        if value is None:
            raise LedgerMismatch(f"{self.name} is not a ledger of Machineuse: it has no id.")
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

    def tell(self, connection: sa.Connection, instance_id: str) -> None:
        """Tell the other processes, once the transaction is committed, that this instance has changed."""
        if self.is_shared:
            postgresql.tell(connection, f"{self.token} {instance_id}")

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Turn "the server can't be reached" into an error of ours; what else goes wrong is a bug, and stays one."""
        try:
            yield
        except DBAPIError as error:
            lost = error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
            if not (self.is_shared and (lost or postgresql.is_cut_off(error.orig))):
                raise
            raise LedgerUnavailable(
                "The ledger's database does not answer.",
                detail=f"{self.name}: {_words_of(error)}",
                resolution="It is tried again by itself; if this stays so, look at the database server.",
            ) from error


def _words_of(error: DBAPIError) -> str:
    """Return what the driver said: in one line, without the statement and its values."""
    with contextlib.suppress(AttributeError):
        return " ".join(str(error.orig).split())
    return type(error).__name__
