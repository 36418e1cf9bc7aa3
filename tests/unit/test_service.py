"""What may be asked of instances, as far as it is decided from the ledger at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import Conflict, LedgerUnavailable
from provisioner.images import ImageCatalogue
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.service import FULL_RESTORE, QUICK_START, InstanceService
from provisioner.settings import Settings
from provisioner.states import Status
from stacks.spec import ClusterSpec
from tests.support.records import make_record

ID = "mu-test"


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = Ledger.create(ledger_location)
    yield ledger
    ledger.close()


@pytest.fixture
def service(ledger: Ledger) -> InstanceService:
    cluster = Cluster(ClusterSpec(name="unit"))
    return InstanceService(
        ledger,
        cluster=cluster,
        settings=Settings(),
        catalogue=ImageCatalogue(cluster, hosts=DockerHosts()),
        changes=Changes(),
    )


def test_a_ledger_that_is_away_for_a_moment_does_not_end_the_waiting(
    ledger: Ledger, service: InstanceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record()
    ledger.instances.create(lambda _: (record, "test"))
    find, away = ledger.instances.find, iter([True, False])

    def find_sometimes(instance_id: str) -> InstanceRecord | None:
        if next(away):
            raise LedgerUnavailable("The ledger's database does not answer.")
        return find(instance_id)

    monkeypatch.setattr(ledger.instances, "find", find_sometimes)
    assert asyncio.run(service.outcome(record, timeout_s=30)) == record
    away = iter([True])
    with pytest.raises(LedgerUnavailable):
        asyncio.run(service.outcome(record, timeout_s=0))


def test_a_second_revive_waits_for_the_first(ledger: Ledger, service: InstanceService) -> None:
    record = make_record(
        status=Status.CREATING, generation=3, settled_generation=2, restore_generation=2, restore_method=QUICK_START
    )
    ledger.instances.create(lambda _: (record, "test"))
    assert service.revive(ID, method=FULL_RESTORE).generation == 3


def test_an_instance_being_repaired_is_not_taken_for_one_being_revived(
    ledger: Ledger, service: InstanceService
) -> None:
    record = make_record(restore_generation=2, restore_method=QUICK_START)
    ledger.instances.create(lambda _: (record, "test"))
    ledger.instances.change(ID, lambda r, _: lifecycle.wish_repaired(r, reason="gone"))
    with pytest.raises(Conflict, match="only a dormant one"):
        service.revive(ID, method=QUICK_START)


def test_an_instance_that_comes_back_from_a_failed_dormancy_is_not_being_revived() -> None:
    record = make_record(generation=5, applied_generation=5, settled_generation=3, restore_generation=2)
    assert record.operation == "restarting"
