"""What only a ledger on a server can meet: a server that is away, frozen writers, odd text, several processes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr, ValidationError

from provisioner.errors import LedgerMismatch, LedgerUnavailable, NotFound, SettingsError
from provisioner.ledger import Ledger, postgresql
from provisioner.ledger.database import Database
from provisioner.ledger.instances import Update
from provisioner.settings import Settings
from stacks.spec import NodeSpec
from tests.support.postgres import USER, PostgresServer
from tests.support.records import make_record
from tests.support.watched import wait_until


@pytest.fixture
def url(postgres: PostgresServer) -> SecretStr:
    return postgres.new_ledger()


@pytest.fixture
def ledger(url: SecretStr) -> Iterator[Ledger]:
    ledger = Ledger.create(url)
    yield ledger
    ledger.close()


def test_an_empty_database_is_no_ledger(postgres: PostgresServer) -> None:
    url = SecretStr(postgres.url(postgres.new_database()))
    with pytest.raises(LedgerMismatch, match="no ledger in") as caught:
        Ledger.open(url)
    assert "MACHINEUSE_LEDGER" in caught.value.explain()
    assert postgres.password not in str(vars(caught.value))
    opened = Database(url)
    assert opened.revision() is None
    opened.close()


def test_of_several_that_start_at_once_one_makes_the_ledger(postgres: PostgresServer) -> None:
    url = SecretStr(postgres.url(postgres.new_database()))
    made: list[Ledger] = []
    threads = [threading.Thread(target=lambda: made.append(Ledger.create(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len({ledger.id for ledger in made}) == 1
    for ledger in made:
        ledger.close()


def test_numbers_and_texts_of_any_kind_are_kept(ledger: Ledger) -> None:
    ledger.nodes.sync([NodeSpec(id="local")])
    ledger.nodes.observe("local", values={"memory_bytes": 2**45, "disk_bytes": 2**50, "error": "a\0b \ud800"})
    node = ledger.nodes.get("local")
    assert (node.memory_bytes, node.disk_bytes, node.error) == (2**45, 2**50, "a\N{REPLACEMENT CHARACTER}b ?")
    with pytest.raises(NotFound):
        ledger.instances.get("mu-\0")


def test_a_server_that_is_away_is_told_as_such_and_used_again_when_it_is_back(
    ledger: Ledger, postgres: PostgresServer
) -> None:
    ledger.instances.create(lambda _: (make_record(), "made"))
    postgres.stop()
    try:
        with pytest.raises(LedgerUnavailable) as caught:
            ledger.instances.all()
        with pytest.raises(LedgerUnavailable):
            ledger.write_fact("a", "b")
        assert postgres.password not in f"{caught.value} {caught.value.detail} {caught.value.__cause__!r}"
    finally:
        postgres.start()
    assert len(ledger.instances.all()) == 1
    ledger.write_fact("a", "b")


def test_a_connection_that_breaks_within_a_transaction_writes_nothing(ledger: Ledger, url: SecretStr) -> None:
    ledger.instances.create(lambda _: (make_record(), "made"))

    def cut_off(*_: object) -> Update:
        with psycopg.connect(url.get_secret_value(), autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return Update(values={"attempts": 5})

    with pytest.raises(LedgerUnavailable):
        ledger.instances.change("mu-test", cut_off)
    assert ledger.instances.get("mu-test").attempts == 0


def test_a_writer_that_is_frozen_loses_its_turn(ledger: Ledger, url: SecretStr) -> None:
    other = Ledger.open(url)
    ledger.instances.create(lambda _: (make_record(), "made"))
    frozen, thaw = threading.Event(), threading.Event()
    ended: list[type[Exception]] = []

    def freeze(*_: object) -> Update:
        frozen.set()
        thaw.wait(60)
        return Update(values={"attempts": 5})

    def run() -> None:
        try:
            ledger.instances.change("mu-test", freeze)
        except LedgerUnavailable as error:
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    frozen.wait(10)
    other.instances.change("mu-test", lambda *_: Update(values={"attempts": 7}))  # waits for its turn, not for ever
    thaw.set()
    thread.join(10)
    assert ended == [LedgerUnavailable]
    assert other.instances.get("mu-test").attempts == 7
    other.close()


def test_what_one_process_changes_the_others_are_told_once_it_is_committed(
    ledger: Ledger, url: SecretStr, postgres: PostgresServer
) -> None:
    told: list[str | None] = []
    listener = ledger.listen(told.append)
    assert listener is not None
    listener.start()
    wait_until(lambda: told == [None], what="listening")
    other = Ledger.open(url)
    other.instances.create(lambda _: (make_record(), "made"))
    ledger.instances.change("mu-test", lambda *_: Update(values={"attempts": 1}))  # of our own changes we know
    other.instances.change_many(["mu-test"], lambda *_: Update(values={"attempts": 2}))
    wait_until(lambda: len(told) == 3, what="two changes told")
    postgres.stop()
    postgres.start()
    wait_until(lambda: told[-1] is None, what="listening again")
    other.instances.change("mu-test", lambda *_: Update(remove=True))
    wait_until(lambda: len(told) == 5, what="the removal told")
    assert told == [None, "mu-test", "mu-test", None, "mu-test"]
    listener.stop()
    other.close()


def test_a_lease_is_renewed_while_everybody_waits_for_a_turn_to_write(ledger: Ledger, url: SecretStr) -> None:
    assert ledger.leases.take("test", holder="a", duration_s=60).holder == "a"
    with psycopg.connect(url.get_secret_value()) as frozen:
        frozen.execute("SELECT pg_advisory_xact_lock(%s)", [postgresql._WRITER_LOCK])
        writers = [threading.Thread(target=ledger.write_fact, args=("a", str(n))) for n in range(40)]
        for writer in writers:
            writer.start()
        most = postgresql.POOL["pool_size"] + postgresql.POOL["max_overflow"]
        wait_until(lambda: ledger._database.engine.pool.checkedout() == most, what="all connections wait")
        assert ledger.leases.take("test", holder="a", duration_s=120).expires_at > time.time() + 60
    for writer in writers:
        writer.join(30)
    assert ledger.fact("a") is not None


def test_no_free_connection_is_told_as_such(url: SecretStr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "POOL", {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1})
    ledger = Ledger.create(url)
    with ledger.instances.reader(), pytest.raises(LedgerUnavailable) as caught:
        ledger.instances.all()
    assert "no connection became free" in f"{caught.value.detail}"
    ledger.close()


def test_who_may_not_make_tables_is_told_so(postgres: PostgresServer) -> None:
    name = postgres.new_database()
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'geheim'").format(sql.Identifier(name)))
    url = SecretStr(f"postgresql://{name}:geheim@127.0.0.1:{postgres.port}/{name}")
    with pytest.raises(SettingsError, match="can't be written") as caught:
        Ledger.create(url)
    assert "permission denied for schema public" in f"{caught.value.detail}"
    assert "geheim" not in f"{vars(caught.value)}"


def test_the_url_may_say_how_to_connect(postgres: PostgresServer) -> None:
    name = postgres.new_database()
    options = f"user={USER}&password={postgres.password}&connect_timeout=9&keepalives_idle=30"
    ledger = Ledger.create(SecretStr(f"postgresql://127.0.0.1:{postgres.port}/{name}?{options}"))
    told: list[str | None] = []
    listener = ledger.listen(told.append)
    assert listener is not None
    listener.start()
    wait_until(lambda: told == [None], what="listening")
    with psycopg.connect(postgres.url(name)) as connection:
        query = "SELECT application_name FROM pg_stat_activity WHERE query LIKE 'LISTEN%%' AND datname = %s"
        names = connection.execute(query, [name]).fetchall()
    assert names == [("machineuse",)]  # and with that the rest of how all its connections are made
    listener.stop()
    assert postgres.password not in ledger._database.name
    assert "connect_timeout=9" in ledger._database.name
    ledger.close()


@pytest.mark.parametrize("url", ["u:geheim@h:abc/d", "u:ge@heim@h/d", "u:geheim/d", "u:geheim@h:5432x/d"])
def test_a_url_that_can_t_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises(SettingsError, match="MACHINEUSE_LEDGER") as caught:
        Ledger.create(SecretStr(f"postgresql://{url}"))
    error: BaseException | None = caught.value
    assert error.__cause__ is error.__context__ is None
    assert not re.search("geheim|heim|abc", f"{vars(error)}")


def test_the_server_s_clock_counts_for_leases(ledger: Ledger) -> None:
    lease = ledger.leases.take("test", holder="a", duration_s=30)
    assert abs(lease.taken_at - time.time()) < 5
    assert lease.expires_at == pytest.approx(lease.taken_at + 30, abs=0.1)


def test_a_password_is_shown_nowhere_in_the_settings(tmp_path: Path) -> None:
    settings = Settings(project_dir=tmp_path, ledger="postgresql://u:geheim@h/d")
    assert "geheim" not in f"{settings!r} {settings} {settings.ledger_location!r}"
    with pytest.raises(ValidationError) as caught:
        Settings(project_dir=tmp_path, ledger="mysql://u:geheim@h/d")
    assert "geheim" not in str(caught.value)
    assert Settings(project_dir=tmp_path, ledger="there/ledger.db").ledger_location == tmp_path / "there" / "ledger.db"
