"""A real PostgreSQL server of the tests' own: on loopback, in a directory of its own, gone afterwards."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
from psycopg import sql
from pydantic import SecretStr

from provisioner.ledger import Ledger
from provisioner.ledger.tables import metadata
from provisioner.toolchain.test_tools import postgresql_programs
from tests.support.ports import free_port

USER = "machineuse"
_EMPTY_LEDGER = "empty_ledger"


class PostgresServer:
    """One server; `start` and `kill` as often as need be, the data stays."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="machineuse-postgres-"))
        self.password = secrets.token_hex(16)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._emptied: list[SecretStr] = []
        self._programs = postgresql_programs()
        self._run_as = ["setpriv", "--pdeathsig", "QUIT"]  # it must not outlive a run of the tests that was killed
        if os.geteuid() == 0:  # the server refuses to run as root
            account = pwd.getpwnam("postgres")
            os.chown(self.root, account.pw_uid, account.pw_gid)
            self._run_as += [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        password_file = self.root / "password"
        password_file.write_text(self.password)
        subprocess.run(
            [
                *(*self._run_as, self._programs / "initdb", "--pgdata", self.root / "data", "--no-sync"),
                *("--username", USER, "--auth", "scram-sha-256", "--pwfile", password_file),
                *("--no-locale", "--encoding", "UTF8"),
            ],
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        """Start the server and wait until it answers; the port stays the same."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
        }
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(*self._run_as, self._programs / "postgres", "-D", self.root / "data"),
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.root / "log").read_text()
                assert time.monotonic() < deadline, "the PostgreSQL server never answered"
                time.sleep(0.02)

    def stop(self) -> None:
        """End the server at once; whoever is connected is cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=20)
            self._process = None

    def clean_up(self) -> None:
        """End the server and remove its data."""
        self.stop()
        shutil.rmtree(self.root)

    def url(self, database: str, *, scheme: str = "postgresql") -> str:
        """Return the URL of a database."""
        return f"{scheme}://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def new_database(self, *, like: str = "template0") -> str:
        """Make a database with a name of its own and return that."""
        name = f"t{secrets.token_hex(6)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(like))
            )
        return name

    def new_ledger(self) -> SecretStr:
        """Return the URL of an empty ledger: one that was given back, or a copy of one that was migrated once."""
        if self._emptied:
            return self._emptied.pop()
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_EMPTY_LEDGER]).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_EMPTY_LEDGER)))
        if found is None:
            Ledger.create(SecretStr(self.url(_EMPTY_LEDGER))).close()
        return SecretStr(self.url(self.new_database(like=_EMPTY_LEDGER)))

    def give_back(self, ledger: SecretStr) -> None:
        """Empty a ledger that is not used any more, for the next test: that is faster than a new database."""
        names = [sql.Identifier(table.name) for table in metadata.sorted_tables if table.name != "facts"]
        with psycopg.connect(ledger.get_secret_value()) as connection:
            connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(sql.SQL(", ").join(names)))
            connection.execute("DELETE FROM facts WHERE name <> 'ledger_id'")
        self._emptied.append(ledger)
