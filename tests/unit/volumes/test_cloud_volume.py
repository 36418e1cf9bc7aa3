"""A volume is made once, whatever fails or dies on the way, and what may be somebody's profile is never touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from provisioner.errors import CloudConflict, CloudError, SnapshotMissing
from provisioner.volumes.cloud import LIFE_TAG, PREPARED_TAG, Owner, VolumeState
from provisioner.volumes.cloud_volume import TOKENS, VolumeRequest, VolumeWork
from provisioner.volumes.waiting import CutOff
from tests.support.fake_cloud import FakeCloud, FakeDevices
from tests.unit.snapshots.fakes import Killed, Trouble

OWNER = Owner(cluster="unit", ledger_id="ledger", instance="mu-1", urn="urn:disk")
REQUEST = VolumeRequest(owner=OWNER, name="unit-mu-1-home", machine="i-a", zone="us-east-1a", size_gib=3, generation=1)


@pytest.fixture
def cloud() -> FakeCloud:
    cloud = FakeCloud()
    cloud.add_machine("i-a")
    cloud.add_machine("i-b")
    cloud.add_machine("i-far", zone="us-east-1b")
    return cloud


def work(cloud: Any, **more: Any) -> VolumeWork:
    return VolumeWork(cloud, patience=cloud.patience, **more)


def add_volume(
    cloud: FakeCloud, *, life: int = 0, prepared: bool = False, zone: str = "us-east-1a", **more: Any
) -> str:
    tags = OWNER.all_tags | {LIFE_TAG: str(life)} | ({PREPARED_TAG: "true"} if prepared else {})
    made = cloud.create_volume(
        token=f"{cloud.now}", zone=zone, size_gib=more.get("size_gib", 3), snapshot_id=None, tags=tags
    )
    cloud.disk(made.id).file_system = prepared
    cloud.sleep(100)
    return made.id


def attach(cloud: FakeCloud, volume_id: str, machine: str) -> None:
    cloud.attach(volume_id, machine=machine, device="/dev/sdf")
    cloud.sleep(100)


def test_a_volume_is_made_attached_and_formatted(cloud: FakeCloud) -> None:
    devices = FakeDevices(cloud, "i-a")
    ready = work(cloud).ensure(REQUEST, devices=devices)
    (volume,) = cloud.volumes
    assert (volume.id, volume.size_gib, volume.zone, volume.prepared) == (ready.id, 3, "us-east-1a", True)
    assert volume.attachment is not None
    assert (volume.attachment.machine, volume.attachment.device) == ("i-a", "/dev/sdf")
    assert ready.device == f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{ready.id.replace('-', '')}"
    assert devices.formatted == [ready.id]
    assert OWNER.all_tags.items() <= volume.tags.items()


def test_asked_again_it_is_the_same_volume(cloud: FakeCloud) -> None:
    devices = FakeDevices(cloud, "i-a")
    first = work(cloud).ensure(REQUEST, devices=devices)
    assert work(cloud).ensure(REQUEST, devices=devices) == first
    # A repair is a later wish, of the same life.
    assert work(cloud).ensure(replace(REQUEST, generation=2), devices=devices) == first
    assert len(cloud.volumes) == 1
    assert devices.formatted == [first.id]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [Killed, lambda: CloudError("it failed")], ids=["killed", "failed"])
def test_cut_off_anywhere_and_run_again_it_is_one_volume(cloud: FakeCloud, *, after: bool, error: Any) -> None:
    calls = 0
    while True:
        cloud = FakeCloud()
        cloud.add_machine("i-a")
        trouble = Trouble()
        trouble.plan(calls, after=after, error=error)
        devices = FakeDevices(cloud, "i-a")
        troubled = VolumeWork(trouble.wrap(cloud), patience=cloud.patience)
        try:
            troubled.ensure(REQUEST, devices=trouble.wrap(devices))
        except (Killed, CloudError):
            pass
        else:
            break
        trouble.calm()
        ready = troubled.ensure(REQUEST, devices=devices)
        (volume,) = cloud.volumes
        assert (volume.id, volume.prepared, cloud.disk(volume.id).file_system) == (ready.id, True, True)
        assert devices.formatted == [ready.id], f"call {calls}: {trouble.names}"
        calls += 1
    assert calls > 7


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_removal_that_is_cut_off_is_finished_by_the_next(*, after: bool) -> None:
    calls = 0
    while True:
        cloud = FakeCloud()
        cloud.add_machine("i-a")
        VolumeWork(cloud, patience=cloud.patience).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
        trouble = Trouble()
        trouble.plan(calls, after=after, error=Killed)
        troubled = VolumeWork(trouble.wrap(cloud), patience=cloud.patience)
        try:
            troubled.release(OWNER)
        except Killed:
            trouble.calm()
            troubled.release(OWNER)
        else:
            break
        assert cloud.volumes == []
        calls += 1
    assert calls >= 4


def test_a_volume_that_a_later_wish_made_meanwhile_is_not_released(cloud: FakeCloud) -> None:
    earlier = work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    later: list[str] = []

    def be_asked_late() -> bool:
        later.append(add_volume(cloud, life=2, prepared=True))
        return True

    assert work(cloud).release(OWNER, allowed=be_asked_late) == 1
    assert len(later) == 1
    assert [volume.id for volume in cloud.volumes] == later != [earlier.id]
    assert work(cloud).release(OWNER, allowed=lambda: False) == 0
    assert [volume.id for volume in cloud.volumes] == later


def test_a_volume_of_a_new_wish_is_never_the_one_that_was_removed(cloud: FakeCloud) -> None:
    devices = FakeDevices(cloud, "i-a")
    first = work(cloud).ensure(REQUEST, devices=devices)
    work(cloud).release(OWNER)
    assert cloud.volumes == []
    # The very same wish: its token is spent on a volume that is gone.
    second = work(cloud).ensure(REQUEST, devices=devices)
    third = work(cloud).ensure(replace(REQUEST, generation=5), devices=devices)
    assert first.id != second.id == third.id
    assert [volume.id for volume in cloud.volumes] == [second.id]


def test_a_volume_that_is_never_available_is_given_up_in_time(
    cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.fake_cloud.WORK_S", 1e9)
    began = cloud.now
    with pytest.raises(CloudError, match="is not there after 180 s"):
        work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert cloud.now - began < 200


def test_volumes_that_all_fail_are_removed_and_given_up(cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    create = cloud.create_volume

    def create_broken(**arguments: Any) -> Any:
        made = create(**arguments)
        if made.state is VolumeState.CREATING and made.tags:
            cloud.break_volume(made.id)
        return made

    monkeypatch.setattr(cloud, "create_volume", create_broken)
    with pytest.raises(CloudError, match=f"{TOKENS} of them failed"):
        work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert cloud.volumes == []


def test_waiting_ends_when_it_is_not_wanted_any_more(cloud: FakeCloud) -> None:
    with pytest.raises(CutOff):
        work(cloud, wanted=lambda: cloud.now < 1002).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert cloud.now < 1010


@pytest.mark.parametrize("zone", ["us-east-1a", "us-east-1b"])
def test_half_made_volumes_are_adopted_or_removed(cloud: FakeCloud, zone: str) -> None:
    halves = [add_volume(cloud, zone=zone), add_volume(cloud, zone=zone)]
    ready = work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert [volume.id for volume in cloud.volumes] == [ready.id]
    assert (ready.id == halves[0]) is (zone == "us-east-1a")


def test_one_that_is_too_small_and_was_never_used_is_removed(cloud: FakeCloud) -> None:
    add_volume(cloud, size_gib=1)
    ready = work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert [(volume.id, volume.size_gib) for volume in cloud.volumes] == [(ready.id, 3)]


def test_a_profile_in_another_zone_is_left_alone_and_told_of(cloud: FakeCloud) -> None:
    kept = add_volume(cloud, prepared=True, zone="us-east-1b")
    with pytest.raises(CloudConflict, match=f"{kept} of instance mu-1 is in us-east-1b"):
        work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert [volume.id for volume in cloud.volumes] == [kept]


def test_a_profile_that_failed_is_left_alone_and_told_of(cloud: FakeCloud) -> None:
    kept = add_volume(cloud, prepared=True)
    cloud.break_volume(kept)
    with pytest.raises(CloudConflict, match=f"{kept} of instance mu-1 has failed"):
        work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert [volume.id for volume in cloud.volumes] == [kept]


def test_of_two_profiles_none_is_chosen(cloud: FakeCloud) -> None:
    both = {add_volume(cloud, prepared=True), add_volume(cloud, prepared=True)}
    with pytest.raises(CloudConflict, match="has several volumes"):
        work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert {volume.id for volume in cloud.volumes} == both


def test_a_prepared_volume_without_a_file_system_is_not_formatted_again(cloud: FakeCloud) -> None:
    damaged = add_volume(cloud, prepared=True)
    cloud.disk(damaged).file_system = False
    devices = FakeDevices(cloud, "i-a")
    with pytest.raises(CloudConflict, match="no file system"):
        work(cloud).ensure(REQUEST, devices=devices)
    assert devices.formatted == []


def test_a_volume_of_another_life_is_not_taken(cloud: FakeCloud) -> None:
    earlier = add_volume(cloud, life=2, prepared=True)
    ready = work(cloud).ensure(replace(REQUEST, life=4), devices=FakeDevices(cloud, "i-a"))
    assert ready.id != earlier
    assert {volume.id for volume in cloud.volumes} == {earlier, ready.id}
    assert work(cloud).release(OWNER) == 2
    assert cloud.volumes == []


def test_a_volume_that_a_running_machine_has_is_left_there(cloud: FakeCloud) -> None:
    kept = add_volume(cloud, prepared=True)
    attach(cloud, kept, "i-b")
    with pytest.raises(CloudConflict, match="attached to machine i-b, which runs"):
        work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    (volume,) = cloud.volumes
    assert volume.attachment is not None
    assert volume.attachment.machine == "i-b"


@pytest.mark.parametrize("state", ["stopped", "terminated", None])
def test_a_volume_is_taken_from_a_machine_that_does_not_run(cloud: FakeCloud, state: str | None) -> None:
    kept = add_volume(cloud, prepared=True)
    attach(cloud, kept, "i-b")
    cloud.disk(kept).content = "profile"
    if state is None:
        del cloud.machines["i-b"]
    else:
        cloud.add_machine("i-b", state=state)
    ready = work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    assert (ready.id, cloud.disk(kept).content, cloud.forced) == (kept, "profile", [])


def test_it_is_taken_by_force_only_where_the_machine_is_given_up(cloud: FakeCloud) -> None:
    kept = add_volume(cloud, prepared=True)
    attach(cloud, kept, "i-b")
    given_up = replace(REQUEST, given_up=frozenset({"i-b"}))
    assert work(cloud).ensure(given_up, devices=FakeDevices(cloud, "i-a")).id == kept
    assert cloud.forced == [kept]


def test_a_snapshot_that_is_gone_ends_a_revival(cloud: FakeCloud) -> None:
    request = replace(REQUEST, life=2, snapshot_id=lambda: "snap-gone")
    with pytest.raises(SnapshotMissing, match="snap-gone"):
        work(cloud).ensure(request, devices=FakeDevices(cloud, "i-a"))
    assert cloud.volumes == []


def test_a_volume_from_a_snapshot_has_what_was_on_it_and_is_never_formatted(cloud: FakeCloud) -> None:
    first = work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    cloud.disk(first.id).content = "profile"
    taken = cloud.create_snapshot(first.id, description="", tags={})
    cloud.sleep(100)
    work(cloud).release(OWNER)
    devices = FakeDevices(cloud, "i-a")
    request = replace(REQUEST, life=2, generation=3, size_gib=5, snapshot_id=lambda: taken.id)
    second = work(cloud).ensure(request, devices=devices)
    assert (second.size_gib, cloud.disk(second.id).content) == (5, "profile")
    assert (devices.formatted, devices.grown) == ([], [second.id])


def test_an_attachment_takes_the_next_name_that_is_free(cloud: FakeCloud) -> None:
    other = Owner(cluster="unit", ledger_id="ledger", instance="mu-2", urn="urn:other")
    work(cloud).ensure(REQUEST, devices=FakeDevices(cloud, "i-a"))
    work(cloud).ensure(replace(REQUEST, owner=other), devices=FakeDevices(cloud, "i-a"))
    assert {v.attachment.device for v in cloud.volumes if v.attachment} == {"/dev/sdf", "/dev/sdg"}


@pytest.mark.parametrize(
    ("machine", "said"),
    [("i-far", "Machine i-far is in us-east-1b, and its node says us-east-1a"), ("i-none", "no machine i-none in us-")],
)
def test_a_machine_that_is_elsewhere_is_told_of_and_no_volume_is_made(
    cloud: FakeCloud, machine: str, said: str
) -> None:
    with pytest.raises(CloudError, match=said):
        work(cloud).ensure(replace(REQUEST, machine=machine), devices=FakeDevices(cloud, machine))
    assert cloud.volumes == []


def test_a_half_made_volume_in_the_wrong_zone_is_told_and_goes_once_that_is_corrected(cloud: FakeCloud) -> None:
    add_volume(cloud)
    with pytest.raises(CloudError, match="different zones"):
        work(cloud).ensure(replace(REQUEST, machine="i-far"), devices=FakeDevices(cloud, "i-far"))
    corrected = replace(REQUEST, machine="i-far", zone="us-east-1b")
    ready = work(cloud).ensure(corrected, devices=FakeDevices(cloud, "i-far"))
    assert [(v.id, v.zone) for v in cloud.volumes] == [(ready.id, "us-east-1b")]
