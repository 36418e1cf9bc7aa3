"""What all tests share: a service of their own, for real, that cleans up after itself."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.engines import Engine
from tests.support.postgres import PostgresServer
from tests.support.service import Service

StartService = Callable[..., Service]


@pytest.fixture(scope="module")
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Give a function that starts a service with these settings; every one is stopped and cleaned up.

    `node` and `images` go into the cluster's file: what its one node has beside the defaults, and the catalogue.
    `nodes` names all of them instead; `cluster_fields` are further `cluster:` keys.
    `beside` is a service whose cluster the new one has too.
    """
    started: list[Service] = []

    def start(
        *,
        node: Mapping[str, object] | None = None,
        nodes: Sequence[Mapping[str, object]] | None = None,
        images: Mapping[str, str] | None = None,
        cluster_fields: Mapping[str, object] | None = None,
        beside: Service | None = None,
        **settings: object,
    ) -> Service:
        given = {name: str(value) for name, value in settings.items()}
        service = Service(
            _project(tmp_path_factory),
            settings=given,
            node=node,
            nodes=nodes,
            images=images,
            cluster_fields=cluster_fields,
            beside=beside,
        )
        started.append(service)
        service.start()
        return service

    yield start
    for service in started:  # all of them first: another of the same cluster would make anew what one cleans up
        service.end_if_running()
    for service in started:
        service.clean_up()


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Service:
    """Give one running service to all tests of a module."""
    return start_service()


@pytest.fixture(scope="module")
def two_engines() -> Iterator[Mapping[str, Engine]]:
    """Give two engines on machines of their own, by what their nodes are called."""
    with Engine() as a, Engine() as b:
        yield {"a": a, "b": b}


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Give a real PostgreSQL server."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.clean_up()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_ledger_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Path | SecretStr]]:
    """Give a function that says where a ledger may be: whoever uses it runs once for each kind of database."""
    if request.param == "sqlite":
        yield lambda: tmp_path / secrets.token_hex(4) / "ledger.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    given: list[SecretStr] = []

    def make() -> SecretStr:
        given.append(server.new_ledger())
        return given[-1]

    yield make
    for url in given:
        server.give_back(url)


@pytest.fixture
def ledger_location(new_ledger_location: Callable[[], Path | SecretStr]) -> Path | SecretStr:
    """Say where one ledger may be."""
    return new_ledger_location()


def _project(factory: pytest.TempPathFactory) -> Path:
    """Make a project directory that is the checkout, but for its own cluster file and data directory."""
    checkout = Path(__file__).resolve().parent.parent
    project = factory.mktemp("project")
    for name in ("Pulumi.yaml", "stacks", "provisioner", "images", ".venv"):
        (project / name).symlink_to(checkout / name)
    return project
