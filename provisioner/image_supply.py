"""Sees to it that a node has an image before an instance needs it there: pulled, or copied from another node."""

from __future__ import annotations

import time

import structlog

from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.images import find_usable_image
from provisioner.docker_hosts.transfers import bring_image
from provisioner.errors import UnknownImage
from provisioner.ledger import Ledger
from provisioner.snapshots.manifest import Manifest, PartName
from stacks.spec import ARCH, NodeSpec

log = structlog.get_logger(__name__)

FIRST_WORD_S = 2.0
"""After how long a transfer tells in an event how far it is; each next time it waits twice as long as before."""


class ImageSupply:
    """Brings images to a cluster's nodes, and writes down which ones."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts

    def bring(self, node: NodeSpec, image: str, *, instance_id: str | None = None, tag: str | None = None) -> None:
        """Return once the node has the image (a name or an id). Idempotent.

        Raises UnknownImage when neither a registry nor a node that is online has it for the node's platform, and
        NodeUnreachable.
        """
        target, emulated = self._hosts.of(node), node.labels.get(ARCH)
        if find_usable_image(target, image, emulated=emulated) is not None:
            self._ledger.node_images.note_use(node_id=node.id, name=image)
            return

        started = time.monotonic()
        teller = _Teller(self._ledger, node_id=node.id, instance_id=instance_id)
        brought = bring_image(
            target,
            image,
            tag=tag,
            sources=self._sources(node),
            emulated=emulated,
            say=teller.say,
            report=teller.report,
        )
        for name in {image, tag or image, brought.id}:
            self._ledger.node_images.note(node_id=node.id, name=name)
        log.info("image brought", image=image, node=node.id, seconds=round(time.monotonic() - started, 1))

    def bring_for_restore(self, node: NodeSpec, manifest: Manifest, *, image: str, instance_id: str) -> None:
        """Return once the node has what restoring a snapshot onto it needs. Idempotent.

        Changes above an image need the very image that they were made on; where nobody has that any more, the one
        that has its name now is brought, and the restore says so. Raises UnknownImage and NodeUnreachable.
        """
        self.bring(node, self._cluster.helper_image, instance_id=instance_id)
        if manifest.part(PartName.ROOTFS) is not None:
            try:
                self.bring(node, manifest.image.id, tag=manifest.image.reference, instance_id=instance_id)
            except UnknownImage as error:
                log.warning("original image not to be had", instance=instance_id, error=error.message)
            else:
                return
        self.bring(node, image, instance_id=instance_id)

    def _sources(self, node: NodeSpec) -> list[DockerHost]:
        online = self._ledger.nodes.online()
        return [self._hosts.of(other) for other in self._cluster.nodes if other.id != node.id and other.id in online]


class _Teller:
    """Tells of one image on its way: everything in the log; in events its begin, and ever more rarely how far it is."""

    def __init__(self, ledger: Ledger, *, node_id: str, instance_id: str | None) -> None:
        self._ledger = ledger
        self._node_id = node_id
        self._instance_id = instance_id
        self._kind = ""
        self._pause_s = FIRST_WORD_S
        self._next_word_at = time.monotonic() + FIRST_WORD_S

    def say(self, message: str) -> None:
        log.info("bringing image", node=self._node_id, instance=self._instance_id, said=message)
        self._kind = message.partition("ing ")[0]  # pull, copy
        self._add_event(message)

    def report(self, progress: str) -> None:
        log.info("bringing image", node=self._node_id, instance=self._instance_id, progress=progress)
        if time.monotonic() >= self._next_word_at:
            self._pause_s *= 2
            self._next_word_at = time.monotonic() + self._pause_s
            self._add_event(progress)

    def _add_event(self, message: str) -> None:
        self._ledger.events.add(self._kind, message=message, instance_id=self._instance_id, node_id=self._node_id)
