"""How full a node's disk is, asked of a real engine on another machine."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeRecord, NodeStatus
from provisioner.node_disk import NodeDisks
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.engines import Engine


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.create(tmp_path / "ledger.db")
    yield ledger
    ledger.close()


def measure(ledger: Ledger, engine: Engine) -> NodeRecord:
    """Measure the disk of a cluster's one node; return the node, once it is seen that nothing is left there."""
    spec = ClusterSpec(name=f"t{secrets.token_hex(4)}", nodes=(NodeSpec.model_validate(engine.node("far")),))
    ledger.nodes.sync(spec.nodes)
    ledger.nodes.observe("far", values={"status": NodeStatus.ONLINE})
    hosts = DockerHosts(timeout_s=5)
    try:
        NodeDisks(ledger, cluster=Cluster(spec), hosts=hosts).step()
    finally:
        hosts.close()
    assert engine.client().containers.list(all=True) == []
    return ledger.nodes.get("far")


def test_a_node_elsewhere_tells_its_disk(ledger: Ledger) -> None:
    with Engine("tcp") as engine:
        node = measure(ledger, engine)
        usage = shutil.disk_usage(engine.log_path.parent)
    assert node.disk_bytes == pytest.approx(usage.total, rel=0.01)
    assert node.disk_percent == pytest.approx(100 * usage.used / usage.total, abs=2)


def test_a_node_without_the_helpers_image_is_measured_once_it_has_it(ledger: Ledger) -> None:
    with Engine("tcp", browser_image=False) as engine:
        node = measure(ledger, engine)
    assert (node.disk_bytes, node.disk_percent) == (None, None)
