"""A home's whole life in the cloud, cut off at every call of cloud and node: nothing is lost, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from provisioner import cloud_preparation, lifecycle
from provisioner.cloud_preparation import CloudPreparation
from provisioner.ledger.records import NodeStatus
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.manifest import SnapshotId
from provisioner.volumes.cloud import SnapshotProgress
from stacks.spec import CloudIdentity, NodeSpec
from tests.support.fake_cloud import FakeCloud, FakeDevices
from tests.unit.snapshots.fakes import Killed, Trouble
from tests.unit.test_cloud_preparation import ID, NODE, World, commit

FAR = NodeSpec(id="far", volume="ebs", cloud=CloudIdentity(instance_id="i-far", zone="us-east-1b"))
REVIVAL: Any = {"node_id": "far", "ports": (21000, 21001), "volume": "ebs", "disk_enforced": True}
LOOKS = {
    *("find", "find_volumes", "find_snapshots", "find_attached", "check"),
    *("describe_machine", "describe_volume", "describe_snapshot"),
}
WAITS = {"describe_volume", "describe_snapshot"}
CHANGES = {
    *("create_volume", "attach", "prepare", "tag", "settle", "create_snapshot"),
    *("remove", "detach", "delete_volume", "delete_snapshot"),
}
T = TypeVar("T")


class Life:
    """One instance after the other over one ledger, each in a cloud of its own."""

    def __init__(self, path: Path) -> None:
        self.world = World(path)
        self.store = DirectoryStore(path / "snapshots")
        self.trouble = Trouble()
        self.world.cluster.replace(self.world.spec.model_copy(update={"nodes": (NODE, FAR)}))
        self.world.ledger.nodes.sync(self.world.cluster.nodes, whole=True)
        self.world.ledger.nodes.observe("far", values={"status": NodeStatus.ONLINE})

    def begin(self) -> None:
        """Begin another life, of which the ledger and the cloud know nothing."""
        world = self.world
        cloud = world.cloud = FakeCloud()
        cloud.add_machine("i-a")
        cloud.add_machine("i-far", zone="us-east-1b")
        world.preparation._regions.of = lambda _: self.trouble.wrap(cloud)  # type: ignore[method-assign]
        # So that waiting takes few calls.
        world.preparation._patience = replace(cloud.patience, poll_s=4, snapshot_poll_s=35)
        world.add()

    def devices(self, node: NodeSpec) -> Any:
        assert node.cloud is not None
        return self.trouble.wrap(FakeDevices(self.world.cloud, node.cloud.instance_id))

    def again(self, step: Callable[[], T]) -> T:
        """Do a step twice, as an update that finds it done does, and once more where it was cut off."""
        results: list[T] = []
        while len(results) < 2:
            try:
                results.append(step())
            except Killed:
                self.world.cloud.sleep(1)  # no list shows yet what was made
        assert results[0] == results[1]
        return results[0]


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    life = Life(tmp_path)
    monkeypatch.setattr(CloudPreparation, "_devices", lambda _self, node, _owner: life.devices(node))
    for removal in ("remove_container", "remove_volume"):
        monkeypatch.setattr(cloud_preparation, removal, life.trouble.wrap(life.world).remove)
    yield life
    life.world.ledger.close()


def live(life: Life) -> None:
    """Create, browse, sleep, wake up in another zone, sleep again, be deleted."""
    life.begin()
    world, cloud = life.world, life.world.cloud
    life.again(lambda: world.preparation.make_volume(world.record))
    (volume,) = cloud.volumes
    cloud.disk(volume.id).written = "profile"

    def fall_asleep(generation: int) -> None:
        keeper = world.preparation.home_keeper(world.record, generation=generation)
        assert keeper is not None
        home = life.again(lambda: keeper.take(run=f"run {generation}", progress=lambda _: None))
        commit(life.store, home=home, generation=generation)
        world.change(lambda r: lifecycle.note_snapshot(r, generation=generation, size_bytes=1, keep=1))
        life.again(lambda: world.preparation.release(world.record))
        for obsolete in world.record.obsolete_snapshots:
            life.again(lambda o=obsolete: world.preparation.discard(world.record, generation=o))  # type: ignore[misc]
            life.store.delete(SnapshotId(instance_id=ID, generation=obsolete))
        world.change(lambda r: lifecycle.note_dormant(r, generation=generation))
        assert cloud.volumes == []
        assert [(s.id, s.state) for s in cloud.snapshots] == [(home.snapshot_id, SnapshotProgress.COMPLETED)]

    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    fall_asleep(2)
    world.change(lambda r: lifecycle.wish_revived(r, method="full_restore", **REVIVAL))
    life.again(lambda: world.preparation.make_volume(world.record))
    (second,) = cloud.volumes
    assert (second.zone, cloud.disk(second.id).content) == ("us-east-1b", "profile")
    cloud.disk(second.id).written = " and more"
    world.change(lambda r: lifecycle.note_created(r, generation=3, restored_by="full_restore", restore_note=None))
    world.change(lambda r: lifecycle.note_ready(r, generation=3))
    world.change(lambda r: lifecycle.wish_dormant(r, reason="test"))
    fall_asleep(4)
    (kept,) = cloud.snapshots
    assert cloud._snapshots[kept.id].disk.content == "profile and more"

    world.change(lambda r: lifecycle.wish_absent(r, force=False))
    life.again(lambda: world.preparation.release(world.record))
    life.again(lambda: world.preparation.discard(world.record, generation=4))
    life.store.delete(SnapshotId(instance_id=ID, generation=4))
    world.delete()
    assert (cloud.volumes, cloud.snapshots) == ([], [])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_life_that_is_cut_off_anywhere_goes_on_as_if_it_had_not(life: Life, *, after: bool) -> None:
    live(life)
    names = life.trouble.names
    assert set(names) == CHANGES | LOOKS
    for at, name in enumerate(names):
        # Whoever only looked has changed nothing: cut off after that, or before another look, it is where it was.
        if name in LOOKS and after:
            continue
        if name in WAITS and names[at - 1] == name:
            continue
        life.trouble.plan(at, after=after, error=Killed)
        live(life)
        assert life.trouble.names[at] == name
