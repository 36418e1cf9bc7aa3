"""The ledger in a SQLite file, in WAL mode.

A write transaction begins with BEGIN IMMEDIATE: the service, a second one beside it, and an operator's `pulumi up`
queue instead of failing halfway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

BUSY_TIMEOUT_S = 30

READ: dict[str, Any] = {}
WRITE: dict[str, Any] = {"machineuse_write": True}


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
