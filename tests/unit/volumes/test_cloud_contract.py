"""The cloud that the tests have in memory does as EC2 does, as far as an emulator knows: the same cases on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from moto import mock_aws

from provisioner.errors import CloudMissing
from provisioner.volumes.cloud import Cloud, SnapshotProgress, Volume, VolumeState
from provisioner.volumes.ec2 import Ec2, Ec2Options
from tests.support.fake_cloud import FakeCloud

Wait = Callable[[], None]


@pytest.fixture(params=["memory", "moto"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cloud, str, Wait]]:
    """Give a cloud, a machine in its zone a, and what lets time pass there."""
    if request.param == "memory":
        cloud = FakeCloud()
        cloud.add_machine("i-a")
        yield cloud, "i-a", lambda: cloud.sleep(100)
        return
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with mock_aws():
        ec2 = Ec2("us-east-1", options=Ec2Options())
        made = ec2._client.run_instances(
            ImageId="ami-12c6146b", MinCount=1, MaxCount=1, Placement={"AvailabilityZone": "us-east-1a"}
        )
        yield ec2, made["Instances"][0]["InstanceId"], lambda: None


def make(cloud: Cloud, wait: Wait, *, token: str = "token", snapshot_id: str | None = None) -> Volume:
    tags = {"owner": token, "life": "0"}
    made = cloud.create_volume(token=token, zone="us-east-1a", size_gib=2, snapshot_id=snapshot_id, tags=tags)
    wait()
    return cloud.describe_volume(made.id)


def test_a_volume_becomes_available_and_is_found_by_its_tags(place: tuple[Cloud, str, Wait]) -> None:
    cloud, _, wait = place
    volume = make(cloud, wait)
    other = make(cloud, wait, token="other")
    assert (volume.state, volume.size_gib, volume.zone) == (VolumeState.AVAILABLE, 2, "us-east-1a")
    assert [v.id for v in cloud.find_volumes({"owner": "token", "life": "0"})] == [volume.id]
    assert {v.id for v in cloud.find_volumes({"life": "0"})} == {volume.id, other.id}
    cloud.tag(volume.id, {"life": "1"})
    assert [v.tags["life"] for v in cloud.find_volumes({"owner": "token"})] == ["1"]


def test_a_volume_is_attached_and_detached(place: tuple[Cloud, str, Wait]) -> None:
    cloud, machine, wait = place
    volume = make(cloud, wait)
    cloud.attach(volume.id, machine=machine, device="/dev/sdf")
    wait()
    now = cloud.describe_volume(volume.id)
    assert now.state is VolumeState.IN_USE
    assert now.attachment is not None
    assert (now.attachment.machine, now.attachment.device, now.attachment.state) == (machine, "/dev/sdf", "attached")
    assert volume.id in {v.id for v in cloud.find_attached(machine)}
    cloud.detach(volume.id, machine=machine, force=False)
    wait()
    assert cloud.describe_volume(volume.id).state is VolumeState.AVAILABLE
    assert cloud.describe_volume(volume.id).attachment is None
    cloud.detach(volume.id, machine=machine, force=False)


def test_a_deleted_volume_is_missing_and_deleted_again(place: tuple[Cloud, str, Wait]) -> None:
    cloud, _, wait = place
    volume = make(cloud, wait)
    cloud.delete_volume(volume.id)
    wait()
    with pytest.raises(CloudMissing):
        cloud.describe_volume(volume.id)
    cloud.delete_volume(volume.id)
    assert cloud.find_volumes({"owner": "token"}) == []


def test_a_snapshot_becomes_whole_and_a_volume_again(place: tuple[Cloud, str, Wait]) -> None:
    cloud, _, wait = place
    volume = make(cloud, wait)
    made = cloud.create_snapshot(volume.id, description="d", tags={"of": "it"})
    wait()
    found = cloud.describe_snapshot(made.id)
    assert (found.state, found.volume_id, found.size_gib) == (SnapshotProgress.COMPLETED, volume.id, 2)
    assert [s.id for s in cloud.find_snapshots({"of": "it"})] == [made.id]
    again = make(cloud, wait, token="again", snapshot_id=made.id)
    assert again.state is VolumeState.AVAILABLE
    cloud.delete_snapshot(made.id)
    cloud.delete_snapshot(made.id)
    with pytest.raises(CloudMissing):
        cloud.describe_snapshot(made.id)


def test_what_was_never_there_is_missing(place: tuple[Cloud, str, Wait]) -> None:
    cloud, machine, wait = place
    volume = make(cloud, wait)
    with pytest.raises(CloudMissing):
        cloud.describe_volume("vol-0123456789abcdef0")
    with pytest.raises(CloudMissing):
        cloud.describe_machine("i-0123456789abcdef0")
    with pytest.raises(CloudMissing):
        cloud.attach(volume.id, machine="i-0123456789abcdef0", device="/dev/sdf")
    assert cloud.describe_machine(machine).runs
    assert cloud.describe_machine(machine).zone == "us-east-1a"
