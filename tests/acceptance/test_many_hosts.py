"""One cluster of three machines, each reached in another way: everything works on each of them.

The machines are real engines with networks of their own; the service talks to them by a Unix socket, by TCP with client
certificates, and by SSH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from stacks.spec import BROWSER_IMAGE
from tests.support.browsing import version_of
from tests.support.containers import execute
from tests.support.engines import Engine
from tests.support.service import Service
from tests.support.shell_image import shell_image

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
T = TypeVar("T")
NODES = ("near", "secured", "remote")


@pytest.fixture(scope="module")
def engines() -> Iterator[Mapping[str, Engine]]:
    with Engine() as near, Engine("tcp") as secured, Engine("ssh") as remote:
        yield {"near": near, "secured": secured, "remote": remote}


@pytest.fixture(scope="module")
def shells(engines: Mapping[str, Engine]) -> Iterator[tuple[str, str]]:
    """Give the names of two images that were built on one machine, and that no registry knows."""
    with shell_image(engines["near"].client()) as listed, shell_image(engines["near"].client()) as unlisted:
        yield listed, unlisted


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service], engines: Mapping[str, Engine], shells: tuple[str, str]) -> Service:
    return start_service(
        images={"ubuntu:22.04": BROWSER_IMAGE, "shell": shells[0]},
        nodes=[engine.node(node_id) for node_id, engine in engines.items()],
        heartbeat_s=0.3,
        node_timeout_s=2,
        offline_after_misses=2,
    )


def on_each(do: Callable[[str], T]) -> list[T]:
    """Do something for all nodes at once, as many callers would; return what came of it, in the nodes' order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(do, NODES))


def container_of(instance: Mapping[str, Any], engine: Engine) -> Any:
    (container,) = engine.client().containers.list(filters={"name": instance["id"]})
    return container


def traces_of(engine: Engine, service: Service, *, kind: str = "containers volumes") -> list[str]:
    """Return the names of the containers and volumes that the engine has of the service."""
    client = engine.client()
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    containers = client.containers.list(all=True, filters=mine, ignore_removed=True) if "containers" in kind else []
    volumes = client.volumes.list(filters=mine) if "volumes" in kind else []
    return [thing.name for thing in (*containers, *volumes)]


def test_an_instance_lives_on_each_machine_and_leaves_nothing_there(
    service: Service, engines: Mapping[str, Engine]
) -> None:
    nodes = service.http.get("/v2/nodes").json()["nodes"]
    assert [(node["id"], node["status"], node["error"]) for node in nodes] == [
        (node_id, "online", None) for node_id in sorted(NODES)
    ]
    created = dict(zip(NODES, on_each(lambda node: service.create(config=SMALL, node_preference=node)), strict=True))
    for node_id, instance in created.items():
        engine = engines[node_id]
        assert instance["node_id"] == node_id
        assert engine.address in instance["urls"]["debug"]
        assert "Chrome" in version_of(instance)["Browser"]
        container = container_of(instance, engine)
        execute(container, "sh", "-c", f"echo {node_id} > /home/machine/note")
        execute(container, "touch", "/opt/changed", user="0")

    for slept in on_each(lambda node: service.post(f"{created[node]['id']}/dormant").json()):
        assert slept["status"] == "dormant"
        assert traces_of(engines[slept["node_id"]], service, kind="containers") == []
    methods = dict(zip(NODES, ("quick_start", "full_restore", "quick_start"), strict=True))
    for woken in on_each(lambda node: service.post(f"{created[node]['id']}/revive", method=methods[node]).json()):
        engine = engines[woken["node_id"]]
        assert (woken["status"], woken["id"]) == ("running", created[woken["node_id"]]["id"])
        assert "Chrome" in version_of(woken)["Browser"]
        container = container_of(woken, engine)
        assert execute(container, "cat", "/home/machine/note") == f"{woken['node_id']}\n"
        execute(container, "ls", "/opt/changed")

    for refresh in ((), ("--refresh",)):
        service.assert_unchanged(*refresh)
    for deleted in on_each(lambda node: service.delete(created[node]["id"])):
        assert "is deleted" in deleted.json()["message"]
    assert [traces_of(engine, service) for engine in engines.values()] == [[], [], []]


def test_images_come_to_a_machine_before_instances_do(
    service: Service, engines: Mapping[str, Engine], shells: tuple[str, str]
) -> None:
    listed, unlisted = shells
    pulled = {urn.rpartition("::")[2] for urn in service.urns() if "NodeImage" in urn}
    assert pulled == {f"{node}-image-{image}" for node in NODES for image in (BROWSER_IMAGE, listed)}
    for node_id in NODES:
        engine = engines[node_id].client()
        assert engine.images.get(listed).id == engines["near"].client().images.get(listed).id
        assert (engine.images.list(unlisted) != []) == (node_id == "near")

    created = service.create(image=unlisted, config=SMALL, node_preference="secured")
    assert (created["status"], created["node_id"]) == ("running", "secured")
    assert engines["secured"].client().images.list(unlisted) != []
    assert service.delete(created["id"]).status_code == 200


def test_a_machine_that_is_cut_off_is_offline_and_harms_no_other(
    service: Service, engines: Mapping[str, Engine]
) -> None:
    engines["secured"].unplug()
    engines["remote"].unplug()
    try:
        for node_id in ("secured", "remote"):
            assert "does not answer" in service.wait_for_node(node_id, "offline")["error"]
        created = service.create(config=SMALL)
        assert (created["status"], created["node_id"]) == ("running", "near")
        assert service.delete(created["id"]).status_code == 200
    finally:
        engines["secured"].plug()
        engines["remote"].plug()
    for node_id in ("secured", "remote"):
        assert service.wait_for_node(node_id, "online")["error"] is None


def test_a_node_that_does_not_let_us_in_says_why(
    start_service: Callable[..., Service], engines: Mapping[str, Engine]
) -> None:
    secured, remote = engines["secured"], engines["remote"]
    stranger = engines["near"].authority.issue(secured.log_path.parent / "stranger")
    (stranger / "ca.pem").write_bytes((secured.log_path.parent / "client" / "ca.pem").read_bytes())
    unknown = ["UserKnownHostsFile=none" if "KnownHosts" in word else word for word in remote.ssh_opts]
    expected = {
        "bare": ({"host": secured.url}, "it wants TLS, and the node has no cert_path"),
        "stranger": ({"host": secured.url, "cert_path": str(stranger)}, "it refuses our client certificate"),
        "lost": ({"host": secured.url, "cert_path": "nowhere"}, "ca.pem can't be read"),
        "unknown": ({"host": remote.url, "ssh_opts": unknown}, "its SSH host key is not known here"),
        "locked": ({"host": remote.url.replace("root@", "nobody@"), "ssh_opts": [*remote.ssh_opts]}, "not let in"),
    }
    for together in (("bare", "unknown"), ("stranger", "locked"), ("lost",)):  # no two at one host or address
        nodes = [{"id": node_id, **expected[node_id][0]} for node_id in together]
        service = start_service(nodes=nodes, heartbeat_s=0.3, node_timeout_s=2)
        assert "could not be applied" not in service.log()  # nothing of theirs is in the first update
        listed = service.machineuse("node", "list").stdout.splitlines()
        for node_id in together:
            node = service.node(node_id)
            assert node["status"] == "offline"
            assert expected[node_id][1] in node["error"]
            assert f"{node_id}: {node['error']}" in listed
