"""An instance whose home is a cloud volume, from its creation to its end: a real service, Docker and browser.

AWS is an emulator; what it attaches are loop devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.test_revive import READ, WRITE
from tests.conftest import StartService
from tests.support.browsing import new_page
from tests.support.ebs import KEYS, Emulator, LoopDisks, can_attach
from tests.support.service import ENGINE, Service
from tests.support.watched import wait_until as until

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not can_attach(), reason="needs root and loop devices")

SMALL = {"memory_gb": 0.5, "cpu_cores": 1, "disk_gb": 0.6}
PAGE = "http://127.0.0.1:9222/json/version"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    emulator = Emulator()
    yield emulator
    emulator.stop()


@pytest.fixture(scope="module")
def disks(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopDisks]:
    disks = LoopDisks(emulator, tmp_path_factory.mktemp("disks"))
    disks.start()
    yield disks
    disks.stop()


@pytest.fixture(scope="module")
def cloudy(start_service: StartService, emulator: Emulator, disks: LoopDisks) -> Iterator[Service]:
    """Give a service whose node is a machine in the emulator's zone a."""
    assert disks
    machine = emulator.run_machine("us-east-1a")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        yield start_service(
            node=node_in("us-east-1a", machine), ec2_endpoint=emulator.endpoint, cloud_check_s=3, heartbeat_s=1
        )


def node_in(zone: str, machine: str) -> dict[str, Any]:
    return {"volume": "ebs", "cloud": {"instance_id": machine, "zone": zone}}


def volumes_of(emulator: Emulator, service: Service) -> list[Any]:
    return emulator.client().describe_volumes(Filters=_mine(service))["Volumes"]


def snapshots_of(emulator: Emulator, service: Service) -> list[Any]:
    return emulator.client().describe_snapshots(OwnerIds=["self"], Filters=_mine(service))["Snapshots"]


def _mine(service: Service) -> Any:
    return [{"Name": "tag:machineuse.cluster", "Values": [service.cluster]}]


def run_in(service: Service, instance: dict[str, Any], script: str, *, user: str = "1000") -> tuple[int, str]:
    code, output = service.container(instance["id"]).exec_run(["sh", "-c", script], user=user)
    return code, output.decode()


def test_a_life_on_a_cloud_volume(cloudy: Service, emulator: Emulator, disks: LoopDisks) -> None:
    instance = cloudy.create(config=SMALL)
    (volume,) = volumes_of(emulator, cloudy)
    tags = {tag["Key"]: tag["Value"] for tag in volume["Tags"]}
    assert (volume["Size"], volume["AvailabilityZone"], volume["Encrypted"]) == (1, "us-east-1a", True)
    assert tags["machineuse.instance"] == instance["id"]
    assert instance["disk_enforced"]
    code, mounted = run_in(cloudy, instance, "findmnt -n -o SOURCE,FSTYPE /home/machine || mount | grep /home/machine")
    assert code == 0
    assert volume["VolumeId"].replace("-", "") in mounted or disks.devices[volume["VolumeId"]] in mounted

    # disk_gb is a limit, for the browser's user and for root
    code, said = run_in(cloudy, instance, "head -c 1200M /dev/zero > ~/fill; code=$?; rm ~/fill; exit $code")
    assert code != 0
    assert "No space left on device" in said

    with new_page(instance) as page:
        page.goto(PAGE)
        page.evaluate("document.cookie = 'visit=first; max-age=86400'")
        page.evaluate(WRITE)
    assert run_in(cloudy, instance, "echo kept > ~/notes; echo above > /var/tmp/above")[0] == 0

    # asleep: a snapshot is all there is, and all that is paid for
    assert cloudy.post(f"{instance['id']}/dormant").json()["status"] == "dormant"
    assert volumes_of(emulator, cloudy) == []
    assert cloudy.volumes() == []
    (snapshot,) = snapshots_of(emulator, cloudy)
    assert snapshot["VolumeId"] == volume["VolumeId"]
    until(lambda: not disks.devices)

    # awake, in another zone
    cloudy.stop()
    elsewhere = emulator.run_machine("us-east-1b")
    moved = {"id": "local", "host": ENGINE, "address": "127.0.0.1", **node_in("us-east-1b", elsewhere)}
    cloudy.write_cluster_file([moved])
    cloudy.start()
    revived = cloudy.post(f"{instance['id']}/revive").json()
    assert revived["status"] == "running", revived
    (second,) = volumes_of(emulator, cloudy)
    assert (second["AvailabilityZone"], second["SnapshotId"]) == ("us-east-1b", snapshot["SnapshotId"])
    assert second["VolumeId"] != volume["VolumeId"]
    with new_page(revived) as page:
        page.goto(PAGE)
        assert page.evaluate("document.cookie") == "visit=first"
        assert page.evaluate(READ) == {"localStorage": "first", "indexedDB": "first"}
    assert run_in(cloudy, revived, "cat ~/notes /var/tmp/above") == (0, "kept\nabove\n")

    # what an operator sees is what is wanted
    cloudy.assert_unchanged("--refresh")

    # its browser's container lost: made again around the same volume
    cloudy.container(instance["id"]).remove(force=True)
    until(lambda: cloudy.get(instance["id"])["operation"] == "repairing")
    cloudy.wait_for(instance["id"], "running")
    until(lambda: cloudy.get(instance["id"])["operation"] is None)
    assert [v["VolumeId"] for v in volumes_of(emulator, cloudy)] == [second["VolumeId"]]
    assert run_in(cloudy, revived, "cat ~/notes") == (0, "kept\n")

    # a second sleep takes the place of the first
    assert cloudy.post(f"{instance['id']}/dormant").json()["status"] == "dormant"
    (newer,) = snapshots_of(emulator, cloudy)
    assert newer["SnapshotId"] != snapshot["SnapshotId"]

    assert cloudy.delete(instance["id"]).status_code == 200
    assert (volumes_of(emulator, cloudy), snapshots_of(emulator, cloudy)) == ([], [])
    until(lambda: not disks.devices)
    assert disks.held() == []
    assert disks.failures == []
    assert cloudy.urns() == [urn for urn in cloudy.urns() if instance["id"] not in urn]


def test_a_running_instance_is_deleted_with_its_volume(cloudy: Service, emulator: Emulator, disks: LoopDisks) -> None:
    instance = cloudy.create(config=SMALL)
    assert len(volumes_of(emulator, cloudy)) == 1
    assert cloudy.delete(instance["id"], force=True).status_code == 200
    assert volumes_of(emulator, cloudy) == []
    until(lambda: not disks.devices)
    assert disks.failures == []


def test_a_service_that_is_killed_goes_on_with_the_same_volume_and_snapshot(
    cloudy: Service, emulator: Emulator, disks: LoopDisks
) -> None:
    answer = cloudy.http.post("/v2/instances", json={"config": SMALL}, headers={"Prefer": "wait=0"})
    instance = answer.json()
    until(lambda: len(volumes_of(emulator, cloudy)) == 1)
    cloudy.kill()
    (volume,) = volumes_of(emulator, cloudy)
    cloudy.start()
    cloudy.wait_for(instance["id"], "running")
    assert [v["VolumeId"] for v in volumes_of(emulator, cloudy)] == [volume["VolumeId"]]
    assert run_in(cloudy, instance, "echo kept > ~/notes")[0] == 0

    cloudy.post(f"{instance['id']}/dormant", wait_s=0)
    until(lambda: len(snapshots_of(emulator, cloudy)) == 1)
    cloudy.kill()
    (snapshot,) = snapshots_of(emulator, cloudy)
    cloudy.start()
    cloudy.wait_for(instance["id"], "dormant")
    assert [s["SnapshotId"] for s in snapshots_of(emulator, cloudy)] == [snapshot["SnapshotId"]]
    assert volumes_of(emulator, cloudy) == []

    cloudy.post(f"{instance['id']}/revive", wait_s=0)
    until(lambda: len(volumes_of(emulator, cloudy)) == 1)
    cloudy.kill()
    (second,) = volumes_of(emulator, cloudy)
    cloudy.start()
    cloudy.wait_for(instance["id"], "running")
    assert [v["VolumeId"] for v in volumes_of(emulator, cloudy)] == [second["VolumeId"]] != [volume["VolumeId"]]
    assert run_in(cloudy, instance, "cat ~/notes") == (0, "kept\n")

    cloudy.delete(instance["id"], wait_s=0)
    until(lambda: not any(v["Attachments"] for v in volumes_of(emulator, cloudy)))
    cloudy.kill()
    cloudy.start()
    until(lambda: cloudy.http.get(f"/v2/instances/{instance['id']}").status_code == 404)
    assert (volumes_of(emulator, cloudy), snapshots_of(emulator, cloudy)) == ([], [])
    until(lambda: not disks.devices)
    assert disks.failures == []


def test_what_no_instance_needs_is_removed_and_what_is_strange_is_kept(cloudy: Service, emulator: Emulator) -> None:
    instance = cloudy.create(config=SMALL)
    (volume,) = volumes_of(emulator, cloudy)
    tags = {tag["Key"]: tag["Value"] for tag in volume["Tags"]}
    client = emulator.client()

    def left(instance_id: str) -> str:
        given = [{"Key": key, "Value": value} for key, value in {**tags, "machineuse.instance": instance_id}.items()]
        made = client.create_volume(
            AvailabilityZone="us-east-1a",
            Size=1,
            TagSpecifications=[{"ResourceType": "volume", "Tags": given}],  # type: ignore[typeddict-item]
        )
        return made["VolumeId"]

    strange = left("mu-stranger")
    assert cloudy.delete(instance["id"]).status_code == 200
    orphan = left(instance["id"])
    try:
        until(lambda: [v["VolumeId"] for v in volumes_of(emulator, cloudy)] == [strange])
        assert orphan != strange
    finally:
        client.delete_volume(VolumeId=strange)
