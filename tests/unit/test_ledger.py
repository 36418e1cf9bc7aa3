"""The ledger, on a real SQLite file and in a real PostgreSQL database."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr

from provisioner.errors import LedgerMismatch, LedgerUnavailable, NotFound
from provisioner.ledger import Ledger, database, events, sqlite
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord, Moving, SnapshotRecord, SnapshotState
from provisioner.ledger.tables import metadata
from provisioner.states import Status
from stacks.spec import NodeSpec
from tests.support.records import make_record


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = Ledger.create(ledger_location)
    yield ledger
    ledger.close()


def test_the_migrations_make_what_the_tables_say(ledger: Ledger) -> None:
    opened = database.Database(ledger.location)
    with opened.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    opened.close()


def test_the_schema_in_the_code_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(Path(database.__file__).parent / "migrations"))
    assert scripts.get_current_head() == database.SCHEMA


def test_a_ledger_keeps_its_id(ledger: Ledger) -> None:
    assert Ledger.open(ledger.location).id == ledger.id


def test_a_ledger_belongs_to_one_cluster(ledger: Ledger) -> None:
    ledger.check_cluster("b")  # nobody has said yet whose it is
    ledger.claim("a")
    ledger.claim("a")
    ledger.check_cluster("a")
    for use in (ledger.claim, ledger.check_cluster):
        with pytest.raises(LedgerMismatch, match="that of cluster 'a', and this is cluster 'b'"):
            use("b")


def test_no_ledger_is_never_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(LedgerMismatch, match="no ledger at") as caught:
        Ledger.open(tmp_path / "ledger.db")
    assert "MACHINEUSE_DATA_DIR" in caught.value.explain()
    assert not (tmp_path / "ledger.db").exists()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.touch()
    with pytest.raises(LedgerMismatch):
        Ledger.open(path)


def test_an_instance_comes_back_as_it_was_written(ledger: Ledger) -> None:
    record = make_record()
    ledger.instances.create(lambda _: (record, "made"))
    assert ledger.instances.get(record.id) == record
    assert ledger.events.list(instance_id=record.id)[0].message == "made"


def test_which_of_many_instances_there_are_can_be_asked(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(), "made"))
    assert ledger.instances.existing([f"mu-{number}" for number in range(250)] + ["mu-test"] * 2) == {"mu-test"}
    assert ledger.instances.existing([]) == set()


def test_snapshots_belong_to_their_instance_and_go_with_it(ledger: Ledger) -> None:
    snapshot = SnapshotRecord(
        instance_id="mu-test", generation=3, node_id="local", state=SnapshotState.VERIFIED, bytes=5, created_at=1.0
    )
    ledger.instances.create(lambda _: (make_record(), "made"))
    ledger.instances.change("mu-test", lambda *_: Update(put_snapshots=(snapshot,)))
    assert ledger.instances.get("mu-test").snapshots == (snapshot,)
    assert ledger.instances.change("mu-test", lambda *_: Update(remove=True)) is None
    ledger.instances.create(lambda _: (make_record(), "made"))
    assert ledger.instances.get("mu-test").snapshots == ()


def test_a_decision_that_raises_writes_nothing(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(), "made"))

    def refuse(_record: InstanceRecord, _loads: LoadReader) -> Update:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ledger.instances.change("mu-test", refuse)
    assert ledger.instances.get("mu-test") == make_record()
    with pytest.raises(NotFound):
        ledger.instances.change("mu-other", lambda *_: Update())


def test_pages_are_stable_and_filtered(ledger: Ledger) -> None:
    for number in range(5):
        status = Status.DORMANT if number % 2 else Status.RUNNING
        record = make_record(id=f"mu-{number}", created_at=100.0, status=status, debug_port=None, stream_port=None)
        ledger.instances.create(lambda _, record=record: (record, "made"))
    page, total = ledger.instances.page(limit=2, offset=2)
    assert [r.id for r in page] == ["mu-2", "mu-3"]
    assert total == 5
    assert [r.id for r in ledger.instances.page(status=Status.DORMANT)[0]] == ["mu-1", "mu-3"]
    assert ledger.instances.page(node_id="elsewhere") == ([], 0)


def test_one_port_is_never_given_twice_to_callers_of_the_same_moment(ledger: Ledger) -> None:
    ledger.nodes.sync([NodeSpec(id="local")])

    def create(number: int) -> None:
        def draft(loads: LoadReader) -> tuple[InstanceRecord, str]:
            taken = loads.ports("local")
            free = next(port for port in range(21000, 22000, 2) if port not in taken)
            return make_record(id=f"mu-{number}", debug_port=free, stream_port=free + 1), "made"

        ledger.instances.create(draft)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ports = [record.debug_port for record in ledger.instances.all()]
    assert len(set(ports)) == 12
    assert ledger.instances.loads()[0].instances == 12


def test_released_ports_are_free_again(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(), "made"))
    with ledger.instances.reader() as loads:
        assert loads.ports("local") == {21000, 21001}
    ledger.instances.change("mu-test", lambda *_: Update(release_ports=True))
    with ledger.instances.reader() as loads:
        assert loads.ports("local") == frozenset()


def test_instances_are_found_by_what_is_to_be_done_with_them(ledger: Ledger) -> None:
    for instance_id, fields in {
        "mu-up": {},
        "mu-moves": {"moving": Moving.DRAIN, "node_id": "b"},
        "mu-failed": {"status": Status.FAILED},
        "mu-wished": {"generation": 2},
    }.items():
        record = make_record(id=instance_id, debug_port=None, stream_port=None, **fields)
        ledger.instances.create(lambda _, record=record: (record, "made"))
    assert [r.id for r in ledger.instances.moving()] == ["mu-moves"]
    assert [r.id for r in ledger.instances.on_node("b")] == ["mu-moves"]
    assert [r.id for r in ledger.instances.failed()] == ["mu-failed"]
    assert [r.id for r in ledger.instances.unsettled()] == ["mu-wished"]
    assert ledger.instances.counts()[Status.FAILED] == 1


def test_what_is_left_on_a_node_is_known_until_it_is_removed(ledger: Ledger) -> None:
    ledger.leftovers.add(node_id="a", urn="urn:pulumi:x::y::z::mu-a_b-browser", name="container")
    ledger.leftovers.add(node_id="a", urn="urn:pulumi:x::y::z::mu-a_b-home", name="volume")
    assert [left.name for left in ledger.leftovers.list("a")] == ["container", "volume"]
    with ledger.instances.reader() as loads:
        assert loads.nodes_with_leftovers("mu-a_b") == {"a"}
        assert loads.nodes_with_leftovers("mu-a%") == loads.nodes_with_leftovers("mu-axb") == frozenset()
    ledger.leftovers.remove(ledger.leftovers.list("a")[0].id)
    assert [left.name for left in ledger.leftovers.list("a")] == ["volume"]
    assert ledger.leftovers.list("b") == []


def test_only_images_that_were_brought_are_remembered(ledger: Ledger) -> None:
    ledger.node_images.note_use(node_id="a", name="there-before")
    ledger.node_images.note(node_id="a", name="brought")
    ledger.node_images.note(node_id="a", name="brought")
    before = ledger.node_images.list("a")["brought"]
    ledger.node_images.note_use(node_id="a", name="brought")
    assert set(ledger.node_images.list("a")) == {"brought"}
    assert ledger.node_images.list("a")["brought"] >= before
    assert ledger.node_images.list("b") == {}
    ledger.node_images.forget(node_id="a", name="brought")
    assert ledger.node_images.list("a") == {}


def test_the_newest_events_are_kept(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP", 2)
    for number in range(4):
        ledger.events.add("test", message=str(number), instance_id="mu-test")
    ledger.events.prune()
    kept = ledger.events.list()
    assert [event.message for event in kept] == ["2", "3"]
    assert ledger.events.list(limit=1) == kept[1:]
    assert ledger.events.tell_of("test", instance_id="mu-test")
    assert not ledger.events.tell_of("other", instance_id="mu-test")


def test_a_file_that_another_writer_holds_is_away_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.1)
    ledger = Ledger.create(tmp_path / "ledger.db")
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable) as caught:
            ledger.write_fact("a", "b")
        with pytest.raises(LedgerUnavailable):
            ledger.leases.take("test", holder="a", duration_s=60)
        assert caught.value.detail == f"{tmp_path}/ledger.db: database is locked"
        assert ledger.fact("a") is None  # readers wait for nobody
    ledger.write_fact("a", "b")
    ledger.close()


def test_what_is_committed_is_on_the_disk(tmp_path: Path) -> None:
    opened = database.Database(tmp_path / "ledger.db")
    with opened.read() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    opened.close()
