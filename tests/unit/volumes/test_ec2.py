"""What AWS answers, as botocore gives it to us: the paths that no emulator knows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.stub import ANY, Stubber

from provisioner.errors import CloudError, CloudMissing
from provisioner.volumes.cloud import (
    Attachment,
    DeviceNameTaken,
    Owner,
    SnapshotProgress,
    TokenSpent,
    VolumeBusy,
    VolumeState,
)
from provisioner.volumes.cloud_snapshot import SnapshotWork
from provisioner.volumes.cloud_volume import VolumeRequest, VolumeWork
from provisioner.volumes.ec2 import Ec2, Ec2Options, Ec2Regions
from provisioner.volumes.waiting import Patience
from stacks.spec import CloudIdentity

OWNER = Owner(cluster="unit", ledger_id="ledger", instance="mu-1", urn="urn")
REQUEST = VolumeRequest(owner=OWNER, name="home", machine="i-a", zone="us-east-1a", size_gib=3, generation=1)
VOLUME: dict[str, Any] = {
    "VolumeId": "vol-1",
    "State": "available",
    "AvailabilityZone": "us-east-1a",
    "Size": 3,
    "CreateTime": datetime(2026, 1, 1, tzinfo=UTC),
    "Tags": [{"Key": "machineuse.life", "Value": "0"}],
}
SNAPSHOT: dict[str, Any] = {
    "SnapshotId": "snap-1",
    "State": "pending",
    "VolumeId": "vol-1",
    "VolumeSize": 3,
    "Progress": "12%",
}


@pytest.fixture
def client() -> Any:
    return boto3.client(
        "ec2",
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
        config=Config(retries={"total_max_attempts": 1}),
    )


@pytest.fixture
def stub(client: Any) -> Iterator[Stubber]:
    with Stubber(client) as stub:
        yield stub
        stub.assert_no_pending_responses()


@pytest.fixture
def ec2(client: Any) -> Ec2:
    return Ec2("us-east-1", options=Ec2Options(), client=client)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @property
    def patience(self) -> Patience:
        return Patience(clock=lambda: self.now, sleep=self.sleep)


def describes(stub: Stubber, *states: str, **more: Any) -> None:
    for state in states:
        stub.add_response("describe_volumes", {"Volumes": [VOLUME | {"State": state} | more]}, {"VolumeIds": ["vol-1"]})


def attached(machine: str, state: str = "attached") -> dict[str, Any]:
    return {"Attachments": [{"InstanceId": machine, "Device": "/dev/sdf", "State": state}]}


def test_a_volume_is_asked_for_with_a_token_tags_and_encryption(ec2: Ec2, stub: Stubber) -> None:
    stub.add_response(
        "create_volume",
        VOLUME | {"State": "creating"},
        {
            "AvailabilityZone": "us-east-1a",
            "Size": 3,
            "VolumeType": "gp3",
            "Encrypted": True,
            "ClientToken": "token",
            "SnapshotId": "snap-1",
            "TagSpecifications": [{"ResourceType": "volume", "Tags": [{"Key": "a", "Value": "b"}]}],
        },
    )
    made = ec2.create_volume(token="token", zone="us-east-1a", size_gib=3, snapshot_id="snap-1", tags={"a": "b"})
    assert (made.id, made.state, made.attachment) == ("vol-1", VolumeState.CREATING, None)


def test_the_key_that_is_set_is_used(client: Any, stub: Stubber) -> None:
    ec2 = Ec2("us-east-1", options=Ec2Options(volume_type="io2", kms_key="alias/ours"), client=client)
    stub.add_response(
        "create_volume",
        VOLUME,
        {
            "AvailabilityZone": "us-east-1a",
            "Size": 3,
            "VolumeType": "io2",
            "Encrypted": True,
            "KmsKeyId": "alias/ours",
            "ClientToken": "token",
            "TagSpecifications": ANY,
        },
    )
    ec2.create_volume(token="token", zone="us-east-1a", size_gib=3, snapshot_id=None, tags={})


def test_what_is_listed_is_listed_to_the_last_page(ec2: Ec2, stub: Stubber) -> None:
    filters = [{"Name": "tag:machineuse.instance", "Values": ["mu-1"]}]
    stub.add_response("describe_volumes", {"Volumes": [VOLUME], "NextToken": "more"}, {"Filters": filters})
    last = VOLUME | {"VolumeId": "vol-2"} | attached("i-a", "detaching")
    stub.add_response("describe_volumes", {"Volumes": [last]}, {"Filters": filters, "NextToken": "more"})
    first, second = ec2.find_volumes({"machineuse.instance": "mu-1"})
    assert (first.id, first.tags) == ("vol-1", {"machineuse.life": "0"})
    assert second.attachment == Attachment(machine="i-a", device="/dev/sdf", state="detaching")


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        ("InvalidVolume.NotFound", "", CloudMissing),
        ("InvalidInstanceID.NotFound", "", CloudMissing),
        ("VolumeInUse", "vol-1 is already attached to an instance", VolumeBusy),
        ("IncorrectState", "vol-1 is not 'available'", VolumeBusy),
        (
            "InvalidParameterValue",
            "Invalid value '/dev/sdf' for unixDevice. /dev/sdf is already in use",
            DeviceNameTaken,
        ),
        ("InvalidParameterValue", "something else", CloudError),
    ],
)
def test_a_refusal_to_attach_is_told_apart(
    ec2: Ec2, stub: Stubber, code: str, said: str, expected: type[CloudError]
) -> None:
    stub.add_client_error("attach_volume", code, said)
    with pytest.raises(CloudError) as raised:
        ec2.attach("vol-1", machine="i-a", device="/dev/sdf")
    assert type(raised.value) is expected


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("InvalidVolume.ZoneMismatch", "cloud.zone"),
        ("UnauthorizedOperation", "docs/cloud-volumes.md"),
        ("ExpiredToken", "Renew"),
        ("RequestExpired", "clock"),
        ("VolumeLimitExceeded", "quota"),
        ("InsufficientVolumeCapacity", "another zone"),
        ("SnapshotCreationPerVolumeRateExceeded", "Wait"),
        ("AttachmentLimitExceeded", "max_instances"),
        ("RequestLimitExceeded", "Wait"),
    ],
)
def test_what_somebody_can_do_about_it_is_said_in_one_line(ec2: Ec2, stub: Stubber, code: str, advice: str) -> None:
    stub.add_client_error("attach_volume", code, "No.")
    with pytest.raises(CloudError) as raised:
        ec2.attach("vol-1", machine="i-a", device="/dev/sdf")
    assert raised.value.message.startswith("EC2 in us-east-1 could not attach volume vol-1 to i-a: ")
    assert "\n" not in raised.value.message
    assert advice in (raised.value.resolution or "")
    assert code in (raised.value.detail or "")


def test_a_spent_token_is_told_apart(ec2: Ec2, stub: Stubber) -> None:
    stub.add_client_error("create_volume", "IdempotentParameterMismatch", "")
    with pytest.raises(TokenSpent):
        ec2.create_volume(token="token", zone="us-east-1a", size_gib=3, snapshot_id=None, tags={})


def test_what_is_gone_already_is_deleted(ec2: Ec2, stub: Stubber) -> None:
    stub.add_client_error("delete_volume", "InvalidVolume.NotFound")
    stub.add_client_error("delete_snapshot", "InvalidSnapshot.NotFound")
    ec2.delete_volume("vol-1")
    ec2.delete_snapshot("snap-1")


def test_what_is_not_attached_is_detached(ec2: Ec2, stub: Stubber) -> None:
    stub.add_client_error("detach_volume", "IncorrectState", "Volume 'vol-1' is in the 'available' state.")
    describes(stub, "available")
    ec2.detach("vol-1", machine="i-a", force=False)


def test_a_detach_that_is_refused_is_told(ec2: Ec2, stub: Stubber) -> None:
    stub.add_client_error("detach_volume", "IncorrectState", "vol-1 is attaching")
    describes(stub, "in-use", **attached("i-a", "attaching"))
    with pytest.raises(VolumeBusy):
        ec2.detach("vol-1", machine="i-a", force=False)


@pytest.mark.parametrize("state", ["detaching", "busy"])
def test_what_is_being_detached_need_not_be_detached_again(ec2: Ec2, stub: Stubber, state: str) -> None:
    stub.add_client_error("detach_volume", "IncorrectState", f"Volume 'vol-1' is in the '{state}' state.")
    describes(stub, "in-use", **attached("i-a", state))
    ec2.detach("vol-1", machine="i-a", force=False)


def test_the_machine_tells_its_zone(ec2: Ec2, stub: Stubber) -> None:
    found = {"InstanceId": "i-a", "State": {"Name": "stopped"}, "Placement": {"AvailabilityZone": "us-east-1c"}}
    stub.add_response("describe_instances", {"Reservations": [{"Instances": [found]}]}, {"InstanceIds": ["i-a"]})
    machine = ec2.describe_machine("i-a")
    assert (machine.zone, machine.runs) == ("us-east-1c", False)


def test_a_server_that_is_not_there_is_told_of_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("provisioner.volumes.ec2.ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "much-more-secret")
    ec2 = Ec2Regions(Ec2Options(endpoint="http://127.0.0.1:1")).of("us-east-1")
    with pytest.raises(CloudError, match="does not answer") as raised:
        ec2.find_volumes({})
    assert "SECRET" not in f"{raised.value.message}{raised.value.detail}".upper()


def test_without_keys_it_says_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(CloudError, match="no credentials"):
        Ec2Regions(Ec2Options(endpoint="http://127.0.0.1:1")).of("us-east-1").find_volumes({})


def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(CloudError, match="nobody") as raised:
        Ec2Regions(Ec2Options()).of("us-east-1")
    assert "AWS_PROFILE" in (raised.value.resolution or "")


def test_a_region_has_one_client() -> None:
    regions = Ec2Regions(Ec2Options())
    assert regions.of("us-east-1") is regions.of("us-east-1") is not regions.of("us-west-2")


@pytest.mark.parametrize(
    ("zone", "region"),
    [
        ("us-east-1a", "us-east-1"),
        ("ap-southeast-2c", "ap-southeast-2"),
        ("us-gov-west-1b", "us-gov-west-1"),
        ("us-west-2-lax-1a", "us-west-2"),
    ],
)
def test_a_zone_is_in_its_region(zone: str, region: str) -> None:
    assert CloudIdentity(instance_id="i-a", zone=zone).region == region


# ---- the workflows, answer by answer


def test_states_on_the_way_are_waited_for(ec2: Ec2, stub: Stubber) -> None:
    stub.add_response("describe_volumes", {"Volumes": []})
    stub.add_response("create_volume", VOLUME | {"State": "creating"})
    stub.add_client_error("describe_volumes", "InvalidVolume.NotFound")  # AWS has not told all its servers yet
    describes(stub, "creating", "available", "available")
    work = VolumeWork(ec2, patience=Clock().patience)
    volume = work.ensure_volume(REQUEST)
    stub.add_response("describe_volumes", {"Volumes": []}, {"Filters": ANY})
    stub.add_client_error("attach_volume", "InvalidParameterValue", "/dev/sdf is already in use")
    stub.add_response("attach_volume", {}, {"VolumeId": "vol-1", "InstanceId": "i-a", "Device": "/dev/sdg"})
    describes(stub, "in-use", **attached("i-a", "attaching"))
    describes(stub, "in-use", **attached("i-a"))
    assert work.ensure_attached(volume, REQUEST).attachment is not None


def test_an_attach_whose_answer_was_lost_is_found_done(ec2: Ec2, stub: Stubber) -> None:
    describes(stub, "available")
    volume = ec2.describe_volume("vol-1")
    stub.add_response("describe_volumes", {"Volumes": []}, {"Filters": ANY})
    stub.add_client_error("attach_volume", "VolumeInUse", "vol-1 is already attached to an instance")
    describes(stub, "in-use", "in-use", **attached("i-a"))
    VolumeWork(ec2, patience=Clock().patience).ensure_attached(volume, REQUEST)


def test_an_attach_that_another_machine_won_is_a_failure(ec2: Ec2, stub: Stubber) -> None:
    describes(stub, "available")
    volume = ec2.describe_volume("vol-1")
    stub.add_response("describe_volumes", {"Volumes": []}, {"Filters": ANY})
    stub.add_client_error("attach_volume", "VolumeInUse", "vol-1 is already attached to an instance")
    describes(stub, "in-use", **attached("i-b"))
    with pytest.raises(VolumeBusy):
        VolumeWork(ec2, patience=Clock().patience).ensure_attached(volume, REQUEST)


def test_a_spent_token_is_followed_by_the_next(ec2: Ec2, stub: Stubber) -> None:
    tokens: list[str] = []
    stub.add_response("describe_volumes", {"Volumes": []})
    stub.add_client_error("create_volume", "IdempotentParameterMismatch")
    stub.add_response("create_volume", VOLUME)
    describes(stub, "available", "available")
    ec2._client.meta.events.register(
        "provide-client-params.ec2.CreateVolume", lambda params, **_: tokens.append(params["ClientToken"])
    )
    VolumeWork(ec2, patience=Clock().patience).ensure_volume(REQUEST)
    assert len(set(tokens)) == len(tokens) == 2
    assert all(len(token) <= 64 for token in tokens)


def test_a_snapshot_that_fails_halfway_is_told_with_the_clouds_words(ec2: Ec2, stub: Stubber) -> None:
    clock = Clock()
    mine = VOLUME | {"Tags": [{"Key": "machineuse.prepared", "Value": "true"}]}
    stub.add_response("describe_volumes", {"Volumes": [mine]})
    stub.add_response("describe_snapshots", {"Snapshots": []})
    stub.add_response("create_snapshot", SNAPSHOT)
    stub.add_response("describe_snapshots", {"Snapshots": [SNAPSHOT]}, {"SnapshotIds": ["snap-1"]})
    failed = SNAPSHOT | {"State": "error", "StateMessage": "the key is disabled"}
    stub.add_response("describe_snapshots", {"Snapshots": [failed]}, {"SnapshotIds": ["snap-1"]})
    said: list[str] = []
    with pytest.raises(Exception, match="the key is disabled"):
        SnapshotWork(cloud=ec2, owner=OWNER, generation=2, patience=clock.patience).take(run="r", progress=said.append)
    assert said[-1] == "snapshot snap-1: 12%"
    assert SnapshotProgress(failed["State"]) is SnapshotProgress.ERROR
