"""Images for another architecture than a node's: two real engines, and images that only say to be for it."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.docker_hosts import transfers
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.images import find_image, find_platform
from provisioner.docker_hosts.transfers import bring_image
from provisioner.errors import UnknownImage
from provisioner.plugins.machineuse.node_image import NodeImageType
from provisioner.plugins.policy import RefuseWithoutLedger
from provisioner.plugins.resources import Call
from provisioner.plugins.sessions import Session
from tests.integration.test_node_images import Nodes
from tests.support.engines import Engine

FOREIGN = "riscv64"
EMULATING = {"labels": {"arch": FOREIGN}}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    with Engine(browser_image=False) as rich, Engine(browser_image=False) as poor:
        yield rich, poor


@pytest.fixture
def nodes(tmp_path: Path, engines: tuple[Engine, Engine]) -> Iterator[Nodes]:
    hosts = DockerHosts(timeout_s=2, slow_timeout_s=3)
    nodes = Nodes(tmp_path, engines, hosts)
    yield nodes
    nodes.ledger.close()
    hosts.close()


def load_foreign_image(engine: Engine, *, name: str | None = None) -> str:
    """Load an image that says to be for another architecture; return its name."""
    name = name or f"machineuse-test-{secrets.token_hex(4)}:latest"
    layer = io.BytesIO()
    tarfile.open(fileobj=layer, mode="w").close()
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": FOREIGN,
        "os": "linux",
        "config": {"Cmd": ["none"], "Labels": {"test": name}},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    parts = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": layer.getvalue(),
        "manifest.json": json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode(),
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in parts.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    engine.client().images.load(archive.getvalue())
    return name


def test_an_image_for_another_architecture_is_not_copied_and_the_error_says_whose_it_is(
    engines: tuple[Engine, Engine], nodes: Nodes
) -> None:
    name = load_foreign_image(engines[0])
    rich, poor = nodes.hosts.of(nodes.rich), nodes.hosts.of(nodes.poor)
    own = find_platform(poor)
    with pytest.raises(UnknownImage) as caught:
        nodes.supply.bring(nodes.poor, name)
    assert caught.value.message == (
        f"The image {name} that {rich.url} has is for linux/{FOREIGN}, and the engine at {poor.url} runs {own}."
    )
    assert f"Build or load the image for {own} there" in caught.value.explain()
    assert f"`labels: {{arch: {FOREIGN}}}`" in caught.value.explain()
    assert not nodes.has(name)
    assert nodes.events("copy") == []

    nodes.supply.bring(nodes.poor.model_copy(update=EMULATING), name)
    assert nodes.has(name)


def test_one_that_is_on_the_node_already_is_refused_unless_the_file_says_that_it_runs_there(
    engines: tuple[Engine, Engine], nodes: Nodes
) -> None:
    name = load_foreign_image(engines[1])
    with pytest.raises(UnknownImage, match=f"The image {name} on .* is for linux/{FOREIGN}, and the engine at "):
        nodes.supply.bring(nodes.poor, name)
    nodes.supply.bring(nodes.poor.model_copy(update=EMULATING), name)
    assert nodes.has(name)


def test_the_stack_is_not_told_of_one_either(engines: tuple[Engine, Engine], nodes: Nodes) -> None:
    name = load_foreign_image(engines[0])
    kind = NodeImageType(hosts=nodes.hosts, policy=RefuseWithoutLedger())
    call = Call(urn="urn", name="name", config={}, session=Session(""))
    sources = [{"dockerHost": engines[0].url}]
    inputs = {"nodeId": "poor", "dockerHost": engines[1].url, "image": name, "sources": sources}
    with pytest.raises(UnknownImage, match=f"is for linux/{FOREIGN}"):
        kind.create(call, inputs=inputs)
    created = kind.create(call, inputs=inputs | {"emulated": FOREIGN})
    assert nodes.has(name)
    assert created.outputs["imageId"]


def test_what_a_registry_has_for_another_architecture_only_is_not_kept(
    engines: tuple[Engine, Engine], nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pull(_: DockerHost, name: str, *, report: object) -> None:
        del report
        load_foreign_image(engines[1], name=name)

    monkeypatch.setattr(transfers, "pull_image", pull)
    name = "registry.example/machineuse-test:1"
    with pytest.raises(UnknownImage, match=f"The image {name} on .* is for linux/{FOREIGN}"):
        bring_image(nodes.hosts.of(nodes.poor), name)
    assert find_image(nodes.hosts.of(nodes.poor), name) is None
