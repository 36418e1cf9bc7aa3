"""Removes images that nothing needs any more, where the cluster's file limits what they may take up on a node.

What is removed are images that are ours to remove: brought to the node by the service (also when a newer one has taken
their name since), or built for an instance of this ledger that has gone on. Needed, and never removed, is
what an instance in any state, a snapshot, the catalogue or the helper containers may ask for, on whatever node, and
what any container on the node was made from. Where that can't be known for certain, nothing is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.images import ListedImage, list_images, remove_image
from provisioner.errors import DockerError, MachineuseError, SnapshotMissing
from provisioner.ledger import Ledger
from provisioner.snapshots.machine import RESTORED_REPOSITORY
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.restore import restored_tag
from provisioner.snapshots.store import SnapshotStore
from stacks.names import LEDGER_LABEL
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

GB = 10**9


@dataclass(frozen=True, slots=True)
class Needed:
    """What must stay on every node."""

    names: frozenset[str]
    ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Candidate:
    image: ListedImage
    name: str
    """What is removed: a name, or the id of an image without one."""
    used_at: float
    at_once: bool
    """Whether it is of no use to anybody, ever."""


class ImageGc:
    """Keeps each node's unused images within the cluster's budget."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts, store: SnapshotStore) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._store = store
        self._bases: dict[SnapshotId, str] = {}
        """On which image a snapshot was taken, by id: manifests never change."""

    def step(self) -> None:
        """Look at every node that is online, once."""
        budget_gb = self._cluster.spec.image_cache_gb
        if budget_gb is None:
            return
        online = self._ledger.nodes.online()
        for node in self._cluster.nodes:
            if node.id not in online:
                continue
            try:
                self._collect(node, budget_bytes=int(budget_gb * GB))
            except MachineuseError as error:
                log.warning("images not looked through", node=node.id, error=error.message)

    def _collect(self, node: NodeSpec, *, budget_bytes: int) -> None:
        host = self._hosts.of(node)
        images = list_images(host)
        catalogue = Needed(names=frozenset(map(_full, self._cluster.spec.wanted_images)), ids=frozenset())
        if not self._choose(node, images, needed=catalogue, budget_bytes=budget_bytes):
            return  # nor with all that is needed, which takes a look at every instance of the cluster
        needed = self._needed()  # after the list: what came since is not in it
        for candidate in self._choose(node, images, needed=needed, budget_bytes=budget_bytes):
            self._remove(host, node, candidate)

    def _choose(
        self, node: NodeSpec, images: list[ListedImage], *, needed: Needed, budget_bytes: int
    ) -> list[_Candidate]:
        """Return what is to be removed for the budget to hold; the less is needed, the more that is."""
        candidates = list(self._candidates(node, images, needed=needed))
        spent = sum(candidate.image.bytes for candidate in candidates)
        chosen: list[_Candidate] = []
        for candidate in sorted(candidates, key=lambda candidate: (not candidate.at_once, candidate.used_at)):
            if not candidate.at_once and spent <= budget_bytes:
                break
            spent -= candidate.image.bytes
            chosen.append(candidate)
        return chosen

    def _needed(self) -> Needed:
        """Return what must stay; raises SnapshotFailed when the snapshot store can't be asked."""
        records = self._ledger.instances.all()
        names = set(self._cluster.spec.wanted_images)
        bases: dict[SnapshotId, str] = {}
        for record in records:
            names.add(record.image)
            generations = {snapshot.generation for snapshot in record.snapshots} | {record.restore_generation}
            for generation in generations - {None}:
                assert generation is not None
                snapshot = SnapshotId(instance_id=record.id, generation=generation)
                names.add(restored_tag(snapshot))
                bases[snapshot] = self._bases.get(snapshot) or self._base_of(snapshot)
        self._bases = bases
        return Needed(names=frozenset(map(_full, names)), ids=frozenset(bases.values()))

    def _base_of(self, snapshot: SnapshotId) -> str:
        try:
            return self._store.read_manifest(snapshot).image.id
        except SnapshotMissing:
            return ""  # being taken, or thrown away

    def _candidates(self, node: NodeSpec, images: list[ListedImage], *, needed: Needed) -> Iterator[_Candidate]:
        """Give what may be removed. An image with several names is kept for the sake of each."""
        brought: dict[str, float] = {}
        there = {image.id for image in images} | {name for image in images for name in image.names}
        for name, used_at in self._ledger.node_images.list(node.id).items():
            if _full(name) in there:
                brought[_full(name)] = used_at
            else:
                self._ledger.node_images.forget(node_id=node.id, name=name)
        for image in images:
            if image.in_use or image.id in needed.ids or needed.names & set(image.names):
                continue
            ours = image.labels.get(LEDGER_LABEL) == self._ledger.id
            for name in image.names:
                if name in brought:
                    yield _Candidate(image, name, used_at=brought[name], at_once=False)
                elif ours and name.startswith(f"{RESTORED_REPOSITORY}:"):
                    yield _Candidate(image, name, used_at=image.created_at, at_once=True)
            if not image.names and (ours or image.id in brought):
                yield _Candidate(image, image.id, used_at=brought.get(image.id, image.created_at), at_once=False)

    def _remove(self, host: DockerHost, node: NodeSpec, candidate: _Candidate) -> None:
        try:
            removed = remove_image(host, candidate.name)
        except DockerError as error:
            log.warning("image not removed", node=node.id, image=candidate.name, error=error.message)
            return
        if not removed:
            return
        message = f"removed image {candidate.name} ({candidate.image.bytes / 1e6:.0f} MB): nothing needs it"
        log.info("image removed", node=node.id, image=candidate.name)
        self._ledger.events.add("image_removed", message=message, node_id=node.id)


def _full(name: str) -> str:
    """Return a name with its tag, as the engine lists it; an id stays as it is."""
    if name.startswith("sha256:") or ":" in name.rpartition("/")[2]:
        return name
    return f"{name}:latest"
