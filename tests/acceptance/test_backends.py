"""Everything that is kept, kept elsewhere: the ledger and the Pulumi state in PostgreSQL, the state in a bucket."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from urllib.parse import quote

import psycopg
import pytest

from tests.support.postgres import PostgresServer
from tests.support.s3_server import s3_server
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
Locks = Callable[[], list[str]]


@pytest.fixture(scope="module")
def on_postgres(postgres: PostgresServer, start_service: Callable[..., Service]) -> tuple[Service, Locks]:
    database = postgres.new_database()

    def locks() -> list[str]:
        with psycopg.connect(postgres.url(database)) as connection:
            rows = connection.execute("SELECT key FROM pulumi_state WHERE key LIKE '%/locks/%.json'").fetchall()
        return [str(row[0]) for row in rows]

    service = start_service(
        ledger=postgres.url(postgres.new_database()),
        state=f"{postgres.url(database, scheme='postgres')}?sslmode=disable",
    )
    return service, locks


@pytest.fixture(scope="module")
def on_s3(
    start_service: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Locks]]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        endpoint = quote(f"http://127.0.0.1:{server.port}", safe="")
        # The last option: by default the CLI sends a header that AWS ignores, and this server refuses.
        options = f"endpoint={endpoint}&s3ForcePathStyle=true&request_checksum_calculation=when_supported"
        service = start_service(state=f"s3://{server.BUCKET}/state?region=us-east-1&{options}")
        yield service, lambda: [key for key in server.objects() if "/locks/" in key]
        service.stop()


@pytest.fixture(scope="module", params=["on_postgres", "on_s3"])
def kept(request: pytest.FixtureRequest) -> tuple[Service, Locks]:
    found: tuple[Service, Locks] = request.getfixturevalue(request.param)
    return found


def test_the_whole_journey(kept: tuple[Service, Locks]) -> None:
    service, locks = kept
    instance = service.create(config=SMALL)
    assert instance["status"] == "running", service.log()[-3000:]
    assert service.post(f"{instance['id']}/dormant").json()["status"] == "dormant"
    assert service.stop() == 0
    service.start()
    assert service.post(f"{instance['id']}/revive").json()["status"] == "running"
    assert any(instance["id"] in urn for urn in service.urns())
    service.assert_unchanged()
    assert service.delete(instance["id"]).status_code == 200
    assert not any(instance["id"] in urn for urn in service.urns())
    assert locks() == []
    assert not (service.settings.data_dir / "state").exists()


def test_the_lock_of_an_update_that_was_killed_is_removed(kept: tuple[Service, Locks]) -> None:
    service, locks = kept
    instance = service.create(config=SMALL, wait_s=0)
    wait_until(locks, what="an update under way")
    service.kill()
    assert locks()
    service.start()
    assert service.wait_for(instance["id"], "running")["id"] == instance["id"]
    assert "removed the lock of an update that was killed" in service.log()
    assert service.delete(instance["id"], force=True).status_code == 200


def test_the_lock_of_an_earlier_leader_elsewhere_is_removed_and_nobody_else_s(
    on_postgres: tuple[Service, Locks],
) -> None:
    service, locks = on_postgres
    with psycopg.connect(service.settings.state_url) as state:
        (key,) = state.execute("SELECT key FROM pulumi_state WHERE key LIKE '%/stacks/%.json'").fetchone() or ("",)
        place = key.replace("/stacks/", "/locks/organization/").removesuffix(".json")
        lock = {"pid": 7, "username": "x", "hostname": "far-away", "timestamp": "2026-01-01T00:00:00Z"}
        data = json.dumps({"data": base64.b64encode(json.dumps(lock).encode()).decode()})
        state.execute("INSERT INTO pulumi_state (key, data) VALUES (%s, %s)", [f"{place}/foreign.json", data])
    instance = service.create(config=SMALL, wait_s=2)
    assert instance["status"] == "creating"  # the lock may be an operator's, who works there
    assert locks() == [f"{place}/foreign.json"]
    with psycopg.connect(service.settings.ledger_text) as ledger:
        (runs,) = ledger.execute("SELECT value FROM facts WHERE name = 'cli_runs'").fetchone() or ("{}",)
        runs = json.dumps({"far-away|6|m|1": ["far-away", 7], **json.loads(runs)})
        ledger.execute("UPDATE facts SET value = %s WHERE name = 'cli_runs'", [runs])
    assert service.wait_for(instance["id"], "running")
    wait_until(lambda: not locks(), what="no lock")
    assert service.delete(instance["id"], force=True).status_code == 200


def test_the_ledger_s_server_may_restart_under_a_running_service(
    on_postgres: tuple[Service, Locks], postgres: PostgresServer
) -> None:
    service, _ = on_postgres
    instance = service.create(config=SMALL)
    postgres.stop()
    try:
        away = service.http.get("/v2/instances")
        assert (away.status_code, away.json()["code"]) == (503, "ledger_unavailable")
        assert int(away.headers["retry-after"]) > 0
        assert service.http.post("/v2/instances", json={}).status_code == 503
        wait_until(lambda: service.events("lease lost"), what="it does not lead without its ledger")
        wait_until(lambda: service.events("control plane stopped"), what="nothing goes on without it")
    finally:
        postgres.start()
    assert service.get(instance["id"])["status"] == "running"
    wait_until(lambda: service.health()["leading"], what="it leads again")
    assert service.create(config=SMALL)["status"] == "running"
    assert postgres.password not in service.log()
