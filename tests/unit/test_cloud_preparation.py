"""The cloud's part of a step: what it makes and removes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from provisioner import cloud_preparation, lifecycle
from provisioner.cloud_orphans import CloudOrphans
from provisioner.cloud_preparation import CloudPreparation, Stopping
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import CloudConflict, CloudError, NodeUnreachable, SnapshotMissing
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.plugins.machineuse.cloud_volume import find_source
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.manifest import CloudHome, ImageIdentity, Manifest, SnapshotId
from provisioner.specs import all_urns, body_urns, spec_of
from provisioner.states import Status, Wanted
from provisioner.volumes.waiting import CutOff
from stacks.names import Names
from stacks.spec import CloudIdentity, ClusterSpec, NodeSpec, OfflinePolicy
from tests.support.fake_cloud import FakeCloud, FakeDevices, OneRegion
from tests.support.records import make_record
from tests.support.world import empty_ledger

ID = "mu-test"
NODE = NodeSpec(id="local", volume="ebs", cloud=CloudIdentity(instance_id="i-a", zone="us-east-1a"))
OTHER = NodeSpec(id="other", volume="ebs", cloud=CloudIdentity(instance_id="i-b", zone="us-east-1a"))


class World:
    """One instance on one node of the cloud; nothing of Docker."""

    def __init__(self, path: Path) -> None:
        self.cloud = FakeCloud()
        self.cloud.add_machine("i-a")
        self.cloud.add_machine("i-b")
        self.ledger = empty_ledger(path)
        self.spec = ClusterSpec(name="unit", nodes=(NODE, OTHER))
        self.cluster = Cluster(self.spec)
        self.ledger.nodes.sync(self.cluster.nodes)
        self.ledger.nodes.observe("local", values={"status": NodeStatus.ONLINE})
        self.removed: list[str] = []
        self.node_away = False
        regions: Any = OneRegion(self.cloud)
        self.preparation = CloudPreparation(
            self.ledger,
            cluster=self.cluster,
            hosts=DockerHosts(timeout_s=0.1),
            store=DirectoryStore(path / "snapshots"),
            regions=regions,
            patience=self.cloud.patience,
        )
        self.orphans = CloudOrphans(self.ledger, cluster=self.cluster, regions=regions, patience=self.cloud.patience)

    def add(self, **changes: Any) -> InstanceRecord:
        record = make_record(volume="ebs", disk_gb=1.5, **changes)
        return self.ledger.instances.create(lambda _: (record, "test"))

    @property
    def record(self) -> InstanceRecord:
        return self.ledger.instances.get(ID)

    def change(self, decide: Any) -> InstanceRecord:
        changed = self.ledger.instances.change(ID, lambda record, _: decide(record))
        assert changed is not None
        return changed

    def delete(self) -> None:
        self.ledger.instances.change(ID, lambda record, _: lifecycle.note_gone(record))

    def make(self) -> str:
        self.preparation.make_volume(self.record)
        (volume,) = self.cloud.volumes
        return volume.id

    def remove(self, _host: Any, name: str, **_: Any) -> None:
        if self.node_away:
            raise NodeUnreachable("away")
        self.removed.append(name)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path)
    monkeypatch.setattr(cloud_preparation, "NodeDevices", lambda *_, **__: FakeDevices(world.cloud, "i-a"))
    monkeypatch.setattr(cloud_preparation, "remove_container", world.remove)
    monkeypatch.setattr(cloud_preparation, "remove_volume", world.remove)
    yield world
    world.ledger.close()


def break_the_cloud(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise CloudError("away")

    for call in ("find_volumes", "find_snapshots"):
        monkeypatch.setattr(world.cloud, call, refuse)


def test_the_volume_has_the_instances_size_in_its_nodes_zone(world: World) -> None:
    world.add()
    world.make()
    (volume,) = world.cloud.volumes
    assert (volume.size_gib, volume.zone, volume.prepared) == (2, "us-east-1a", True)
    assert volume.tags["machineuse.urn"] == Names("unit").cloud_volume_urn(ID)


def test_a_volume_of_an_instance_that_is_wanted_is_not_released(world: World) -> None:
    world.add()
    kept = world.make()
    planned = world.record
    world.preparation.release(planned)
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    world.preparation.release(planned)  # asleep is not enough: there is no snapshot
    assert [v.id for v in world.cloud.volumes] == [kept]
    assert world.removed == []


def test_it_is_released_once_its_snapshot_is_verified(world: World) -> None:
    world.add()
    world.make()
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    world.change(lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1))
    world.preparation.release(world.record)
    assert world.cloud.volumes == []
    assert world.removed == [f"machineuse-unit-{ID}", f"machineuse-unit-{ID}-home"]


def test_what_was_held_up_does_not_release_what_a_revival_has_made_since(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a leader that was frozen there, and another one has gone on meanwhile."""
    world.add()
    world.make()
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    world.change(lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1))

    def wake_up_late(_host: Any, _name: str) -> None:
        world.change(lambda r: lifecycle.note_dormant(r, generation=2))
        revived = {"node_id": "local", "ports": (1, 2), "volume": "ebs", "disk_enforced": True}
        world.change(lambda r: lifecycle.wish_revived(r, method="full_restore", **revived))

    monkeypatch.setattr(cloud_preparation, "remove_volume", wake_up_late)
    planned, before = world.record, world.cloud.volumes
    world.preparation.release(planned)
    assert world.cloud.volumes == before


def test_a_release_is_not_waited_for_when_the_service_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add()
    world.make()
    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    began = world.cloud.now
    monkeypatch.setattr(world.cloud, "detach", lambda *_, **__: world.preparation.close())
    with pytest.raises(Stopping):
        world.preparation.release(world.record)
    assert world.cloud.now - began < 5


def test_a_node_that_is_away_keeps_its_volume_unless_the_delete_is_forced(world: World) -> None:
    world.add()
    kept = world.make()
    world.node_away = True
    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    with pytest.raises(NodeUnreachable):
        world.preparation.release(world.record)
    assert [v.id for v in world.cloud.volumes] == [kept]
    world.change(lambda r: lifecycle.wish_absent(r, force=True))
    world.preparation.release(world.record)
    assert world.cloud.volumes == []
    assert world.cloud.forced == [kept]


def test_a_cloud_that_is_away_stops_a_delete_unless_it_is_forced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add()
    world.make()
    break_the_cloud(world, monkeypatch)
    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    with pytest.raises(CloudError):
        world.preparation.release(world.record)
    world.change(lambda r: lifecycle.wish_absent(r, force=True))
    world.preparation.release(world.record)


def test_making_a_volume_ends_when_the_instance_is_deleted_or_the_service_stops(world: World) -> None:
    record = world.add()
    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    with pytest.raises(CutOff):
        world.preparation.make_volume(record)
    world.preparation.close()
    with pytest.raises(Stopping):
        world.preparation.make_volume(record)


@pytest.mark.parametrize("policy", ["wait", "move"])
def test_a_volume_is_taken_from_a_node_that_is_away_only_by_the_policy(world: World, policy: Any) -> None:
    world.add()
    kept = world.make()
    world.cloud.detach(kept, machine="i-a", force=False)
    world.cloud.sleep(100)
    world.cloud.attach(kept, machine="i-b", device="/dev/sdf")
    world.cloud.sleep(100)
    world.cluster.replace(world.spec.model_copy(update={"offline": OfflinePolicy(action=policy)}))
    # "other" was never heard of: it is offline by the ledger.
    if policy == "wait":
        with pytest.raises(Exception, match="attached to machine i-b, which runs"):
            world.preparation.make_volume(world.record)
    else:
        world.preparation.make_volume(world.record)
        assert world.cloud.forced == [kept]


def test_a_home_goes_to_the_cloud_only_where_it_is_on_a_cloud_volume(world: World) -> None:
    world.add()
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    assert world.preparation.home_keeper(world.record, generation=2) is not None
    world.delete()
    record = make_record()
    world.ledger.instances.create(lambda _: (record, "test"))
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    assert world.preparation.home_keeper(world.record, generation=2) is None


def test_snapshots_are_discarded_from_the_cloud(world: World) -> None:
    world.add()
    world.make()
    record = world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    keeper = world.preparation.home_keeper(record, generation=2)
    assert keeper is not None
    keeper.take(run="run", progress=lambda _: None)
    world.preparation.discard(record, generation=1)
    assert len(world.cloud.snapshots) == 1
    world.preparation.discard(record, generation=2)
    assert world.cloud.snapshots == []


@pytest.mark.parametrize(("region", "found"), [("us-east-1", "snap-1"), ("eu-west-1", None)])
def test_a_volume_is_made_from_the_snapshot_that_the_manifest_names(
    tmp_path: Path, region: str, found: str | None
) -> None:
    store = DirectoryStore(tmp_path / "snapshots")
    home = CloudHome(region="us-east-1", snapshot_id="snap-1", volume_id="vol-1", size_gib=2)
    commit(store, home=home)
    if found is None:
        with pytest.raises(CloudConflict, match="in us-east-1, and the node is in eu-west-1"):
            find_source(store, instance=ID, generation=2, region=region)
    else:
        assert find_source(store, instance=ID, generation=2, region=region) == found


def test_a_volume_starts_blank_only_where_nothing_is_to_be_restored_from_the_cloud(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "snapshots")
    assert find_source(store, instance=ID, generation=0, region="us-east-1") is None
    with pytest.raises(SnapshotMissing):
        find_source(store, instance=ID, generation=2, region="us-east-1")
    commit(store, home=None)
    assert find_source(store, instance=ID, generation=2, region="us-east-1") is None


def commit(store: DirectoryStore, *, home: CloudHome | None, generation: int = 2) -> None:
    store.begin(SnapshotId(instance_id=ID, generation=generation)).commit(
        Manifest(
            instance_id=ID,
            cluster="unit",
            generation=generation,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            node_id="local",
            image=ImageIdentity(reference="browser", id="sha256:1"),
            home_path="/home/machine",
            stopped_cleanly=True,
            container_id="c",
            run_started_at=None,
            parts=(),
            changed_paths=0,
            cloud_home=home,
        )
    )


# ---- what the program declares


def test_the_spec_tells_size_wish_and_life(world: World) -> None:
    spec = spec_of(world.add(generation=7, restore_generation=5, restore_method="quick_start", disk_enforced=True))
    assert spec is not None
    assert spec.cloud_volume is not None
    assert spec.cloud_volume.model_dump() == {"size_gib": 2, "generation": 7, "restored_generation": 5}
    assert spec.disk_quota_gib is None  # the volume's size is the limit
    assert Names("unit").cloud_volume_urn(ID) in body_urns(world.record, names=Names("unit"))
    assert Names("unit").cloud_volume_urn(ID) not in all_urns(make_record(), names=Names("unit"))


def test_a_dormant_instance_has_no_volume_and_its_snapshot_is_in_the_cloud(world: World) -> None:
    world.add()
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    record = world.change(lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1))
    spec = spec_of(record)
    assert spec is not None
    assert (spec.cloud_volume, [ref.volume for ref in spec.snapshots]) == (None, ["ebs"])


# ---- orphans


def look_twice(world: World) -> None:
    world.orphans.step()
    world.orphans.step()


def leave_volume(world: World, *, instance: str = ID) -> str:
    tags = {
        "machineuse.cluster": "unit",
        "machineuse.ledger": world.ledger.id,
        "machineuse.instance": instance,
        "machineuse.prepared": "true",
    }
    made = world.cloud.create_volume(
        token=f"{instance}{world.cloud.now}", zone="us-east-1a", size_gib=1, snapshot_id=None, tags=tags
    )
    world.cloud.sleep(100)
    return made.id


def leave_snapshot(world: World, *, generation: int) -> str:
    volume_id = leave_volume(world, instance="mu-elsewhere")
    tags = {
        "machineuse.cluster": "unit",
        "machineuse.ledger": world.ledger.id,
        "machineuse.instance": ID,
        "machineuse.generation": str(generation),
    }
    made = world.cloud.create_snapshot(volume_id, description="", tags=tags)
    world.cloud.sleep(100)
    return made.id


def test_a_deleted_instances_volume_is_removed_at_the_second_look(world: World) -> None:
    world.add()
    world.delete()
    left = leave_volume(world)
    world.orphans.step()
    assert [v.id for v in world.cloud.volumes] == [left]
    world.orphans.step()
    assert world.cloud.volumes == []
    assert world.ledger.events.tell_of("orphan_removed", instance_id=ID)


def test_an_orphan_that_can_not_be_removed_keeps_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add()
    world.delete()
    stuck, other = leave_volume(world), leave_volume(world)
    delete_volume = world.cloud.delete_volume

    def refuse(volume_id: str) -> None:
        if volume_id == stuck:
            raise CloudError("The machine does not let go of it.")
        delete_volume(volume_id)

    monkeypatch.setattr(world.cloud, "delete_volume", refuse)
    look_twice(world)
    assert [v.id for v in world.cloud.volumes] == [stuck] != [other]
    monkeypatch.undo()
    world.orphans.step()
    assert world.cloud.volumes == []


def test_a_region_that_does_not_answer_keeps_no_other_from_being_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = NodeSpec(id="far", volume="ebs", cloud=CloudIdentity(instance_id="i-f", zone="eu-west-1a"))
    world.cluster.replace(ClusterSpec(name="unit", nodes=(far, NODE)))
    world.add()
    world.delete()
    leave_volume(world)

    def of(region: str) -> FakeCloud:
        if region == "eu-west-1":
            raise CloudError("It does not answer.")
        return world.cloud

    monkeypatch.setattr(world.orphans._regions, "of", of)
    look_twice(world)
    assert world.cloud.volumes == []


def test_a_volume_of_an_instance_that_was_never_known_is_kept(world: World) -> None:
    left = leave_volume(world, instance="mu-stranger")
    look_twice(world)
    look_twice(world)
    assert [v.id for v in world.cloud.volumes] == [left]
    assert world.ledger.events.tell_of("orphan_kept", instance_id="mu-stranger")


@pytest.mark.parametrize(
    ("status", "wanted", "settled"),
    [
        (Status.RUNNING, Wanted.RUNNING, 1),
        (Status.FAILED, Wanted.RUNNING, 1),
        (Status.CREATING, Wanted.RUNNING, 0),
        (Status.DORMANT, Wanted.DORMANT, 1),  # without a snapshot
    ],
)
def test_what_an_instance_may_need_is_kept(world: World, status: Status, wanted: Wanted, settled: int) -> None:
    world.add(status=status, wanted=wanted, settled_generation=settled)
    left = leave_volume(world)
    look_twice(world)
    assert [v.id for v in world.cloud.volumes] == [left]


def test_a_dormant_instances_volume_and_forgotten_snapshots_are_removed(world: World) -> None:
    world.add()
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    world.change(lambda r: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1))
    world.change(lambda r: lifecycle.note_dormant(r, generation=2))
    kept, forgotten = leave_snapshot(world, generation=2), leave_snapshot(world, generation=1)
    leave_volume(world)
    look_twice(world)
    assert [s.id for s in world.cloud.snapshots] == [kept] != [forgotten]
    assert {v.tags["machineuse.instance"] for v in world.cloud.volumes} == {"mu-elsewhere"}
