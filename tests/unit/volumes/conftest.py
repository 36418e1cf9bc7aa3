"""EC2 as botocore has it, answered by a Stubber: it knows every parameter's shape, and compares what is expected."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.stub import ANY, Stubber

from provisioner.volumes.cloud import Owner
from provisioner.volumes.cloud_volume import VolumeRequest
from provisioner.volumes.ec2 import Ec2, Ec2Options
from provisioner.volumes.waiting import Patience

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


def tags(of: dict[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in sorted(of.items())]


OURS = {"machineuse.cluster": "unit", "machineuse.instance": "mu-1", "machineuse.ledger": "ledger"}
FIND = {"Filters": [{"Name": f"tag:{key}", "Values": [value]} for key, value in OURS.items()]}
TAGS = OURS | {"machineuse.urn": "urn", "machineuse.generation": "1", "machineuse.life": "0", "Name": "home"}
CREATE = {
    "AvailabilityZone": "us-east-1a",
    "Size": 3,
    "VolumeType": "gp3",
    "Encrypted": True,
    "ClientToken": ANY,
    "TagSpecifications": [{"ResourceType": "volume", "Tags": tags(TAGS)}],
}
ON_MACHINE = {"Filters": [{"Name": "attachment.instance-id", "Values": ["i-a"]}]}
ATTACH = {"VolumeId": "vol-1", "InstanceId": "i-a", "Device": "/dev/sdf"}


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


def finds_none(stub: Stubber) -> None:
    """Let there be no volume of ours yet, and the machine where one is to be made."""
    stub.add_response("describe_volumes", {"Volumes": []}, FIND)
    found = {"InstanceId": "i-a", "State": {"Name": "running"}, "Placement": {"AvailabilityZone": "us-east-1a"}}
    stub.add_response("describe_instances", {"Reservations": [{"Instances": [found]}]}, {"InstanceIds": ["i-a"]})


def attached(machine: str, state: str = "attached") -> dict[str, Any]:
    return {"Attachments": [{"InstanceId": machine, "Device": "/dev/sdf", "State": state}]}
