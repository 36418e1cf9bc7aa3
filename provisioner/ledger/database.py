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
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from provisioner.errors import LedgerMismatch, LedgerUnavailable, SettingsError
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
            self.engine = self._aside = sqlite.make_engine(location)
            self.name = str(location)
        else:
            self.engine = postgresql.make_engine(location, pool=postgresql.POOL)
            self._aside = postgresql.make_engine(location, pool=postgresql.POOL_ASIDE)
            self.name = postgresql.name_of(self.engine)

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
    def write(self, *, schema: bool = False) -> Iterator[sa.Connection]:
        """Give a connection inside a write transaction; commits at the end, rolls back on any error.

        With `schema` it may change tables.

        Raises LedgerUnavailable. Whether what was to be committed just then was, is unknown in that case.
        """
        options = self._kind.MIGRATE if schema else self._kind.WRITE
        with (
            self._told_apart(),
            self.engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            self._kind.take_turn(connection)
            yield connection

    @contextmanager
    def write_aside(self) -> Iterator[sa.Connection]:
        """Give a connection for statements that decide by themselves, and must not wait for other writers' turns."""
        with (
            self._told_apart(),
            self._aside.connect().execution_options(**self._kind.ASIDE) as connection,
            connection.begin(),
        ):
            yield connection

    def now(self) -> sa.ColumnElement[float]:
        """Return the time in seconds since the epoch, by the one clock that all users of the database share."""
        return postgresql.now() if self.is_shared else sqlite.now()

    def migrate(self) -> None:
        """Bring the schema to the newest version; does nothing, quickly, when it is there already.

        Of several processes that start at once, one does it and the others wait. Raises LedgerMismatch where a newer
        version has made the schema.
        """
        if self.revision() == SCHEMA:
            return
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        with self.write(schema=True) as connection:
            found = MigrationContext.configure(connection).get_current_revision()
            if found is not None and found not in known:
                raise LedgerMismatch(
                    f"The ledger in {self.name} is of a newer Machineuse than this one: its schema is {found}, and"
                    f" {SCHEMA} is the newest known here.",
                    resolution="Use that version here too: all services and commands on a ledger are of one version.",
                )
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
        return self.settle_fact("ledger_id", secrets.token_hex(8))

    def settle_fact(self, name: str, value: str) -> str:
        """Write down a fact that never changes, unless it is known; return what is known."""
        with self.write() as connection:
            known = connection.scalar(sa.select(tables.facts.c.value).where(tables.facts.c.name == name))
            if known is None:
                connection.execute(tables.facts.insert().values(name=name, value=value))
        return value if known is None else str(known)

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
        self._aside.dispose()

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Turn "the database can't be used" into an error of ours; what else goes wrong is a bug, and stays one."""
        try:
            yield
        except NoConnectionFree as error:
            raise self._unavailable("no connection became free") from error
        except DBAPIError as error:
            if self._kind.is_away(error):
                raise self._unavailable(_words_of(error)) from error
            if self._kind.is_forbidden(error):
                raise SettingsError(
                    f"The ledger in {self.name} can't be written: this user may not do it.",
                    detail=_words_of(error),
                    resolution="Let it own the database or the file.",
                ) from error
            raise

    def _unavailable(self, detail: str) -> LedgerUnavailable:
        where = "the database server" if self.is_shared else "the disk, and at who else uses the file"
        return LedgerUnavailable(
            "The ledger's database does not answer.",
            detail=f"{self.name}: {detail}",
            resolution=f"It is tried again by itself; if this stays so, look at {where}.",
        )


def _words_of(error: DBAPIError) -> str:
    """Return what the driver said: in one line, without the statement and its values."""
    with contextlib.suppress(AttributeError):
        return " ".join(str(error.orig).split())
    return type(error).__name__
