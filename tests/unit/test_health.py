"""When a node counts as offline, with an engine that answers as the test wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from provisioner import health
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.errors import NodeUnreachable
from provisioner.health import NodeHealth
from provisioner.ledger.records import NodeRecord, NodeStatus
from provisioner.settings import Settings
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.world import empty_ledger

INFO = {
    "NCPU": 4,
    "MemTotal": 8 * 2**30,
    "DockerRootDir": "/nonexistent",
    "Architecture": "aarch64",
    "OSType": "linux",
}


class FakeHosts:
    """One engine, a virtual machine's, that answers or not."""

    def __init__(self) -> None:
        self.up = True
        self.hung_up: list[str] = []

    def of(self, _node: NodeSpec) -> FakeHosts:
        return self

    def ping(self) -> None:
        if not self.up:
            raise NodeUnreachable("The engine does not answer.", resolution="Start it.")

    def info(self) -> dict[str, Any]:
        return INFO

    def hang_up(self, *, only_work: bool) -> None:
        self.hung_up.append("updates" if only_work else "all")


class Scene:
    def __init__(self, directory: Path) -> None:
        self.ledger = empty_ledger(directory)
        self.cluster = Cluster(ClusterSpec(name="test", nodes=(NodeSpec(id="local"),)))
        self.ledger.nodes.sync(self.cluster.nodes)
        self.hosts = FakeHosts()
        self.changes = Changes()
        self.probes: list[str] = []
        self.health = NodeHealth(
            self.ledger,
            cluster=self.cluster,
            hosts=self.hosts,  # type: ignore[arg-type]
            settings=Settings(project_dir=directory),
            changes=self.changes,
        )

    def beat(self, *, up: bool) -> NodeRecord:
        self.hosts.up = up
        self.health.beat_once()
        return self.ledger.nodes.get("local")

    def kinds(self) -> list[str]:
        return [event.kind for event in self.ledger.events.list()]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene(tmp_path)

    def probe(*_: object, **__: object) -> bool:
        scene.probes.append("probe")
        return True

    monkeypatch.setattr(health, "can_limit_volumes", probe)
    yield scene
    scene.health.close()
    scene.ledger.close()


def test_a_node_is_online_with_its_first_answer(scene: Scene) -> None:
    node = scene.beat(up=True)
    assert node.status is NodeStatus.ONLINE
    assert (node.cpu_cores, node.memory_bytes, node.disk_quota) == (4, 8 * 2**30, True)
    assert node.disk_percent is None, "a heartbeat does not tell the disk of another machine"
    assert scene.changes.work.is_set()


def test_a_node_is_labelled_by_its_engine_unless_the_file_says_otherwise(scene: Scene) -> None:
    assert scene.beat(up=True).labels == {"arch": "arm64", "os": "linux"}
    scene.cluster.replace(ClusterSpec(name="test", nodes=(NodeSpec(id="local", labels={"os": "mine", "zone": "1"}),)))
    assert scene.beat(up=True).labels == {"arch": "arm64", "os": "mine", "zone": "1"}


def test_a_node_is_offline_after_several_misses_in_a_row(scene: Scene) -> None:
    seen = [scene.beat(up=up).status for up in (True, False, False, True, False, False, False, False, True)]
    online, offline = NodeStatus.ONLINE, NodeStatus.OFFLINE
    assert seen == [online] * 6 + [offline] * 2 + [online]
    assert scene.kinds() == ["node_online", "node_offline", "node_online"]
    # Updates do not wait for it from the first miss on; at the last one nobody does.
    assert scene.hosts.hung_up == ["updates", "updates", "updates", "updates", "all"]


def test_a_miss_is_told_at_once_and_the_last_heartbeat_is_kept(scene: Scene) -> None:
    before = scene.beat(up=True)
    after = scene.beat(up=False)
    assert after.error == "The engine does not answer. Start it."
    assert after.last_heartbeat == before.last_heartbeat
    assert scene.beat(up=True).error is None


def test_a_node_that_never_answered_is_offline_without_an_event(scene: Scene) -> None:
    assert scene.beat(up=False).status is NodeStatus.OFFLINE
    assert scene.kinds() == []


def test_the_storage_is_probed_once_a_connection(scene: Scene) -> None:
    for up in (True, True, False, True, True):
        scene.beat(up=up)
    assert len(scene.probes) == 2
