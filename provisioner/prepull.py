"""Brings the catalogue's images to nodes that joined while the service runs, or that lack what the catalogue now names.

A full update (`pulumi up`, the first one of a service) brings them too, but holds the stack while it does. Here they
are brought first, beside everything else; then one update that names just their resources lets the stack know, and a
preview has nothing to add. What the stack has by now is a fact in the ledger: a crash costs a look at the nodes, and an
update that finds all done. An instance that comes to a node earlier brings its image itself.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection
from typing import Protocol

import structlog

from provisioner.cluster import Cluster
from provisioner.engine import Engine, UpdateResult
from provisioner.errors import MachineuseError, NodeUnreachable
from provisioner.ledger import Ledger
from provisioner.outcomes import error_of
from provisioner.retry import Retry
from stacks.cluster import declare
from stacks.names import NODE_IMAGE_TYPE, Names, node_if_there, node_image_name
from stacks.spec import ClusterSpec, NodeSpec

log = structlog.get_logger(__name__)

IN_STACK = "images_in_the_stack"
"""The ledger's fact that names the images' resources which the stack has."""
LOOK_EVERY_S = 2.0
FIRST_PAUSE_S = 10.0
MAX_PAUSE_S = 600.0
"""How long at most a node is left alone after an image could not be brought to it."""
MAX_UPDATE_PAUSE_S = 60.0
"""How long at most the stack is left alone after it could not be told: each try holds it, and everybody waits."""
ENOUGH_S = 1.0
"""After a node that took longer, the stack is told of what is there before the next one has its turn."""


class Supply(Protocol):
    """What brings an image to a node."""

    def bring(self, node: NodeSpec, image: str) -> None:
        """Return once the node has the image. Raises UnknownImage and NodeUnreachable."""


class Prepull:
    """Keeps one cluster's nodes, and the stack, at what the catalogue names."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, supply: Supply) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._supply = supply
        self._names = Names(cluster.name)
        self._engine: Engine | None = None
        self._retries: defaultdict[str, Retry] = defaultdict(
            lambda: Retry(first_s=FIRST_PAUSE_S, longest_s=MAX_PAUSE_S)
        )
        """When each node is tried again."""
        self._next_update = Retry(first_s=LOOK_EVERY_S, longest_s=MAX_UPDATE_PAUSE_S)
        self._told: set[tuple[str, str, str]] = set()

    def use(self, engine: Engine) -> None:
        """Tell the stack by this engine; before, there is nothing to do."""
        self._engine = engine

    def step(self) -> None:
        """Bring what is missing to the nodes that answer, and let the stack know. Raises EngineError."""
        if self._engine is None or not self._next_update.is_due():
            return
        spec = self._cluster.spec
        known = _in_stack(self._ledger)
        brought = self._bring(spec, known=known)
        stale = known - {node_image_name(node.id, image) for node in spec.nodes for image in spec.wanted_images}
        if brought or stale:
            self._tell_stack(self._engine, spec, brought=brought, stale=stale)

    def _bring(self, spec: ClusterSpec, *, known: Collection[str]) -> dict[str, NodeSpec]:
        """Return the names of what nodes have by now, and the stack does not know of."""
        brought: dict[str, NodeSpec] = {}
        online = self._ledger.nodes.online()
        began = time.monotonic()
        for node in spec.nodes:
            if node.id not in online or not self._retries[node.id].is_due():
                continue
            for image in spec.wanted_images:
                name = node_image_name(node.id, image)
                if name not in known and self._bring_one(node, image):
                    brought[name] = node
            if time.monotonic() - began > ENOUGH_S:
                break
        return brought

    def _bring_one(self, node: NodeSpec, image: str) -> bool:
        try:
            self._supply.bring(node, image)
        except MachineuseError as error:
            self._retries[node.id].put_off()
            log.warning("image not brought", node=node.id, image=image, error=error.message, detail=error.detail)
            if not isinstance(error, NodeUnreachable):  # of which the heartbeats tell
                self._tell(node, image, why=error.explain())
            return False
        return True

    def _tell_stack(
        self, engine: Engine, spec: ClusterSpec, *, brought: dict[str, NodeSpec], stale: Collection[str]
    ) -> None:
        async def program() -> None:
            await declare(spec, ledger_id=self._ledger.id, instances=(), claim=False, images=True)

        urns = {name: self._names.urn(NODE_IMAGE_TYPE, name) for name in {*brought, *stale}}
        targets = [*(urns[name] for name in sorted(brought)), *(node_if_there(urns[name]) for name in sorted(stale))]
        self._next_update.put_off()
        result = engine.update(program, targets=targets)  # raises EngineError into the loop's log, and is tried again
        note_images(self._ledger, result)
        for urn, words in result.errors.items():
            log.warning("the stack was not told of an image", urn=urn or None, error=error_of(words).message)
        for name, node in brought.items():
            if urns[name] in result.outputs:
                self._retries[node.id].forget()
            else:
                self._retries[node.id].put_off()
        if not result.errors:
            self._next_update.forget()
            _write(self._ledger, _in_stack(self._ledger) - set(stale))  # what the stack did not have either

    def _tell(self, node: NodeSpec, image: str, *, why: str) -> None:
        if (node.id, image, why) not in self._told:
            self._told.add((node.id, image, why))
            message = f"node {node.id} could not be given the image {image}: {why}"
            self._ledger.events.add("image_missing", message=message, node_id=node.id)


def note_images(ledger: Ledger, result: UpdateResult) -> None:
    """Note which images' resources the stack has after an update."""
    kind = f"::{NODE_IMAGE_TYPE}::"
    there = {urn.partition(kind)[2] for urn in result.outputs if kind in urn}
    gone = {urn.partition(kind)[2] for urn in result.deleted if kind in urn}
    before = _in_stack(ledger)
    if (now := (before - gone) | there) != before:
        _write(ledger, now)


def _in_stack(ledger: Ledger) -> set[str]:
    return set(json.loads(ledger.fact(IN_STACK) or "[]"))


def _write(ledger: Ledger, names: Collection[str]) -> None:
    ledger.write_fact(IN_STACK, json.dumps(sorted(names)))
