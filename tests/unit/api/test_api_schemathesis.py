"""schemathesis against the app, with a converger that makes every wish come true at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from api.app import create_app
from api.ports import bind_port
from provisioner import lifecycle
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord
from provisioner.states import Wanted
from tests.support.conformance import run_schemathesis
from tests.support.watched import wait_until
from tests.unit.api.conftest import FakeServices, ServicesMaker


def grant(record: InstanceRecord, _: LoadReader) -> Update | None:
    """Take the next step of what is wanted."""
    generation = record.generation
    if record.wanted is Wanted.ABSENT:
        return lifecycle.note_gone(record)
    if record.wanted is Wanted.DORMANT:
        if record.sleeps_safely:
            return lifecycle.note_dormant(record, generation=generation)
        return lifecycle.note_snapshot(record, generation=generation, size_bytes=1, keep=1)
    if record.applied_generation < generation:
        return lifecycle.note_created(record, generation=generation, restored_by=None, restore_note=None)
    return lifecycle.note_ready(record, generation=generation)


def grant_all(services: FakeServices, stopping: threading.Event) -> None:
    while not stopping.is_set():
        services.changes.work.wait(0.2)
        services.changes.work.clear()
        for record in services.ledger.instances.unsettled():
            services.ledger.instances.change(record.id, grant)
            services.changes.notify(record.id)
            services.changes.work.set()


@pytest.fixture(params=[5000, 3], ids=["with room", "full"])
def url(make_services: ServicesMaker, request: pytest.FixtureRequest) -> Iterator[str]:
    services = make_services(max_instances=request.param, default_wait_s=20.0)
    stopping = threading.Event()
    sockets = bind_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(services), log_config=None, access_log=False, lifespan="off"))
    threads = [
        threading.Thread(target=grant_all, args=(services, stopping), daemon=True),
        threading.Thread(target=server.run, args=(sockets,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.started, what="it serves")
    yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    stopping.set()
    server.should_exit = True
    for thread in threads:
        thread.join(timeout=20)


@pytest.mark.parametrize("new_ledger_location", ["postgresql"], indirect=True)  # takes fewer values than SQLite
def test_every_answer_conforms_to_the_document(url: str, tmp_path: Path) -> None:
    done = run_schemathesis(url, directory=tmp_path, max_examples=5, timeout_s=250)
    assert done.returncode == 0, done.stdout + done.stderr
