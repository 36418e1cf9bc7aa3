"""Images on their way to nodes, and off them again: two real engines, one of which has what the other lacks."""

from __future__ import annotations

import io
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.images import find_image
from provisioner.docker_hosts.transfers import bring_image
from provisioner.errors import NodeUnreachable, UnknownImage
from provisioner.image_gc import ImageGc
from provisioner.image_supply import ImageSupply
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import NodeStatus, SnapshotRecord, SnapshotState
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.manifest import ImageIdentity, Manifest, Part, PartName, SnapshotId
from provisioner.snapshots.restore import restored_tag
from provisioner.states import Status
from stacks.names import LEDGER_LABEL
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.engines import Engine
from tests.support.records import make_record
from tests.support.tiny_image import make_tiny_image
from tests.support.watched import wait_until

MB = 10**6
HELPER = "machineuse-test-helper:latest"


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    with Engine(browser_image=False) as rich, Engine("tcp", browser_image=False) as poor:
        make_tiny_image(rich.client(), HELPER)
        yield rich, poor


@pytest.fixture
def hosts() -> Iterator[DockerHosts]:
    hosts = DockerHosts(timeout_s=2, slow_timeout_s=3)
    yield hosts
    hosts.close()


@pytest.fixture
def rich(engines: tuple[Engine, Engine], hosts: DockerHosts) -> DockerHost:
    return hosts.get(engines[0].url)


@pytest.fixture
def poor(engines: tuple[Engine, Engine], hosts: DockerHosts) -> DockerHost:
    return hosts.get(engines[1].url, cert_path=engines[1].cert_path)


def make_image(engine: Engine, *, megabytes: int = 0, name: str | None = None, **labels: str) -> str:
    """Make an image of random content on an engine; return its name."""
    name = name or f"machineuse-test-{secrets.token_hex(4)}:latest"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        entry = tarfile.TarInfo("content")
        entry.size = megabytes * MB + 16
        tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    changes = [f"LABEL {key}={value}" for key, value in labels.items()]
    repository, _, tag = name.rpartition(":")
    engine.client().api.import_image_from_data(
        content.getvalue(), repository=repository, tag=tag, changes=[*changes, 'CMD ["none"]']
    )
    return name


# ---- bringing


def test_an_image_is_copied_by_its_name_from_a_node_that_has_it(
    engines: tuple[Engine, Engine], rich: DockerHost, poor: DockerHost
) -> None:
    name = make_image(engines[0], megabytes=20)
    said: list[str] = []
    progress: list[str] = []
    brought = bring_image(poor, name, sources=[rich], say=said.append, report=progress.append)
    assert brought == find_image(rich, name)
    assert said == [f"copying {name} from {rich.url}, 20 MB"]  # built here: no registry was asked for it
    assert "MB copied" in progress[-1]
    assert bring_image(poor, name, sources=[rich], say=said.append) == brought
    assert len(said) == 1


def test_an_image_is_copied_by_its_id_and_gets_its_name_unless_that_is_another_ones(
    engines: tuple[Engine, Engine], rich: DockerHost, poor: DockerHost
) -> None:
    name = make_image(engines[0])
    first = find_image(rich, name)
    assert first is not None
    make_image(engines[0], name=name)
    second = find_image(rich, name)
    assert second is not None
    assert second.id != first.id
    bring_image(poor, second.id, tag=name, sources=[rich])
    bring_image(poor, first.id, tag=name, sources=[rich])
    assert find_image(poor, name) == second
    found = find_image(poor, first.id)
    assert found is not None
    assert found.id == first.id


def test_an_image_that_nobody_has_is_unknown_and_a_node_that_is_away_is_not_waited_for(
    engines: tuple[Engine, Engine], rich: DockerHost, poor: DockerHost, hosts: DockerHosts
) -> None:
    away = hosts.get("unix:///nowhere/docker.sock")
    name = make_image(engines[0])
    with pytest.raises(UnknownImage):
        bring_image(poor, "localhost:1/nobody/has-this:1", sources=[away, rich])
    with pytest.raises(UnknownImage, match="no other node that answers has it"):
        bring_image(poor, f"sha256:{secrets.token_hex(32)}", sources=[away, rich])
    assert bring_image(poor, name, sources=[away, rich]).id
    with pytest.raises(NodeUnreachable):
        bring_image(away, name, sources=[rich])


def test_who_comes_while_an_image_is_on_its_way_waits_for_it_and_says_so(
    engines: tuple[Engine, Engine], rich: DockerHost, poor: DockerHost
) -> None:
    name = make_image(engines[0])
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with poor.lock(f"image {name}"):
            second = pool.submit(bring_image, poor, name, sources=[rich], say=said.append)
            wait_until(lambda: said, what="it says that it waits")
            assert said == [f"waiting for {name}, which is on its way already"]
            assert not second.done()
        assert second.result(timeout=60) == find_image(poor, name)


@pytest.mark.parametrize("which", [0, 1])
def test_a_copy_that_a_silent_engine_interrupts_ends_and_is_made_again(
    engines: tuple[Engine, Engine], rich: DockerHost, poor: DockerHost, which: int
) -> None:
    name = make_image(engines[0], megabytes=100)
    frozen: list[str] = []
    rich, poor = (
        DockerHost(host.url, cert_path=cert_path, timeout_s=2, work_timeout_s=2, slow_timeout_s=3)
        for host, cert_path in ((rich, None), (poor, Path(engines[1].cert_path or "")))
    )

    def freeze(progress: str) -> None:
        if not frozen:
            frozen.append(progress)
            engines[which].freeze()

    try:
        with pytest.raises(NodeUnreachable):
            bring_image(poor, name, sources=[rich], report=freeze)
    finally:
        engines[which].thaw()
    assert frozen
    for host in (rich, poor):
        host.ping()
    assert bring_image(poor, name, sources=[rich]) == find_image(rich, name)


# ---- for a cluster


class Nodes:
    """A cluster of both engines over a real ledger, without a converger."""

    def __init__(self, directory: Path, engines: tuple[Engine, Engine], hosts: DockerHosts, **fields: Any) -> None:
        nodes = [NodeSpec.model_validate(engine.node(id)) for id, engine in zip(("rich", "poor"), engines, strict=True)]
        self.rich, self.poor = nodes
        self.hosts = hosts
        self.cluster = Cluster(ClusterSpec(name="test", nodes=tuple(nodes), images={}, helper_image=HELPER, **fields))
        self.ledger = Ledger.create(directory / "ledger.db")
        self.ledger.nodes.sync(nodes)
        for node in nodes:
            self.ledger.nodes.observe(node.id, values={"status": NodeStatus.ONLINE})
        self.store_root = directory / "snapshots"
        self.store = DirectoryStore(self.store_root)
        self.supply = ImageSupply(self.ledger, cluster=self.cluster, hosts=hosts)
        self.gc = ImageGc(self.ledger, cluster=self.cluster, hosts=hosts, store=self.store)

    def events(self, kind: str) -> list[tuple[str | None, str]]:
        return [(event.node_id, event.message) for event in self.ledger.events.list() if event.kind == kind]

    def has(self, name: str) -> bool:
        return find_image(self.hosts.of(self.poor), name) is not None


@pytest.fixture
def make_nodes(tmp_path: Path, engines: tuple[Engine, Engine], hosts: DockerHosts) -> Iterator[Callable[..., Nodes]]:
    made: list[Nodes] = []

    def make(**fields: Any) -> Nodes:
        made.append(Nodes(tmp_path, engines, hosts, **fields))
        return made[-1]

    yield make
    for nodes in made:
        nodes.ledger.close()


def test_what_is_brought_to_a_node_is_an_event(
    make_nodes: Callable[..., Nodes], engines: tuple[Engine, Engine]
) -> None:
    nodes = make_nodes()
    name = make_image(engines[0])
    nodes.supply.bring(nodes.poor, name)
    nodes.supply.bring(nodes.poor, name)
    assert nodes.events("copy") == [("poor", f"copying {name} from {engines[0].url}, 0 MB")]


def test_how_far_a_copy_is_can_be_seen_in_the_events_of_who_waits_for_it(
    make_nodes: Callable[..., Nodes], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("provisioner.image_supply.FIRST_WORD_S", 0.0)
    nodes = make_nodes()
    name = make_image(engines[0], megabytes=20)
    nodes.supply.bring(nodes.poor, name, instance_id="mu-waits")
    said = [event.message for event in nodes.ledger.events.list(instance_id="mu-waits") if event.kind == "copy"]
    assert said[0] == f"copying {name} from {engines[0].url}, 20 MB"
    assert said[1].endswith(f" of 20 MB copied of {name}")
    assert said[-1].endswith(f" MB copied, unpacking {name}")


def test_a_restore_elsewhere_gets_the_very_image_that_the_changes_were_made_on(
    make_nodes: Callable[..., Nodes], engines: tuple[Engine, Engine], rich: DockerHost
) -> None:
    nodes = make_nodes()
    name = make_image(engines[0])
    original = find_image(rich, name)
    assert original is not None
    make_image(engines[0], name=name)  # its name has moved on since
    manifest = make_manifest(ImageIdentity(reference=name, id=original.id), with_changes=True)
    nodes.supply.bring_for_restore(nodes.poor, manifest, image=name, instance_id="mu-test")
    assert nodes.has(original.id)
    assert nodes.has(HELPER)

    # The original is gone everywhere: then the one that has its name now.
    gone = make_manifest(ImageIdentity(reference=name, id=f"sha256:{secrets.token_hex(32)}"), with_changes=True)
    other = make_image(engines[0])
    nodes.supply.bring_for_restore(nodes.poor, gone, image=other, instance_id="mu-test")
    assert nodes.has(other)


def make_manifest(image: ImageIdentity, *, with_changes: bool, instance_id: str = "mu-test") -> Manifest:
    names = [PartName.HOME, *([PartName.ROOTFS] if with_changes else [])]
    return Manifest(
        instance_id=instance_id,
        cluster="test",
        generation=2,
        created_at=datetime.now(UTC),
        node_id="rich",
        image=image,
        home_path="/home/machine",
        stopped_cleanly=True,
        container_id="0" * 64,
        run_started_at=None,
        parts=tuple(Part(name=name, bytes=1, sha256="0" * 64, uncompressed_bytes=1, entries=1) for name in names),
        changed_paths=int(with_changes),
    )


# ---- removing


def test_what_nothing_needs_goes_oldest_first_until_the_rest_fits(
    make_nodes: Callable[..., Nodes], engines: tuple[Engine, Engine]
) -> None:
    nodes = make_nodes(image_cache_gb=0.025)
    oldest, older, newest = (make_image(engines[0], megabytes=10) for _ in range(3))
    theirs = make_image(engines[1], megabytes=10)  # an operator's own, on the same node
    for name in (older, oldest, newest):
        nodes.supply.bring(nodes.poor, name)
    nodes.supply.bring(nodes.poor, older)  # used again since
    nodes.ledger.node_images.note(node_id="poor", name=newest)
    nodes.gc.step()
    assert [nodes.has(name) for name in (oldest, older, newest, theirs)] == [False, True, True, True]
    assert nodes.events("image_removed") == [("poor", f"removed image {oldest} (10 MB): nothing needs it")]
    nodes.gc.step()
    assert len(nodes.events("image_removed")) == 1

    without_limit = nodes.cluster.spec.model_copy(update={"image_cache_gb": None})
    nodes.cluster.replace(without_limit)
    nodes.gc.step()
    assert nodes.has(older)


def test_what_an_instance_a_snapshot_a_container_or_the_catalogue_needs_stays(
    make_nodes: Callable[..., Nodes], engines: tuple[Engine, Engine], rich: DockerHost
) -> None:
    nodes = make_nodes(image_cache_gb=0)
    asleep, listed, run, based, unneeded = (make_image(engines[0]) for _ in range(5))
    for name in (HELPER, asleep, listed, run, unneeded):
        nodes.supply.bring(nodes.poor, name)
    base = find_image(rich, based)
    assert base is not None
    nodes.supply.bring(nodes.poor, base.id)
    spec = nodes.cluster.spec.model_copy(update={"images": {"browser": listed}})
    nodes.cluster.replace(spec)
    record = make_record(image=asleep, node_id="rich", status=Status.DORMANT, body=False, snapshot_generation=2)
    nodes.ledger.instances.create(lambda _: (record, "made by a test"))
    nodes.ledger.instances.change(record.id, lambda *_: _with_snapshot(2))
    keep_manifest(nodes, make_manifest(ImageIdentity(reference=based, id=base.id), with_changes=True))
    container = engines[1].client().containers.create(run)
    restored = [make_restored(engines[1], nodes, generation) for generation in (1, 2)]

    nodes.gc.step()
    assert [nodes.has(name) for name in (HELPER, asleep, listed, run, base.id)] == [True] * 5
    assert not nodes.has(unneeded)
    assert [nodes.has(name) for name in restored] == [False, True]  # of the first one, the snapshot is gone
    container.remove()
    nodes.gc.step()
    assert not nodes.has(run)


def test_nothing_is_removed_while_a_snapshot_can_not_be_asked_for_its_image(
    make_nodes: Callable[..., Nodes], engines: tuple[Engine, Engine]
) -> None:
    nodes = make_nodes(image_cache_gb=0)
    name = make_image(engines[0])
    nodes.supply.bring(nodes.poor, name)
    record = make_record(status=Status.DORMANT, body=False, snapshot_generation=2)
    nodes.ledger.instances.create(lambda _: (record, "made by a test"))
    nodes.ledger.instances.change(record.id, lambda *_: _with_snapshot(2))
    manifest = keep_manifest(nodes, make_manifest(ImageIdentity(reference="x", id="sha256:x"), with_changes=False))
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{")
    nodes.gc.step()
    assert nodes.has(name)
    manifest.write_bytes(whole)
    nodes.gc.step()
    assert not nodes.has(name)


def _with_snapshot(generation: int) -> Update:
    snapshot = SnapshotRecord(
        instance_id="mu-test",
        generation=generation,
        node_id="rich",
        state=SnapshotState.VERIFIED,
        bytes=1,
        created_at=1.0,
    )
    return Update(put_snapshots=(snapshot,))


def keep_manifest(nodes: Nodes, manifest: Manifest) -> Path:
    """Put a manifest where the snapshot store looks for it; return its path."""
    path = nodes.store_root / str(manifest.id) / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(manifest.to_json())
    return path


def make_restored(engine: Engine, nodes: Nodes, generation: int) -> str:
    """Make an image as a restore of the test's instance makes them."""
    tag = restored_tag(SnapshotId(instance_id="mu-test", generation=generation))
    return make_image(engine, name=tag, **{LEDGER_LABEL: nodes.ledger.id})
