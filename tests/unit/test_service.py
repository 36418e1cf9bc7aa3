"""What may be asked of instances, as far as it is decided from the ledger at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import Conflict, LedgerUnavailable, NoCapacity
from provisioner.images import ImageCatalogue
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord, Moving, NodeStatus
from provisioner.service import FULL_RESTORE, QUICK_START, InstanceService
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger

ID = "mu-test"


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = empty_ledger(ledger_location)
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


def test_whoever_wants_it_back_waits_for_the_end_of_a_move_that_overtakes_it(
    ledger: Ledger, service: InstanceService
) -> None:
    wished = make_record(status=Status.CREATING, generation=3, settled_generation=2, restore_generation=2)
    halfway = dataclasses.replace(
        wished,
        wanted=Wanted.DORMANT,
        status=Status.DORMANT,
        generation=4,
        applied_generation=4,
        settled_generation=4,
        moving=Moving.OFFLINE,
        restore_generation=None,
    )
    ledger.instances.create(lambda _: (halfway, "test"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: asyncio.run(service.outcome(wished, timeout_s=30)))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        there = {"wanted": Wanted.RUNNING, "status": Status.RUNNING, "moving": None}
        ledger.instances.change(ID, lambda _, __: Update(values=there))
        assert waiting.result() == ledger.instances.get(ID)


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


def test_many_callers_of_the_same_moment_all_get_their_turn(ledger: Ledger, service: InstanceService) -> None:
    """More than there are connections, of which each holds one while it waits."""
    ledger.nodes.sync([NodeSpec(id="local")])
    seen = {"status": NodeStatus.ONLINE, "memory_bytes": 64 << 30, "cpu_cores": 64.0}
    ledger.nodes.observe("local", values=seen)
    ids = [f"mu-{number}" for number in range(32)]
    for number, instance_id in enumerate(ids):
        record = make_record(id=instance_id, debug_port=22000 + number, stream_port=23000 + number)
        ledger.instances.create(lambda _, record=record: (record, "test"))

    with ThreadPoolExecutor(max_workers=len(ids)) as pool:
        asleep = list(pool.map(service.make_dormant, ids))
        assert {record.wanted for record in asleep} == {Wanted.DORMANT}
        for instance_id in ids:
            for note in (
                lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1),
                lambda r: lifecycle.note_dormant(r, generation=2),
            ):
                ledger.instances.change(instance_id, lambda r, _, note=note: note(r))
        awake = list(pool.map(lambda instance_id: service.revive(instance_id, method=QUICK_START), ids))
    assert len({port for record in awake for port in (record.debug_port, record.stream_port)}) == 2 * len(ids)


AWS = {"volume": "ebs", "cloud": {"instance_id": "i-a", "zone": "us-east-1a"}}
FAR = {"volume": "ebs", "cloud": {"instance_id": "i-b", "zone": "eu-west-1a"}}


def revive(ledger: Ledger, *, kept: str, nodes: list[dict[str, Any]]) -> InstanceRecord:
    """Revive an instance that sleeps on the node `a`, in a cluster of these nodes, all online."""
    cluster = Cluster(ClusterSpec.model_validate({"name": "unit", "nodes": nodes}))
    ledger.nodes.sync(cluster.nodes)
    for node in cluster.nodes:
        ledger.nodes.observe(
            node.id,
            values={
                "status": NodeStatus.ONLINE,
                "memory_bytes": 8 << 30,
                "cpu_cores": 4,
                "disk_quota": node.id == "xfs",
            },
        )
    ledger.instances.create(lambda _: (make_record(node_id="a", volume=kept, disk_enforced=True), "test"))
    for wish in (
        lambda r: lifecycle.wish_dormant(r, reason="test"),
        lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1),
        lambda r: lifecycle.note_dormant(r, generation=2),
    ):
        ledger.instances.change(ID, lambda r, _, wish=wish: wish(r))
    service = InstanceService(
        ledger,
        cluster=cluster,
        settings=Settings(),
        catalogue=ImageCatalogue(cluster, hosts=DockerHosts()),
        changes=Changes(),
        port_free=lambda *_: True,
    )
    return service.revive(ID, method=QUICK_START)


def test_a_home_in_the_cloud_is_revived_where_cloud_volumes_can_be_attached(ledger: Ledger) -> None:
    nodes = [{"id": "plain"}, {"id": "b", **AWS}, {"id": "far", **FAR}, {"id": "a", **AWS}]
    record = revive(ledger, kept="ebs", nodes=nodes)
    assert record.node_id in ("a", "b")
    assert (record.volume, record.disk_enforced) == ("ebs", True)


def test_a_home_in_the_cloud_waits_for_a_node_of_its_region(ledger: Ledger) -> None:
    with pytest.raises(NoCapacity, match="snapshot in the cloud"):
        revive(ledger, kept="ebs", nodes=[{"id": "a"}, {"id": "b"}])


def test_a_home_in_the_cloud_is_not_revived_in_another_region_or_on_a_disk(ledger: Ledger) -> None:
    away = [{"id": "a", **AWS, "max_instances": 1}, {"id": "far", **FAR}, {"id": "plain"}]
    ledger.instances.create(
        lambda _: (make_record(id="mu-other", node_id="a", debug_port=22000, stream_port=22001), "test")
    )
    with pytest.raises(NoCapacity, match="No node has room now"):
        revive(ledger, kept="ebs", nodes=away)


@pytest.mark.parametrize(
    ("node", "volume", "enforced"), [("plain", "docker", False), ("xfs", "docker", True), ("aws", "ebs", True)]
)
def test_whether_the_disk_limit_holds_is_the_new_nodes_affair(
    ledger: Ledger, node: str, volume: str, enforced: bool
) -> None:
    record = revive(ledger, kept="docker", nodes=[{"id": node, **(AWS if volume == "ebs" else {})}])
    assert (record.node_id, record.volume, record.disk_enforced) == (node, volume, enforced)
