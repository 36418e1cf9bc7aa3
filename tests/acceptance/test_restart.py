"""The service can be stopped or killed at any time: nothing is lost, and what was under way is finished."""

from __future__ import annotations

import shutil
import socket

import pytest

from tests.support.containers import execute
from tests.support.service import Service

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}


def test_a_stopped_service_finds_its_instances_again_untouched(service: Service) -> None:
    instance = service.create(config=SMALL)
    started_at = service.container(instance["id"]).attrs["State"]["StartedAt"]
    assert service.stop() == 0
    service.start()
    again = service.get(instance["id"])
    assert again["status"] == "running"
    assert again["debug_port"] == instance["debug_port"]
    assert service.container(instance["id"]).attrs["State"]["StartedAt"] == started_at


def test_a_create_under_way_is_finished_after_a_kill(service: Service) -> None:
    instance = service.create(wait_s=0, config=SMALL)
    assert instance["status"] == "creating"
    service.kill()
    service.start()
    assert service.wait_for(instance["id"], "running")["id"] == instance["id"]
    assert service.delete(instance["id"]).status_code == 200
    assert not any(instance["id"] in urn for urn in service.urns())


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_dormancy_under_way_is_finished_after_the_service_ends(service: Service, how: str) -> None:
    instance = service.create(config=SMALL)
    assert service.post(f"{instance['id']}/dormant", wait_s=0).json()["operation"] == "making_dormant"
    getattr(service, how)()
    service.start()
    assert service.wait_for(instance["id"], "dormant")["snapshots"][0]["state"] == "verified"
    revived = service.post(f"{instance['id']}/revive").json()
    assert revived["status"] == "running"
    assert service.post(f"{instance['id']}/dormant", wait_s=0).status_code == 200
    getattr(service, how)()
    service.start()
    service.wait_for(instance["id"], "dormant")


def test_a_delete_under_way_is_finished_after_a_kill(service: Service) -> None:
    instance = service.create(config=SMALL)
    service.delete(instance["id"], wait_s=0)
    service.kill()
    service.start()
    assert service.delete(instance["id"]).status_code in (200, 404)
    assert not any(instance["id"] in volume for volume in service.volumes())


def test_a_container_that_somebody_removed_is_made_again_with_its_home(service: Service) -> None:
    instance = service.create(config=SMALL)
    container = service.container(instance["id"])
    execute(container, "sh", "-c", "echo kept > /home/machine/note")
    container.remove(force=True)
    service.wait_for(instance["id"], "creating")
    service.wait_for(instance["id"], "running")
    assert execute(service.container(instance["id"]), "cat", "/home/machine/note") == "kept\n"


def test_a_container_that_could_not_be_made_again_at_first_is_made_later(service: Service) -> None:
    instance = service.create(config=SMALL)
    container = service.container(instance["id"])
    execute(container, "sh", "-c", "echo kept > /home/machine/note")
    container.remove(force=True)
    with socket.create_server(("127.0.0.1", instance["debug_port"])):
        service.wait_for(instance["id"], "creating", timeout_s=60)
        made = service.wait_for(instance["id"], "running", timeout_s=60)
    assert made["debug_port"] != instance["debug_port"]
    assert execute(service.container(instance["id"]), "cat", "/home/machine/note") == "kept\n"


def test_a_network_that_somebody_pruned_is_made_again(service: Service) -> None:
    for known in service.http.get("/v2/instances").json()["instances"]:
        service.delete(known["id"])
    service.docker.networks.get(service.network()).remove()
    assert service.create(config=SMALL)["status"] == "running"


def test_a_lost_pulumi_state_is_made_again_from_the_ledger(service: Service) -> None:
    plain, sleeper, woken = (service.create(config=SMALL) for _ in range(3))
    for instance in (sleeper, woken):
        assert service.post(f"{instance['id']}/dormant").json()["status"] == "dormant"
    assert service.post(f"{woken['id']}/revive").json()["status"] == "running"
    execute(service.container(woken["id"]), "sh", "-c", "echo kept > /home/machine/note")
    started_at = service.container(plain["id"]).attrs["State"]["StartedAt"]
    service.stop()
    shutil.rmtree(service.settings.state_dir)
    service.start()
    service.assert_unchanged()
    assert service.container(plain["id"]).attrs["State"]["StartedAt"] == started_at
    assert execute(service.container(woken["id"]), "cat", "/home/machine/note") == "kept\n"
    assert service.post(f"{sleeper['id']}/revive").json()["status"] == "running"
