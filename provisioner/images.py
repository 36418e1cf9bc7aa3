"""Resolves the image that a caller names to the image that is run.

The cluster's catalogue maps names (the contract's default `ubuntu:22.04` among them) to images; any other name is taken
as it is, when a node has it or a registry offers it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from provisioner.cluster import Cluster
from provisioner.docker_hosts import images
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import DockerError, NodeUnreachable, UnknownImage
from stacks.spec import CDP_PORT, NodeSpec

REMEMBER_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedImage:
    """What will run for the name that was asked for."""

    requested: str
    image: str
    browser: bool
    """Whether it publishes a browser's ports."""
    base: str | None = None
    """What the project's browser image was built on, as its label says."""


class ImageCatalogue:
    """Resolves names; asks the nodes' engines, and remembers their answers for a while."""

    def __init__(self, cluster: Cluster, *, hosts: DockerHosts) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[float, ResolvedImage]] = {}
        """By the name that was asked for and what it stands for, which may change with the cluster's file."""

    def resolve(self, requested: str, *, nodes: Sequence[NodeSpec]) -> ResolvedImage:
        """Return what runs for `requested`; raise UnknownImage when neither a node nor a registry has it.

        Raises NodeUnreachable when no node answers.
        """
        key = (requested, self._cluster.images.get(requested, requested))
        with self._lock:
            known = self._known.get(key)
        if known is not None and time.monotonic() - known[0] < REMEMBER_S:
            return known[1]
        resolved = self._ask(requested, nodes=nodes)
        with self._lock:
            self._known[key] = (time.monotonic(), resolved)
        return resolved

    def _ask(self, requested: str, *, nodes: Sequence[NodeSpec]) -> ResolvedImage:
        image = self._cluster.images.get(requested, requested)
        reasons: list[str] = []
        silent: list[NodeUnreachable] = []
        for node in nodes:
            host = self._hosts.of(node)
            try:
                found = images.find_image(host, image)
                if found is not None:
                    return ResolvedImage(
                        requested=requested,
                        image=image,
                        browser=f"{CDP_PORT}/tcp" in found.exposed_ports,
                        base=found.labels.get("machineuse.base"),
                    )
                images.check_offered(host, image)
            except NodeUnreachable as error:
                silent.append(error)
                reasons.append(error.message)
            except DockerError as error:
                reasons.append(error.detail or error.message)
            else:
                return ResolvedImage(requested=requested, image=image, browser=False)
        if silent and len(silent) == len(nodes):
            raise silent[0]  # nobody said anything about the image
        what = f"'{requested}'" if image == requested else f"'{requested}' (which stands for '{image}')"
        raise UnknownImage(
            f"There is no image {what}: no node has it, and no registry offers it.", detail="; ".join(reasons)
        )
