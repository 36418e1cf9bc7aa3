"""Nodes come and go while the service runs: by `machineuse node`, by hand, and for good.

The second node is another engine, on a machine of its own. Some tests leave it in the cluster for the next ones, until
one drains it and takes it away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from provisioner.clusterfile import load
from provisioner.ledger import Ledger
from stacks.names import CLUSTER_LABEL
from stacks.spec import BROWSER_IMAGE
from tests.support.engine_proxy import EngineProxy
from tests.support.engines import Engine
from tests.support.service import Service
from tests.support.watched import wait_until as until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
B = "b"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    return start_service(heartbeat_s=0.5, node_timeout_s=2, offline_after_misses=2)


@pytest.fixture
def node_b(service: Service, engine: Engine) -> str:
    """Give the second node, added by the command unless it is there."""
    if B not in nodes_of(service):
        add_b(service, engine)
    return B


def add_b(service: Service, engine: Engine) -> None:
    done = run(service, "add", B, "--host", engine.url, "--address", engine.address, "--bind-ip", engine.bind_ip)
    assert "Its engine answers" in done
    assert "within seconds" in done
    until(lambda: nodes_of(service).get(B) == "online")


def run(service: Service, *arguments: str) -> str:
    done = service.machineuse("node", *arguments, COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(service: Service, *arguments: str) -> str:
    done = service.machineuse("node", *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stderr.splitlines()
    assert said[0].startswith("machineuse: ")
    assert len(said) == 1, done.stderr
    return said[0]


def nodes_of(service: Service) -> dict[str, str]:
    answer = service.http.get("/v2/nodes")
    assert answer.status_code == 200, answer.text
    return {node["id"]: node["status"] for node in answer.json()["nodes"]}


def file_of(service: Service) -> Path:
    return service.project / f"Pulumi.{service.cluster}.yaml"


def events_of(service: Service) -> list[tuple[str, str]]:
    ledger = Ledger.open(service.settings.ledger_location)
    try:
        return [(event.kind, event.message) for event in ledger.events.list(limit=1000)]
    finally:
        ledger.close()


def urns_of_b(service: Service) -> set[str]:
    return names_in_stack(service) & {f"node-{B}", f"{B}-network"}


def names_in_stack(service: Service) -> set[str]:
    return {urn.rpartition("::")[2] for urn in service.urns()}


def volumes_of(service: Service, engine: Engine) -> list[str]:
    found = engine.client().volumes.list(filters={"label": f"{CLUSTER_LABEL}={service.cluster}"})
    return [volume.name for volume in found]


def on_b(service: Service) -> dict[str, Any]:
    instance = service.create(config=SMALL, node_preference=B)
    assert instance["node_id"] == B
    return instance


def test_dormant_instances_outlive_their_node(service: Service, engine: Engine) -> None:
    before = file_of(service).read_bytes()
    add_b(service, engine)
    assert urns_of_b(service) == {f"node-{B}", f"{B}-network"}
    woken, deleted = on_b(service)["id"], on_b(service)["id"]
    for instance_id in (woken, deleted):
        assert service.post(f"{instance_id}/dormant").json()["status"] == "dormant"
    assert len(volumes_of(service, engine)) == 2
    assert "2 dormant instance(s) slept there" in run(service, "remove", B)
    assert file_of(service).read_bytes() == before
    until(lambda: nodes_of(service) == {"local": "online"})
    until(lambda: not urns_of_b(service))
    until(lambda: not volumes_of(service, engine))
    engine.freeze()  # nobody needs it any more
    try:
        asleep = service.get(woken)
        assert (asleep["status"], asleep["node_status"]) == ("dormant", "offline")
        service.assert_unchanged()
        revived = service.post(f"{woken}/revive").json()
        assert (revived["status"], revived["node_id"]) == ("running", "local")
        assert revived["restored_by"] == "full_restore"
        assert "no copy" in revived["restore_note"]
        for instance_id in (woken, deleted):
            assert service.delete(instance_id).status_code == 200
            assert not (service.settings.snapshots_dir / instance_id).exists()
    finally:
        engine.thaw()
    assert {kind for kind, _ in events_of(service)} >= {"node_added", "node_removed"}


def test_a_cordoned_node_gets_nothing_new_and_keeps_what_it_has(service: Service, node_b: str) -> None:
    resident = on_b(service)
    assert "cordoned" in run(service, "cordon", node_b)
    until(lambda: ("node_changed", "node b: availability is cordoned") in events_of(service))
    other = service.create(config=SMALL, node_preference=node_b)
    assert other["node_id"] == "local"
    assert service.get(resident["id"])["status"] == "running"
    row = next(line for line in run(service, "list").splitlines() if line.startswith(f"{B} "))
    assert "online" in row
    assert "cordoned" in row
    assert "1 running" in row
    assert "as before" in run(service, "cordon", node_b)
    run(service, "cordon", "local")
    until(lambda: ("node_changed", "node local: availability is cordoned") in events_of(service))
    answer = service.http.post("/v2/instances", json={"config": SMALL})
    assert answer.status_code == 503, answer.text
    assert "cordoned" in answer.text
    for node_id in (node_b, "local"):
        run(service, "uncordon", node_id)
    until(lambda: service.http.post("/v2/instances", json={"config": SMALL}).status_code == 201)
    for instance in service.http.get("/v2/instances").json()["instances"]:
        service.delete(instance["id"])


def test_a_node_with_instances_that_is_taken_out_by_hand_stays(service: Service, node_b: str) -> None:
    resident = on_b(service)["id"]
    before = file_of(service).read_text()
    document = load(before, file="x")
    del document["config"]["cluster:nodes"][1]
    file_of(service).write_text(json.dumps(document))
    until(lambda: any("does not name node 'b' any more" in message for _, message in events_of(service)))
    assert nodes_of(service)[node_b] == "online"
    assert service.get(resident)["status"] == "running"
    done = service.pulumi("preview", "--stack", service.cluster)
    assert done.returncode != 0
    assert "does not name" in done.stdout + done.stderr
    assert "not in the file" in run(service, "list")
    file_of(service).write_text(before)
    until(lambda: "the cluster's file is as before" in service.log())
    service.delete(resident)


@pytest.mark.usefixtures("node_b")
def test_a_nodes_host_may_change_to_another_way_to_the_same_engine_only(service: Service, engine: Engine) -> None:
    resident = on_b(service)["id"]
    before = file_of(service).read_text()
    file_of(service).write_text(before.replace(engine.url, "unix:///run/docker.sock"))
    until(lambda: any("that engine does not have their homes" in message for _, message in events_of(service)))
    assert service.get(resident)["status"] == "running"
    with EngineProxy(str(engine.socket)) as proxy:
        file_of(service).write_text(before.replace(engine.url, proxy.url))
        until(lambda: any(f"host is {proxy.url}" in message for _, message in events_of(service)))
        until(lambda: proxy.url in service.pulumi("stack", "export", "--stack", service.cluster).stdout)
        service.assert_unchanged()
        assert service.get(resident)["status"] == "running"
        file_of(service).write_text(before)
        until(lambda: f"host is {engine.url}" in events_of(service)[-1][1])
    service.delete(resident)


@pytest.mark.usefixtures("node_b")
def test_an_engine_that_is_a_node_already_is_no_other_node_too(service: Service, engine: Engine) -> None:
    before = file_of(service).read_text()
    with EngineProxy(str(engine.socket)) as proxy:
        said = refused(service, "add", "twin", "--host", proxy.url, "--address", "twin.example")
        assert f"Node 'twin' is not added: behind {proxy.url} is the engine of node 'b'." in said
        document = load(before, file="x")
        document["config"]["cluster:nodes"].append({"id": "twin", "host": proxy.url, "address": "twin.example"})
        file_of(service).write_text(json.dumps(document))
        until(lambda: any("is the engine of node 'b'" in message for _, message in events_of(service)))
        assert set(nodes_of(service)) == {"local", "b"}
        file_of(service).write_text(before)


def test_a_new_node_gets_the_catalogues_images_and_no_node_leaves_anything_to_preview(service: Service) -> None:
    with Engine("tcp", browser_image=False) as bare:
        arguments = ("add", "bare", "--host", bare.url, "--bind-ip", bare.bind_ip)
        assert "Node 'bare' is not added" in (said := refused(service, *arguments))
        assert "it wants TLS, and the node has no cert_path" in said
        run(service, *arguments, "--cert-path", str(bare.cert_path))
        until(lambda: f"bare-image-{BROWSER_IMAGE}" in names_in_stack(service), timeout_s=180)
        assert bare.client().images.list(BROWSER_IMAGE)
        service.assert_unchanged()
        copied = [message for kind, message in events_of(service) if kind == "copy" and BROWSER_IMAGE in message]
        assert copied[0].startswith(f"copying {BROWSER_IMAGE} from ")
        assert any(" MB copied of " in message for message in copied)
        for command in ("cordon", "uncordon"):
            run(service, command, "bare")
            until(lambda: events_of(service)[-1][0] == "node_changed")
            service.assert_unchanged()
        run(service, "remove", "bare")
        until(lambda: not any("bare" in name for name in names_in_stack(service)))
        service.assert_unchanged()


def test_a_node_with_instances_is_drained_before_it_is_removed(service: Service, node_b: str) -> None:
    moved = on_b(service)["id"]
    said = refused(service, "remove", node_b)
    assert "1 running" in said
    assert f"machineuse node drain {node_b}" in said
    said = run(service, "drain", node_b)
    assert f"{moved} has left" in said
    assert "Node b is empty." in said
    assert service.wait_for(moved, "running")["node_id"] == "local"
    assert "is empty" in run(service, "drain", node_b)
    run(service, "remove", node_b)
    until(lambda: not urns_of_b(service))
    service.delete(moved)


def test_an_operators_update_of_an_edited_file_and_the_services_own_agree(service: Service, engine: Engine) -> None:
    document = load(file_of(service).read_text(), file="x")
    ports = {"first": 21000, "last": 21099}
    document["config"]["cluster:nodes"].append(engine.node(B, ports=ports))
    before = file_of(service).read_text()
    file_of(service).write_text(json.dumps(document))
    done = service.pulumi("up", "--yes", "--skip-preview", "--stack", service.cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: nodes_of(service).get(B) == "online")
    instance = on_b(service)
    service.assert_unchanged()
    service.delete(instance["id"])
    file_of(service).write_text(before)
    done = service.pulumi("up", "--yes", "--skip-preview", "--stack", service.cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: B not in nodes_of(service))
    assert not urns_of_b(service)


def test_a_broken_file_changes_nothing_and_is_told_of_once(service: Service) -> None:
    good = file_of(service).read_text()
    file_of(service).write_text(good.replace('"ports"', '"prots"'))
    until(lambda: any("'prots' is unknown" in message for _, message in events_of(service)))
    created = service.create(config=SMALL)
    file_of(service).write_text(good)
    service.delete(created["id"])
    told = [message for kind, message in events_of(service) if kind == "cluster_file_refused" and "prots" in message]
    assert len(told) == 1
    assert "line 1: node 'local': 'prots' is unknown" in told[0]
    assert nodes_of(service) == {"local": "online"}


def test_what_add_refuses(service: Service, tmp_path: Path) -> None:
    assert "There is a node 'local' already" in refused(
        service, "add", "local", "--host", "ssh://root@h", "--bind-ip", "::"
    )
    assert "has the host" in refused(service, "add", "c", "--host", "unix:///var/run/docker.sock")
    assert "does not answer" in refused(service, "add", "c", "--host", f"unix://{tmp_path}/nobody.sock")
    assert "--bind-ip" in refused(service, "add", "c", "--host", "tcp://10.0.0.1:2376")
    assert "node 'C': id: " in refused(service, "add", "C", "--host", "unix:///x", "--unchecked")
    assert "--ports" in refused(service, "add", "c", "--host", "unix:///x", "--ports", "all")
    assert "--label" in refused(service, "add", "c", "--host", "unix:///x", "--label", "zone")
    assert "last node" in refused(service, "remove", "local")
    assert "no node 'c'" in refused(service, "drain", "c")
    assert "no node 'c'" in refused(service, "remove", "c")
    assert nodes_of(service) == {"local": "online"}


def test_without_a_service_a_node_is_added_and_removed_too(service: Service, engine: Engine) -> None:
    before = file_of(service).read_bytes()
    service.stop()
    try:
        # The service's last heartbeat is too recent to tell; what is promised holds either way.
        run(service, "add", B, "--host", engine.url, "--address", engine.address, "--bind-ip", engine.bind_ip)
        assert "not seen yet" in run(service, "list")
        done = service.pulumi("up", "--yes", "--skip-preview", "--stack", service.cluster)
        assert done.returncode == 0, done.stdout + done.stderr
        assert urns_of_b(service) == {f"node-{B}", f"{B}-network"}
        run(service, "remove", B)
        assert file_of(service).read_bytes() == before
    finally:
        service.start()
    assert not urns_of_b(service)
    assert nodes_of(service) == {"local": "online"}


def test_a_node_that_is_gone_for_good_is_given_up(service: Service, engine: Engine) -> None:
    """The last test here: the second engine does not come back."""
    add_b(service, engine)
    kept, lost = on_b(service)["id"], on_b(service)["id"]
    assert service.post(f"{kept}/dormant").json()["status"] == "dormant"
    assert service.post(f"{kept}/revive").json()["node_id"] == B
    engine.kill()
    until(lambda: nodes_of(service)[B] == "offline")
    asked = service.machineuse("node", "remove", B, "--force")
    assert asked.returncode == 1
    assert f"{lost} is LOST" in asked.stdout
    assert f"{kept} is kept" in asked.stdout
    assert B in nodes_of(service)
    assert "stays on its disk" in run(service, "remove", B, "--force", "--yes")
    service.wait_for(kept, "dormant")
    until(lambda: service.http.get(f"/v2/instances/{lost}").status_code == 404)
    until(lambda: nodes_of(service) == {"local": "online"})
    until(lambda: not urns_of_b(service))
    woken = service.post(f"{kept}/revive").json()
    assert (woken["status"], woken["node_id"]) == ("running", "local")
    service.delete(kept)
