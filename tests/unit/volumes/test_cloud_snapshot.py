"""A snapshot in the cloud is taken once, is whole when it counts, and is found again after a crash."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from provisioner.errors import CloudError, CloudMissing, SnapshotFailed
from provisioner.snapshots.capture import Capture
from provisioner.snapshots.manifest import PartName
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import restore
from provisioner.snapshots.sealing import Sealing
from provisioner.volumes.cloud import Owner, SnapshotProgress
from provisioner.volumes.cloud_snapshot import SnapshotWork
from provisioner.volumes.cloud_volume import VolumeRequest, VolumeWork
from provisioner.volumes.waiting import CutOff
from tests.support.fake_cloud import FakeCloud, FakeDevices
from tests.unit.snapshots.conftest import SNAPSHOT, Scene
from tests.unit.snapshots.conftest import scene as scene
from tests.unit.snapshots.conftest import sealing as sealing
from tests.unit.snapshots.fakes import Killed, Trouble

OWNER = Owner(cluster="local", ledger_id="ledger", instance=SNAPSHOT.instance_id, urn="urn:snapshot")
REQUEST = VolumeRequest(owner=OWNER, name="home", machine="i-a", zone="us-east-1a", size_gib=3, generation=1)


@dataclass
class CloudScene:
    """A cloud with the volume of one instance."""

    cloud: FakeCloud
    volume_id: str

    def work(self, cloud: Any = None, **more: Any) -> SnapshotWork:
        return SnapshotWork(
            cloud=cloud or self.cloud,
            owner=OWNER,
            generation=SNAPSHOT.generation,
            devices=FakeDevices(self.cloud, "i-a"),
            patience=self.cloud.patience,
            **more,
        )

    def take(self, run: str = "run-1", **more: Any) -> Any:
        return self.work(**more).take(run=run, progress=lambda _: None)


def make_scene(content: str = "profile") -> CloudScene:
    cloud = FakeCloud()
    cloud.add_machine("i-a")
    ready = VolumeWork(cloud, patience=cloud.patience).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    cloud.disk(ready.id).content = content
    return CloudScene(cloud, ready.id)


@pytest.fixture
def clouds() -> CloudScene:
    return make_scene()


def test_it_counts_once_it_is_whole(clouds: CloudScene) -> None:
    said: list[str] = []
    home = clouds.work().take(run="run-1", progress=said.append)
    (snapshot,) = clouds.cloud.snapshots
    assert (home.snapshot_id, home.volume_id, home.size_gib) == (snapshot.id, clouds.volume_id, 3)
    assert snapshot.state is SnapshotProgress.COMPLETED
    assert any("50%" in line for line in said)
    assert clouds.take() == home
    assert len(clouds.cloud.snapshots) == 1


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_cut_off_anywhere_and_run_again_it_is_one_snapshot(*, after: bool) -> None:
    calls = 0
    while True:
        clouds = make_scene()
        trouble = Trouble()
        trouble.plan(calls, after=after, error=Killed)
        try:
            clouds.take(cloud=trouble.wrap(clouds.cloud))
        except Killed:
            clouds.cloud.sleep(10)  # a start of the service later
        else:
            break
        home = clouds.take()
        assert [s.id for s in clouds.cloud.snapshots] == [home.snapshot_id], f"call {calls}: {trouble.names}"
        calls += 1
    assert calls > 30  # it is waited for


def test_what_was_written_a_moment_before_is_in_it(clouds: CloudScene) -> None:
    clouds.cloud.disk(clouds.volume_id).written = " and its last cookie"
    home = clouds.take()
    assert clouds.cloud._snapshots[home.snapshot_id].disk.content == "profile and its last cookie"


def test_one_that_the_listing_did_not_show_yet_is_removed_afterwards(clouds: CloudScene) -> None:
    tags = clouds.work().tags | {"machineuse.run": "run-1"}
    clouds.cloud.create_snapshot(clouds.volume_id, description="", tags=tags)  # and killed, a moment ago
    home = clouds.take()
    assert [s.id for s in clouds.cloud.snapshots] == [home.snapshot_id]


def test_one_of_an_earlier_run_is_taken_anew(clouds: CloudScene) -> None:
    first = clouds.take()
    clouds.cloud.disk(clouds.volume_id).content = "written since"
    second = clouds.take(run="run-2")
    assert [s.id for s in clouds.cloud.snapshots] == [second.snapshot_id] != [first.snapshot_id]


def test_what_the_cloud_could_not_take_is_told_and_taken_anew(clouds: CloudScene) -> None:
    clouds.cloud.failing_snapshots = True
    with pytest.raises(SnapshotFailed, match="could not take snapshot"):
        clouds.take()
    clouds.cloud.failing_snapshots = False
    home = clouds.take()
    assert [s.id for s in clouds.cloud.snapshots] == [home.snapshot_id]


def test_one_that_is_never_whole_is_given_up_in_time(clouds: CloudScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.fake_cloud.SNAPSHOT_S", 1e9)
    patience = replace(clouds.cloud.patience, snapshot_s=100)
    with pytest.raises(CloudError, match="not whole after 100 s"):
        replace(clouds.work(), patience=patience).take(run="run-1", progress=lambda _: None)


def test_waiting_ends_when_it_is_not_wanted_any_more(clouds: CloudScene) -> None:
    began = clouds.cloud.now
    with pytest.raises(CutOff):
        clouds.take(wanted=lambda: clouds.cloud.now < began + 10)
    assert clouds.cloud.now < began + 20


def test_without_a_volume_there_is_nothing_to_take() -> None:
    cloud = FakeCloud()
    with pytest.raises(CloudMissing):
        CloudScene(cloud, "").take()


@pytest.mark.parametrize(
    "changes", [{"size_gib": 1}, {"tags": {}}, {"state": SnapshotProgress.PENDING}], ids=["size", "tags", "state"]
)
def test_a_snapshot_that_is_not_the_one_is_refused(clouds: CloudScene, changes: dict[str, Any]) -> None:
    home = clouds.take()
    stored = clouds.cloud._snapshots[home.snapshot_id]
    stored.value = replace(stored.value, **changes)
    stored.since = clouds.cloud.now - 10
    with pytest.raises(SnapshotFailed, match="not as it should be"):
        clouds.work().check(home)


# ---- as part of a capture


def capture(scene: Scene, clouds: CloudScene, *, machine: Any = None, cloud: Any = None) -> Capture:
    return Capture(
        scene.capture, machine=machine or scene.machine, store=scene.store, home_keeper=clouds.work(cloud=cloud)
    )


def test_the_manifest_names_it_instead_of_an_archive(scene: Scene, clouds: CloudScene) -> None:
    manifest = capture(scene, clouds).run().manifest
    (snapshot,) = clouds.cloud.snapshots
    assert manifest.cloud_home is not None
    assert manifest.cloud_home.snapshot_id == snapshot.id
    assert [part.name for part in manifest.parts] == [PartName.ROOTFS]
    assert scene.store.read_manifest(SNAPSHOT) == manifest
    assert capture(scene, clouds).run().manifest == manifest
    assert not scene.machine.containers["browser-1"].running


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_capture_that_is_killed_anywhere_is_taken_by_the_next(tmp_path: Path, *, after: bool) -> None:
    at, seen = 0, set()
    while True:
        (tmp_path / str(at)).mkdir()
        one, clouds = scene.__wrapped__(tmp_path / str(at), Sealing()), make_scene()  # type: ignore[attr-defined]
        trouble = Trouble()
        trouble.plan(at, after=after, error=Killed)
        try:
            capture(one, clouds, cloud=trouble.wrap(clouds.cloud), machine=trouble.wrap(one.machine)).run()
        except Killed:
            clouds.cloud.sleep(10)
        else:
            break
        seen.add(trouble.names[-1])
        manifest = capture(one, clouds).run().manifest
        assert manifest.cloud_home is not None
        assert [s.id for s in clouds.cloud.snapshots] == [manifest.cloud_home.snapshot_id]
        at += 1
    assert {"create_snapshot", "describe_snapshot", "stop_container", "list_changes"} <= seen


def test_a_capture_that_fails_leaves_no_snapshot_and_the_browser_running(scene: Scene, clouds: CloudScene) -> None:
    clouds.cloud.failing_snapshots = True
    with pytest.raises(SnapshotFailed, match="goes on running"):
        capture(scene, clouds).run()
    assert clouds.cloud.snapshots == []
    assert scene.machine.containers["browser-1"].running
    assert scene.store.list(SNAPSHOT.instance_id) == ()


def test_a_snapshot_of_the_past_disturbs_nobody(scene: Scene, clouds: CloudScene) -> None:
    clouds.cloud.tag(clouds.volume_id, {"machineuse.life": str(SNAPSHOT.generation)})
    with pytest.raises(SnapshotFailed, match="revived from snapshot 3 since"):
        capture(scene, clouds).run()
    assert scene.machine.containers["browser-1"].running
    assert scene.machine.containers["browser-1"].starts == 1


def test_a_restore_leaves_the_home_to_the_volume(scene: Scene, clouds: CloudScene) -> None:
    capture(scene, clouds).run()
    request = replace(scene.restore(Method.QUICK_START), home_restored=True)
    result = restore(request, machine=scene.machine, store=scene.store)
    assert (result.method_used, result.fallback_reason) == (Method.QUICK_START, None)
    assert result.image == "machineuse/restored:mu-test-3"


def test_a_home_in_the_cloud_is_not_restored_onto_a_disk(scene: Scene, clouds: CloudScene) -> None:
    capture(scene, clouds).run()
    with pytest.raises(Exception, match="can't be restored onto this node"):
        restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store)


def test_a_manifest_without_a_cloud_does_not_mention_one(scene: Scene) -> None:
    manifest = Capture(scene.capture, machine=scene.machine, store=scene.store).run().manifest
    assert b"cloud" not in manifest.to_json()
