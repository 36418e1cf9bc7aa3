"""Whatever goes round the nodes takes no more threads than it is given, however many nodes there are."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from provisioner import disk
from provisioner.cluster import Cluster
from provisioner.disk import DiskWatch
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.health import MOST_NODES_AT_ONCE
from provisioner.ledger.records import NodeStatus
from provisioner.metrics import Sampler
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger

COUNT = MOST_NODES_AT_ONCE + 20


class Doors:
    """Counts who is inside at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self.most = 0
        self.visits = 0

    def visit(self) -> None:
        with self._lock:
            self._inside += 1
            self.visits += 1
            self.most = max(self.most, self._inside)
        time.sleep(0.1)
        with self._lock:
            self._inside -= 1


@pytest.mark.parametrize(("kind", "method"), [(Sampler, "_sample"), (DiskWatch, "_measure")])
def test_many_nodes_are_not_all_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any], method: str
) -> None:
    nodes = tuple(NodeSpec(id=f"n{number}", host=f"unix:///{number}") for number in range(COUNT))
    ledger, doors = empty_ledger(tmp_path), Doors()
    ledger.nodes.sync(nodes)
    for node in nodes:
        ledger.nodes.observe(node.id, values={"status": NodeStatus.ONLINE})
        record = make_record(id=f"mu-{node.id}", node_id=node.id)
        ledger.instances.create(lambda _, record=record: (record, "test"))  # type: ignore[misc]

    def visit(*_: object, **__: object) -> dict[str, int]:
        doors.visit()
        return {}

    monkeypatch.setattr(disk, "up_browsers", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(kind, method, visit)
    kind(ledger, cluster=Cluster(ClusterSpec(name="unit", nodes=nodes)), hosts=DockerHosts()).step()
    ledger.close()
    assert doors.visits == COUNT
    assert doors.most <= MOST_NODES_AT_ONCE
