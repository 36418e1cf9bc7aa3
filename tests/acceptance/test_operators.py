"""What an operator does beside the service: previews and updates of the same stack, from the right and wrong places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from provisioner.clusterfile import load
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}


def said(done: object) -> str:
    return f"{getattr(done, 'stdout', '')}{getattr(done, 'stderr', '')}"


@pytest.mark.parametrize("running", [True, False])
def test_a_preview_of_an_untouched_cluster_shows_no_changes(
    start_service: Callable[..., Service], running: bool
) -> None:
    service = start_service()
    service.create(config=SMALL)
    sleeper = service.create(config=SMALL)
    assert service.post(f"{sleeper['id']}/dormant").json()["status"] == "dormant"
    woken = service.create(config=SMALL)
    service.post(f"{woken['id']}/dormant")
    assert service.post(f"{woken['id']}/revive").json()["status"] == "running"
    if not running:
        service.stop()
    service.assert_unchanged()
    service.assert_unchanged("--refresh")


def test_an_operators_update_and_the_service_wait_for_each_other(service: Service) -> None:
    instance = service.create(config=SMALL)
    done = service.pulumi("up", "--yes", "--skip-preview", "--stack", service.cluster)
    assert done.returncode == 0, said(done)
    assert service.get(instance["id"])["status"] == "running"
    assert service.create(config=SMALL)["status"] == "running"


def test_what_was_changed_behind_the_stacks_back_shows_as_drift(service: Service) -> None:
    instance = service.create(config=SMALL)
    service.container(instance["id"]).update(mem_limit="300m", memswap_limit="300m")
    done = service.pulumi("preview", "--stack", service.cluster, "--refresh", "--diff")
    assert "memory" in said(done)
    assert done.returncode == 0, said(done)


def test_ports_that_two_nodes_would_share_are_refused_by_preview_command_and_service(service: Service) -> None:
    path = service.project / f"Pulumi.{service.cluster}.yaml"
    before = path.read_text()
    document = load(before, file="x")
    (node,) = document["config"]["cluster:nodes"]
    document["config"]["cluster:nodes"].append({**node, "id": "twin", "host": "unix:///nobody.sock"})
    ports = "{first}-{last}".format(**node["ports"])
    wrong = f"node 'twin': its ports {ports} overlap those of node 'local', {ports}, at the same address 127.0.0.1"
    path.write_text(json.dumps(document))
    try:
        done = service.pulumi("preview", "--stack", service.cluster)
        assert done.returncode != 0
        assert f"{path.name}: {wrong}" in said(done)
        done = service.machineuse("node", "cordon", "local")
        assert done.returncode == 1
        assert wrong in done.stderr
        wait_until(lambda: wrong in service.log(), what="the service has looked at the file")
        assert service.delete(service.create(config=SMALL)["id"]).status_code == 200
    finally:
        path.write_text(before)


def test_without_the_clusters_ledger_a_preview_refuses_and_says_what_to_set(service: Service, tmp_path: Path) -> None:
    service.create(config=SMALL)
    done = service.pulumi("preview", "--stack", service.cluster, MACHINEUSE_DATA_DIR=str(tmp_path / "elsewhere"))
    assert done.returncode != 0
    assert "MACHINEUSE_DATA_DIR" in said(done)
    assert "delete" not in done.stdout


def test_with_another_ledger_an_update_refuses_and_deletes_nothing(service: Service, tmp_path: Path) -> None:
    from provisioner.ledger import Ledger

    instance = service.create(config=SMALL)
    Ledger.create(tmp_path / "other" / "ledger.db").close()
    done = service.pulumi(
        "up", "--yes", "--skip-preview", "--stack", service.cluster, MACHINEUSE_DATA_DIR=str(tmp_path / "other")
    )
    assert done.returncode != 0
    assert "MACHINEUSE_DATA_DIR" in said(done)
    assert service.get(instance["id"])["status"] == "running"
    assert service.container(instance["id"]).status == "running"


def test_a_stack_of_another_cluster_is_not_given_what_is_in_this_one_s_ledger(service: Service) -> None:
    service.create(config=SMALL)
    assert service.pulumi("stack", "init", "another", "--no-select").returncode == 0
    done = service.pulumi("preview", "--stack", "another")
    assert done.returncode != 0
    assert f"that of cluster '{service.cluster}', and this is cluster 'another'" in said(done)


def test_the_plugins_refuse_to_destroy_what_is_wanted_alive(service: Service) -> None:
    instance = service.create(config=SMALL)
    done = service.pulumi("destroy", "--yes", "--skip-preview", "--stack", service.cluster, "--continue-on-error")
    assert done.returncode != 0
    assert instance["id"] in said(done)
    assert "no verified snapshot" in said(done)
    assert service.container(instance["id"]).status == "running"
    assert any(instance["id"] in volume for volume in service.volumes())
