"""The ledger in a SQLite file, in WAL mode.

A write transaction begins with BEGIN IMMEDIATE: the service, a second one beside it, and an operator's `pulumi up`
queue instead of failing halfway.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

BUSY_TIMEOUT_S = 30

READ: dict[str, Any] = {}
WRITE: dict[str, Any] = {"machineuse_write": True}
ASIDE = WRITE
MIGRATE: dict[str, Any] = {"machineuse_write": True, "machineuse_schema": True}

_AWAY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def make_engine(path: Path) -> sa.Engine:
    """Return the connections to the file at `path`, which is made with the first of them."""
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
    sa.event.listen(engine, "connect", _prepare_connection)
    sa.event.listen(engine, "begin", _begin)
    return engine


def take_turn(_connection: sa.Connection) -> None:
    """Wait for the other writers: done already, by BEGIN IMMEDIATE."""


def now() -> sa.ColumnElement[float]:
    """Return the time by this machine's clock, which all users of the file share."""
    return (sa.func.julianday("now") - 2440587.5) * 86400.0


def is_away(error: DBAPIError) -> bool:
    """Say whether the file can't be used now: another writer does not end, or the disk does not take it."""
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _AWAY  # above that is which kind of each it is


def is_forbidden(error: DBAPIError) -> bool:
    """Say whether this user may not write the file."""
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY


def _prepare_connection(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the BEGIN is ours, see _begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # Every commit is on the disk before anybody acts on it: a power cut must not bring back the wish to run of an
    # instance whose volume is deleted already. NORMAL, which only keeps the file whole, forgets the last half minute.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    # A migration may make a table anew and drop the old one: what refers to that must not go with it.
    references = "OFF" if options.get("machineuse_schema", False) else "ON"
    connection.exec_driver_sql(f"PRAGMA foreign_keys={references}")  # here, because inside of one it does nothing
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("machineuse_write", False) else "BEGIN")
