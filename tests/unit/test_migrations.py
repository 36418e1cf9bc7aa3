"""From the first schema to the newest one, with everything that was in it, on both kinds of database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from pydantic import SecretStr

from provisioner.errors import LedgerMismatch
from provisioner.ledger import Ledger, database
from provisioner.ledger.database import SCHEMA, Database
from provisioner.ledger.records import InstanceRecord, NodeStatus, SnapshotState
from provisioner.ledger.samples import RAW, Scope
from provisioner.states import Wanted
from stacks.spec import Availability
from tests.support.postgres import PostgresServer
from tests.support.records import make_record, sum_up

FIRST = "0001"
INSTANCES = [
    make_record(id="mu-a", node_id="a", memory_gb=0.3, disk_bytes=2**40, error_message="no \N{SNOWMAN}"),
    make_record(id="mu-b", node_id="a", body=False, debug_port=None, stream_port=None),
    make_record(id="mu-c", node_id="b", body=True, wanted=Wanted.DORMANT),
    make_record(id="mu-d", node_id="b", body=False, wanted=Wanted.DORMANT, snapshot_generation=3),
]
OTHERS: dict[str, dict[str, object]] = {
    "facts": {"name": "ledger_id", "value": "0123"},
    "nodes": {
        **{"id": "a", "host": "unix:///a", "address": "127.0.0.1", "max_instances": 7, "status": "online"},
        **{"misses": 0, "last_heartbeat": 1.5, "disk_quota": True, "memory_bytes": 2**40},
    },
    "snapshots": {
        **{"instance_id": "mu-d", "generation": 3, "node_id": "b", "state": "verified", "bytes": 2**33},
        "created_at": 2.5,
    },
    "ports": {"node_id": "a", "port": 21000, "instance_id": "mu-a"},
    "events": {"at": 3.5, "instance_id": "mu-a", "kind": "create", "message": "made"},
    "samples": {
        **{"resolution_s": RAW, "scope": "node", "at": 1000.0, "subject": "a", "count": 1},
        **{"cpu_percent": 5.0, "memory_percent": 6.0},
    },
    "leftovers": {"node_id": "b", "urn": "urn::mu-x-home", "name": "left", "at": 4.5},
}
"""One row of each other table of the first schema."""


@pytest.fixture(params=["sqlite", "postgresql"])
def nothing_yet(request: pytest.FixtureRequest, tmp_path: Path) -> Path | SecretStr:
    """Say where there is a database without any table."""
    if request.param == "sqlite":
        return tmp_path / "ledger.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return SecretStr(server.url(server.new_database()))


def migrate(location: Path | SecretStr, how: Callable[[Config, str], None], revision: str) -> None:
    opened = Database(location)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with opened.write(schema=True) as connection:
        config.attributes["connection"] = connection
        how(config, revision)
    opened.close()


def fill(location: Path | SecretStr) -> None:
    opened = Database(location)
    with opened.write() as connection:
        known = sa.MetaData()
        known.reflect(connection)
        names = [column.name for column in known.tables["instances"].columns]
        for record in INSTANCES:
            row = {name: getattr(record, name) for name in names}
            row |= {"wanted": record.wanted.value, "status": record.status.value}
            connection.execute(known.tables["instances"].insert().values(row))
        for name, row in OTHERS.items():
            connection.execute(known.tables[name].insert().values(row))
        filled = {*OTHERS, "instances", "alembic_version"}
        assert filled == set(known.tables), "each table of the first schema has a row"
    opened.close()


def check(ledger: Ledger) -> None:
    found = {record.id: record for record in ledger.instances.all()}
    assert found["mu-d"].snapshots[0].state is SnapshotState.VERIFIED
    assert (found["mu-d"].snapshots[0].live, found["mu-d"].snapshots[0].volume) == (False, "docker")
    assert [_plain(record) for record in found.values()] == [_plain(record) for record in INSTANCES]
    assert (found["mu-a"].node_labels, found["mu-a"].volume, found["mu-a"].moving) == ({}, "docker", None)
    assert [load.instances for load in ledger.instances.loads()] == [2, 1]
    assert ledger.instances.loads() == sum_up(ledger.instances.all())
    node = ledger.nodes.get("a")
    assert (node.status, node.availability, node.labels, node.memory_bytes) == (
        *(NodeStatus.ONLINE, Availability.ACTIVE, {}, 2**40),
    )
    assert ledger.id == "0123"
    assert [event.message for event in ledger.events.list()] == ["made"]
    with ledger.instances.reader() as loads:
        assert loads.ports("a") == {21000}
        assert loads.nodes_with_leftovers("mu-x") == {"b"}
        assert [state.promised_cpu_cores for state in loads.nodes()] == [2]
    (point,) = ledger.samples.series(Scope.NODE, since=0, resolution_s=RAW, step_s=60)
    assert point.cpu_percent == 5.0


def _plain(record: InstanceRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("id", "status", "wanted", "generation", "memory_gb", "disk_bytes")}


def test_what_was_in_the_first_schema_is_in_the_newest_one(nothing_yet: Path | SecretStr) -> None:
    migrate(nothing_yet, command.upgrade, FIRST)
    fill(nothing_yet)
    ledger = Ledger.open(nothing_yet)  # an operator's command does it as a service does
    check(ledger)
    ledger.events.add("test", message="after")  # numbers go on where they were
    assert [event.id for event in ledger.events.list()] == [1, 2]
    ledger.close()


def test_the_way_back_and_forth_again_keeps_it_too(nothing_yet: Path | SecretStr) -> None:
    migrate(nothing_yet, command.upgrade, FIRST)
    fill(nothing_yet)
    Ledger.open(nothing_yet).close()
    migrate(nothing_yet, command.downgrade, FIRST)
    ledger = Ledger.open(nothing_yet)
    check(ledger)
    ledger.close()


def test_a_ledger_of_a_newer_version_is_left_alone(nothing_yet: Path | SecretStr) -> None:
    Ledger.create(nothing_yet).close()
    opened = Database(nothing_yet)
    with opened.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    for use in (Ledger.create, Ledger.open):
        with pytest.raises(LedgerMismatch, match="newer Machineuse.* 9999, and " + SCHEMA) as caught:
            use(nothing_yet)
        assert "one version" in caught.value.explain()
    assert opened.revision() == "9999"
    opened.close()
