"""Volumes and snapshots, answer by answer: idempotency, conflicts, the wrong zone, and states on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from botocore.stub import ANY, Stubber

from provisioner.errors import CloudError
from provisioner.volumes.cloud import SnapshotProgress, VolumeBusy
from provisioner.volumes.cloud_snapshot import SnapshotWork
from provisioner.volumes.cloud_volume import VolumeWork
from provisioner.volumes.ec2 import Ec2
from tests.unit.volumes.conftest import (
    ATTACH,
    CREATE,
    FIND,
    ON_MACHINE,
    OURS,
    OWNER,
    REQUEST,
    SNAPSHOT,
    VOLUME,
    Clock,
    attached,
    describes,
    finds_none,
    tags,
)


def test_states_on_the_way_are_waited_for(ec2: Ec2, stub: Stubber) -> None:
    finds_none(stub)
    stub.add_response("create_volume", VOLUME | {"State": "creating"}, CREATE)
    stub.add_client_error("describe_volumes", "InvalidVolume.NotFound")  # AWS has not told all its servers yet
    describes(stub, "creating", "available", "available")
    work = VolumeWork(ec2, patience=Clock().patience)
    volume = work.ensure_volume(REQUEST)
    stub.add_response("describe_volumes", {"Volumes": []}, ON_MACHINE)
    refusal = "/dev/sdf is already in use"
    stub.add_client_error("attach_volume", "InvalidParameterValue", refusal, expected_params=ATTACH)
    stub.add_response("attach_volume", {}, ATTACH | {"Device": "/dev/sdg"})
    describes(stub, "in-use", **attached("i-a", "attaching"))
    describes(stub, "in-use", **attached("i-a"))
    assert work.ensure_attached(volume, REQUEST).attachment is not None


def test_a_volume_that_never_leaves_a_state_is_given_up_in_time(ec2: Ec2, stub: Stubber) -> None:
    finds_none(stub)
    stub.add_response("create_volume", VOLUME | {"State": "creating"}, CREATE)
    clock = Clock()
    patience = replace(clock.patience, volume_s=3)
    describes(stub, *["creating"] * 4)
    with pytest.raises(CloudError, match="Volume vol-1 is not there after 3 s"):
        VolumeWork(ec2, patience=patience).ensure_volume(REQUEST)


def test_an_attach_whose_answer_was_lost_is_found_done(ec2: Ec2, stub: Stubber) -> None:
    describes(stub, "available")
    volume = ec2.describe_volume("vol-1")
    stub.add_response("describe_volumes", {"Volumes": []}, ON_MACHINE)
    refusal = "vol-1 is already attached to an instance"
    stub.add_client_error("attach_volume", "VolumeInUse", refusal, expected_params=ATTACH)
    describes(stub, "in-use", "in-use", **attached("i-a"))
    VolumeWork(ec2, patience=Clock().patience).ensure_attached(volume, REQUEST)


def test_an_attach_that_another_machine_won_is_a_failure(ec2: Ec2, stub: Stubber) -> None:
    describes(stub, "available")
    volume = ec2.describe_volume("vol-1")
    stub.add_response("describe_volumes", {"Volumes": []}, ON_MACHINE)
    refusal = "vol-1 is already attached to an instance"
    stub.add_client_error("attach_volume", "VolumeInUse", refusal, expected_params=ATTACH)
    describes(stub, "in-use", **attached("i-b"))
    with pytest.raises(VolumeBusy):
        VolumeWork(ec2, patience=Clock().patience).ensure_attached(volume, REQUEST)


def test_a_machine_in_another_zone_is_attached_to_once_and_told_of(ec2: Ec2, stub: Stubber) -> None:
    describes(stub, "available")
    volume = ec2.describe_volume("vol-1")
    stub.add_response("describe_volumes", {"Volumes": []}, ON_MACHINE)
    said = "The volume 'vol-1' is not in the same availability zone as instance 'i-a'"
    stub.add_client_error("attach_volume", "InvalidVolume.ZoneMismatch", said, expected_params=ATTACH)
    with pytest.raises(CloudError, match="different zones") as raised:
        VolumeWork(ec2, patience=Clock().patience).ensure_attached(volume, REQUEST)
    assert "cloud.zone" in (raised.value.resolution or "")


@pytest.fixture
def tokens(client: Any) -> list[str]:
    """Give the tokens that volumes are asked for with."""
    tokens: list[str] = []
    client.meta.events.register(
        "provide-client-params.ec2.CreateVolume", lambda params, **_: tokens.append(params["ClientToken"])
    )
    return tokens


def test_asked_again_before_any_list_shows_it_the_token_is_the_same(ec2: Ec2, stub: Stubber, tokens: list[str]) -> None:
    made = []
    for _ in range(2):
        finds_none(stub)
        stub.add_response("create_volume", VOLUME | {"State": "creating"}, CREATE)
        describes(stub, "available", "available")
        made.append(VolumeWork(ec2, patience=Clock().patience).ensure_volume(REQUEST))
    assert made[0] == made[1]
    assert tokens[0] == tokens[1]


def test_a_spent_token_is_followed_by_the_next(ec2: Ec2, stub: Stubber, tokens: list[str]) -> None:
    finds_none(stub)
    stub.add_client_error("create_volume", "IdempotentParameterMismatch", expected_params=CREATE)
    stub.add_response("create_volume", VOLUME, CREATE)
    describes(stub, "available", "available")
    VolumeWork(ec2, patience=Clock().patience).ensure_volume(REQUEST)
    assert len(set(tokens)) == len(tokens) == 2
    assert all(len(token) <= 64 for token in tokens)


def test_a_snapshot_that_fails_halfway_is_told_with_the_clouds_words(ec2: Ec2, stub: Stubber) -> None:
    clock = Clock()
    mine = VOLUME | {"Tags": [{"Key": "machineuse.prepared", "Value": "true"}]}
    stub.add_response("describe_volumes", {"Volumes": [mine]}, FIND)
    stub.add_response("describe_snapshots", {"Snapshots": []}, {"OwnerIds": ["self"], "Filters": ANY})
    given = OURS | {"machineuse.urn": "urn", "machineuse.generation": "2", "machineuse.run": "r"}
    stub.add_response(
        "create_snapshot",
        SNAPSHOT,
        {
            "VolumeId": "vol-1",
            "Description": "unit/mu-1/2",
            "TagSpecifications": [{"ResourceType": "snapshot", "Tags": tags(given)}],
        },
    )
    stub.add_response("describe_snapshots", {"Snapshots": [SNAPSHOT]}, {"SnapshotIds": ["snap-1"]})
    failed = SNAPSHOT | {"State": "error", "StateMessage": "the key is disabled"}
    stub.add_response("describe_snapshots", {"Snapshots": [failed]}, {"SnapshotIds": ["snap-1"]})
    said: list[str] = []
    with pytest.raises(Exception, match="the key is disabled"):
        SnapshotWork(cloud=ec2, owner=OWNER, generation=2, patience=clock.patience).take(run="r", progress=said.append)
    assert said[-1] == "snapshot snap-1: 12%"
    assert SnapshotProgress(failed["State"]) is SnapshotProgress.ERROR
