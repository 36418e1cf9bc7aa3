"""An API over a real ledger, with one node that is said to be online, and nothing that carries wishes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.app import create_app
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.errors import UnknownImage
from provisioner.images import ResolvedImage
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeStatus
from provisioner.service import InstanceService
from provisioner.settings import Settings
from stacks.spec import BROWSER_IMAGE, DEFAULT_IMAGE, ClusterSpec, NodeSpec
from tests.support.world import empty_ledger

GIB = 2**30


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Take back what a command or a service has made of the logs of its process."""
    yield
    structlog.reset_defaults()


class FakeCatalogue:
    """Knows the default image, and everything whose name starts with `plain`."""

    def resolve(self, requested: str, *, nodes: Sequence[NodeSpec]) -> ResolvedImage:
        """Return what runs."""
        assert nodes
        if requested == DEFAULT_IMAGE:
            return ResolvedImage(requested=requested, image=BROWSER_IMAGE, browser=True)
        if requested.startswith("plain"):
            return ResolvedImage(requested=requested, image=requested, browser=False)
        raise UnknownImage(f"There is no image '{requested}'.")


@dataclass(frozen=True, kw_only=True)
class FakeServices:
    """The parts that the API needs."""

    settings: Settings
    cluster: Cluster
    ledger: Ledger
    instances: InstanceService
    changes: Changes
    is_leading: bool = True

    def client(self, **options: Any) -> TestClient:
        """Return a client that calls as a program on this machine does."""
        return TestClient(create_app(self), **{"base_url": "http://localhost:8000", **options})


ServicesMaker = Callable[..., FakeServices]


@pytest.fixture
def make_services(tmp_path: Path, new_ledger_location: Callable[[], Path | SecretStr]) -> Iterator[ServicesMaker]:
    """Give a function that makes services with the given settings."""
    ledgers: list[Ledger] = []

    def make(*, max_instances: int = 50, node: dict[str, Any] | None = None, **settings: Any) -> FakeServices:
        return make_fake_services(
            tmp_path / str(len(ledgers)),
            ledgers=ledgers,
            location=new_ledger_location(),
            max_instances=max_instances,
            node=node,
            **settings,
        )

    yield make
    for ledger in ledgers:
        ledger.close()


def make_fake_services(
    data_dir: Path,
    *,
    ledgers: list[Ledger],
    location: Path | SecretStr | None = None,
    max_instances: int,
    node: dict[str, Any] | None = None,
    **settings: Any,
) -> FakeServices:
    """Make the services over a new ledger in `data_dir`, which is added to `ledgers`."""
    cluster = Cluster(ClusterSpec(name="test", nodes=(NodeSpec(id="local", max_instances=max_instances),)))
    built = Settings(**{"data_dir": data_dir, "default_wait_s": 0.0, "memory_overcommit": 100.0, **settings})
    ledger = empty_ledger(location or built.ledger_location)
    ledgers.append(ledger)
    ledger.nodes.sync(cluster.nodes)
    seen = {"status": NodeStatus.ONLINE, "cpu_cores": 64.0, "memory_bytes": 64 * GIB, "last_heartbeat": 1_700_000_000.0}
    ledger.nodes.observe("local", values=seen | (node or {}))
    changes = Changes()
    instances = InstanceService(
        ledger,
        cluster=cluster,
        settings=built,
        catalogue=FakeCatalogue(),  # type: ignore[arg-type]
        changes=changes,
        port_free=lambda _node, _port: True,
    )
    return FakeServices(settings=built, cluster=cluster, ledger=ledger, instances=instances, changes=changes)


@pytest.fixture
def services(make_services: ServicesMaker) -> FakeServices:
    """Services with nothing special."""
    return make_services()


@pytest.fixture
def client(services: FakeServices) -> Iterator[TestClient]:
    """A client of an API with nothing special, all of whose calls are served by one event loop."""
    with services.client() as client:
        yield client
