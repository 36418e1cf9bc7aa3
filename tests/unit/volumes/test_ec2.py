"""What AWS answers, as botocore gives it to us: the paths that no emulator knows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from botocore.stub import ANY, Stubber

from provisioner.errors import CloudError, CloudMissing
from provisioner.volumes.cloud import Attachment, DeviceNameTaken, TokenSpent, VolumeBusy, VolumeState
from provisioner.volumes.ec2 import Ec2, Ec2Options, Ec2Regions
from stacks.spec import CloudIdentity
from tests.unit.volumes.conftest import SNAPSHOT, VOLUME, attached, describes


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
    ec2 = Ec2("us-east-1", options=Ec2Options(volume_type="gp2", kms_key="alias/ours"), client=client)
    stub.add_response(
        "create_volume",
        VOLUME,
        {
            "AvailabilityZone": "us-east-1a",
            "Size": 3,
            "VolumeType": "gp2",
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


def test_snapshots_are_listed_to_the_last_page(ec2: Ec2, stub: Stubber) -> None:
    asked = {"OwnerIds": ["self"], "Filters": [{"Name": "tag:machineuse.generation", "Values": ["2"]}]}
    stub.add_response("describe_snapshots", {"Snapshots": [SNAPSHOT], "NextToken": "more"}, asked)
    last = SNAPSHOT | {"SnapshotId": "snap-2", "State": "completed"}
    stub.add_response("describe_snapshots", {"Snapshots": [last]}, asked | {"NextToken": "more"})
    assert [found.id for found in ec2.find_snapshots({"machineuse.generation": "2"})] == ["snap-1", "snap-2"]


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


@pytest.fixture
def busy_server() -> Iterator[str]:
    """Give the address of a server that asks once to be asked later, and then has no volumes."""
    refusal = "<Response><Errors><Error><Code>RequestLimitExceeded</Code></Error></Errors></Response>"
    answers = [(503, refusal), (200, "<DescribeVolumesResponse><volumeSet/></DescribeVolumesResponse>")]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, text = answers.pop(0)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    assert answers == []


def test_what_is_asked_too_much_is_asked_again(busy_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert Ec2Regions(Ec2Options(endpoint=busy_server)).of("us-east-1").find_volumes({}) == []


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
