"""Nothing is believed at first sight, and a look at a node costs what is there, however large the cluster is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from provisioner import repair as module
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.inventory import ListedContainer
from provisioner.ledger.records import NodeStatus
from provisioner.repair import Repair, Sightings
from stacks.names import Names
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger


def test_a_thing_is_told_from_its_second_sighting_in_a_row_on() -> None:
    sightings = Sightings()
    assert sightings.see(["a", "b"]) == []
    assert sightings.see(["a", "c"]) == ["a"]
    assert sightings.see(["a", "b"]) == ["a"]
    assert sightings.see(["b", "c"]) == ["b"]


def test_the_same_instance_in_another_generation_is_another_thing() -> None:
    sightings = Sightings()
    sightings.see([("mu-a", 1)])
    assert sightings.see([("mu-a", 2)]) == []


def test_a_look_at_a_node_is_about_the_instances_of_that_node_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, names = empty_ledger(tmp_path), Names("unit")
    nodes = tuple(NodeSpec(id=name, host=f"unix:///{name}") for name in "ab")
    ledger.nodes.sync(nodes)
    for node in nodes:
        ledger.nodes.observe(node.id, values={"status": NodeStatus.ONLINE})
    for instance_id, node_id in (("mu-here", "a"), ("mu-away", "b")):
        ledger.instances.create(lambda _, i=instance_id, n=node_id: (make_record(id=i, node_id=n), "test"))  # type: ignore[misc]
    there = [
        ListedContainer(id=i, name=names.docker_container(i), instance_id=i, state="paused", status="Up (Paused)")
        for i in ("mu-here", "mu-away", "mu-gone")
    ]
    ledger.events.add("deleted", message="it is deleted", instance_id="mu-gone")
    done: list[tuple[str, str]] = []

    def note(what: str) -> Any:
        return lambda _host, name, **_: done.append((what, name))

    def list_containers(host: Any, **_: Any) -> list[ListedContainer]:
        return there if host.url == "unix:///a" else [there[1]]

    monkeypatch.setattr(module, "list_containers", list_containers)
    monkeypatch.setattr(module, "list_volumes", lambda *_, **__: [])
    monkeypatch.setattr(module, "remove_container", note("removed"))
    monkeypatch.setattr(module, "resume_container", note("resumed"))
    monkeypatch.setattr(ledger.instances, "all", lambda: pytest.fail("every instance was read, for one node"))
    repair = Repair(
        ledger,
        cluster=Cluster(ClusterSpec(name="unit", nodes=nodes)),
        hosts=DockerHosts(),
        changes=Changes(),
    )
    repair.step()
    assert done == []
    repair.step()
    repair.close()
    ledger.close()
    assert sorted(done) == [
        ("removed", names.docker_container("mu-gone")),
        ("resumed", names.docker_container("mu-away")),
        ("resumed", names.docker_container("mu-here")),
    ]
