"""What a look through the images of a node costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from provisioner import image_gc
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.images import ListedImage
from provisioner.image_gc import ImageGc
from provisioner.ledger.records import NodeStatus
from provisioner.snapshots.directory import DirectoryStore
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.world import empty_ledger


@pytest.mark.parametrize(("mb", "looks"), [(500, 0), (1500, 1)])
def test_all_instances_are_looked_at_only_where_a_node_has_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mb: int, looks: int
) -> None:
    cluster = ClusterSpec(name="unit", nodes=(NodeSpec(id="a"),), image_cache_gb=1.0)
    names = [*cluster.wanted_images, "old:1"]
    ledger, done, removed = empty_ledger(tmp_path), [], []
    ledger.nodes.sync(cluster.nodes)
    ledger.nodes.observe("a", values={"status": NodeStatus.ONLINE})
    for name in names:
        ledger.node_images.note(node_id="a", name=name)
    images = [
        ListedImage(id=f"sha256:{name}", names=(name,), labels={}, bytes=mb * 10**6, created_at=1.0, in_use=False)
        for name in names
    ]

    def remove_image(_: DockerHost, name: str) -> bool:
        removed.append(name)
        return True

    monkeypatch.setattr(image_gc, "list_images", lambda _: images)
    monkeypatch.setattr(image_gc, "remove_image", remove_image)
    monkeypatch.setattr(ledger.instances, "all", lambda: done.append("a look") or [])
    store = DirectoryStore(tmp_path / "snapshots")
    ImageGc(ledger, cluster=Cluster(cluster), hosts=DockerHosts(), store=store).step()
    assert (len(done), removed) == (looks, ["old:1"] * looks)
    ledger.close()
