"""The catalogue's images on nodes that joined later; the ledger is real, nodes and engine only listen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from provisioner.cluster import Cluster
from provisioner.engine import UpdateResult
from provisioner.errors import EngineError, MachineuseError, NodeUnreachable, UnknownImage
from provisioner.ledger.records import NodeStatus
from provisioner.prepull import Prepull, note_images
from stacks.spec import BROWSER_IMAGE, ClusterSpec, NodeSpec
from tests.support.world import empty_ledger

URN = "urn:pulumi:x::machineuse::machineuse:index:NodeImage::"
A, B = NodeSpec(id="a", host="unix:///nobody/a"), NodeSpec(id="b", host="unix:///nobody/b")


class Scene:
    """Brings what it is told to, and does every update at once, unless something is to fail."""

    def __init__(self, directory: Path) -> None:
        self.ledger = empty_ledger(directory)
        self.cluster = Cluster(ClusterSpec(name="x", nodes=(A,)))
        self.brought: list[tuple[str, str]] = []
        self.updates: list[list[str]] = []
        self.refuses: dict[str, MachineuseError] = {}
        self.fails = False
        self.prepull = Prepull(self.ledger, cluster=self.cluster, supply=self)
        self.prepull.use(self)  # type: ignore[arg-type]
        self.have(A)
        note_images(self.ledger, UpdateResult(outputs={f"{URN}a-image-{BROWSER_IMAGE}": {}}))

    def have(self, *nodes: NodeSpec, online: Sequence[NodeSpec] | None = None, **fields: Any) -> None:
        self.ledger.nodes.sync(nodes)
        for node in nodes if online is None else online:
            self.ledger.nodes.observe(node.id, values={"status": NodeStatus.ONLINE})
        self.cluster.replace(ClusterSpec(name="x", nodes=nodes, **fields))

    def bring(self, node: NodeSpec, image: str) -> None:
        if (error := self.refuses.get(image)) is not None:
            raise error
        self.brought.append((node.id, image))

    def update(self, program: Any, *, targets: Sequence[str]) -> UpdateResult:
        del program
        self.updates.append([target.rpartition("::")[2] for target in targets])
        if self.fails:
            raise EngineError("The Pulumi engine failed.")
        return UpdateResult(
            outputs={urn: {} for urn in targets if "*" not in urn},
            deleted=frozenset(urn.replace("*", "e") for urn in targets if "*" in urn),
        )

    def look(self, times: int = 3) -> None:
        """Take some steps, taking no notice of how long a node, or the stack, should be left alone."""
        for _ in range(times):
            self.prepull._retries.clear()
            self.prepull._next_update.forget()
            self.prepull.step()

    def events(self) -> list[str]:
        return [event.message for event in self.ledger.events.list() if event.kind == "image_missing"]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.ledger.close()


def test_what_the_stack_has_already_costs_nothing(scene: Scene) -> None:
    scene.look()
    assert (scene.brought, scene.updates) == ([], [])


def test_a_new_node_gets_the_images_and_then_the_stack_knows(scene: Scene) -> None:
    scene.have(A, B)
    scene.look()
    assert scene.brought == [("b", BROWSER_IMAGE)]
    assert scene.updates == [[f"b-image-{BROWSER_IMAGE}"]]


def test_a_node_that_is_away_is_waited_for(scene: Scene) -> None:
    scene.have(A, B, online=[A])
    scene.look()
    assert scene.updates == []
    scene.have(A, B)
    scene.look()
    assert scene.updates == [[f"b-image-{BROWSER_IMAGE}"]]


def test_what_the_catalogue_names_anew_comes_and_what_it_names_no_more_leaves_the_stack(scene: Scene) -> None:
    scene.have(A, images={"one": "one:1"})
    scene.look()
    scene.have(A, images={"two": "two:2"})
    scene.look()
    scene.have(A)
    scene.look()
    assert scene.brought == [("a", "one:1"), ("a", "two:2")]
    assert scene.updates == [["a-image-one:1"], ["a-image-two:2", "a-image-one:1"], ["a-image-two:2"]]


def test_the_images_of_a_node_that_is_gone_leave_the_stack(scene: Scene) -> None:
    scene.have(A, B)
    scene.look()
    scene.have(A)
    scene.look()
    assert scene.updates[1:] == [[f"b-image-{BROWSER_IMAGE}"]]


def test_an_image_that_nobody_has_is_told_of_once_and_keeps_no_other_away(scene: Scene) -> None:
    scene.refuses = {"absent:1": UnknownImage("There is no such image.")}
    scene.have(A, B, images={"absent": "absent:1"})
    scene.look()
    assert scene.updates == [[f"b-image-{BROWSER_IMAGE}"]]
    assert scene.events() == [
        f"node {node} could not be given the image absent:1: There is no such image." for node in ("a", "b")
    ]
    scene.refuses = {}
    scene.look()
    assert scene.updates[1:] == [["a-image-absent:1", "b-image-absent:1"]]


def test_a_stack_that_can_not_be_told_is_not_told_again_at_once(scene: Scene) -> None:
    scene.fails = True
    scene.have(A, B)
    with pytest.raises(EngineError):
        scene.prepull.step()
    scene.prepull.step()
    assert len(scene.updates) == 1
    scene.fails = False
    scene.look()
    assert len(scene.updates) == 2


def test_after_a_failure_a_node_is_left_alone_for_a_while(scene: Scene) -> None:
    scene.refuses = {BROWSER_IMAGE: NodeUnreachable("It does not answer.")}
    scene.have(A, B)
    scene.prepull.step()
    scene.refuses = {}
    scene.prepull.step()
    assert scene.updates == []
    assert scene.events() == []  # the heartbeats tell of that
    scene.look()
    assert scene.updates == [[f"b-image-{BROWSER_IMAGE}"]]


def test_an_update_that_failed_is_made_again(scene: Scene) -> None:
    scene.have(A, B)
    scene.fails = True
    with pytest.raises(EngineError):
        scene.prepull.step()
    scene.fails = False
    scene.look()
    assert scene.updates == [[f"b-image-{BROWSER_IMAGE}"]] * 2
