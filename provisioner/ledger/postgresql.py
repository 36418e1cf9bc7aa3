"""The ledger in a PostgreSQL database, through psycopg.

A write transaction begins by taking one lock of the database: so there is one writer at a time, as with SQLite, and a
decision rests on what nobody else is about to change. It sees everything that was committed before its turn came
(READ COMMITTED: under REPEATABLE READ it would see what was there when it began to wait). A reader is given one state
(REPEATABLE READ), and waits for nobody.

A process that is frozen or cut off in the middle of a transaction loses it after a few seconds, and with it the lock.

NOTIFY tells the other processes of a change as soon as it is committed: see `listen`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import sqlalchemy as sa
import structlog
from pydantic import SecretStr
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from provisioner.errors import SettingsError

log = structlog.get_logger(__name__)

READ: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
WRITE: dict[str, Any] = {"isolation_level": "READ COMMITTED", "postgresql_readonly": False}
MIGRATE = WRITE
ASIDE: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
"""Each statement for itself: a process that is frozen after one keeps nobody waiting."""

POOL = {"pool_size": 5, "max_overflow": 15, "pool_timeout": 30, "pool_pre_ping": True}
"""At most 20 connections a process: a server with its 100 has room for several, and for others."""
POOL_ASIDE = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 30, "pool_pre_ping": True}
"""For what must not wait until one of those 20 is free: all of them may be waiting for their turn to write."""
CONNECT_TIMEOUT_S = 3
STALLED_S = 5
"""How long a transaction may stand still before the server ends it; between two statements, ours only think."""
LOCK_TIMEOUT_S = 30

_CHANNEL = "machineuse"
_WRITER_LOCK = 0x6D616368  # "mach": told from other programs' locks in the same database by chance only
_LISTEN_S = 0.2
"""How long one wait for news lasts; the thread looks at this interval whether it should end."""
_RECONNECT_S = 1.0
_CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "machineuse",
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""So that a server that is gone without a word is noticed in seconds; the ledger's URL may say otherwise."""
_SECRETS = ("password", "sslpassword")
"""What a URL may have behind its `?` and nobody is to read."""


def make_engine(url: SecretStr, *, pool: dict[str, Any]) -> sa.Engine:
    """Return the connections to the database at `url`, none of which is made yet. Raises SettingsError."""
    parsed = _parse(url)
    given = {name: value for name, value in _CONNECT_ARGS.items() if name not in parsed.query}
    engine = sa.create_engine(parsed, connect_args=given, hide_parameters=True, **pool)
    sa.event.listen(engine, "connect", _prepare_connection)
    return engine


def name_of(engine: sa.Engine) -> str:
    """Return the database's URL without what is secret in it."""
    shown = engine.url.difference_update_query(_SECRETS)
    return shown.render_as_string(hide_password=True).replace("+psycopg", "", 1)


def _parse(url: SecretStr) -> sa.URL:
    try:
        parsed = sa.make_url(url.get_secret_value()).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or "@" in (parsed.host or ""):  # the rest of a password, that is
        raise SettingsError(  # from nothing: the parser quotes what may be a piece of the password
            "MACHINEUSE_LEDGER is no URL of a PostgreSQL database.",
            resolution="It has the form postgresql://user:password@host:5432/database; in a password, @ is written %40,"
            " / is %2F and : is %3A.",
        )
    return parsed


def take_turn(connection: sa.Connection) -> None:
    """Wait for the other writers; the turn ends with the transaction."""
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER_LOCK)))


def now() -> sa.ColumnElement[float]:
    """Return the time by the server's clock."""
    return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)


def tell(connection: sa.Connection, message: str) -> None:
    """Send a message to all who listen, once the transaction is committed."""
    connection.execute(sa.select(sa.func.pg_notify(_CHANNEL, message)))


def is_away(error: DBAPIError) -> bool:
    """Say whether the server could not be reached, or has ended a connection: whose transaction stood still, say."""
    return (
        error.connection_invalidated
        or isinstance(error, OperationalError | InterfaceError)
        or isinstance(error.orig, psycopg.errors.IdleInTransactionSessionTimeout)
    )


def is_forbidden(error: DBAPIError) -> bool:
    """Say whether the server answers, but this user may not do what a ledger needs."""
    return isinstance(error.orig, psycopg.errors.InsufficientPrivilege)


def _prepare_connection(connection: Any, _record: object) -> None:
    connection.autocommit = True
    connection.execute(f"SET idle_in_transaction_session_timeout = '{STALLED_S}s'")
    connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    connection.autocommit = False


class Listener:
    """A thread with a connection of its own that hands on what others `tell`."""

    def __init__(self, engine: sa.Engine, *, heard: Callable[[str], None], again: Callable[[], None]) -> None:
        """Call `heard` with every message, and `again` when messages may have been missed. Neither may raise."""
        self._engine = engine
        self._heard = heard
        self._again = again
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machineuse-listener", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_RECONNECT_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except psycopg.Error as error:
                log.warning("not told of changes", error=" ".join(str(error).split()))
                self._stopping.wait(_RECONNECT_S)

    def _listen(self) -> None:
        arguments, options = self._engine.dialect.create_connect_args(self._engine.url)
        with psycopg.connect(*arguments, **_CONNECT_ARGS | dict(options), autocommit=True) as connection:
            connection.execute(f"LISTEN {_CHANNEL}")
            self._again()
            while not self._stopping.is_set():
                for notice in connection.notifies(timeout=_LISTEN_S):
                    self._heard(notice.payload)
