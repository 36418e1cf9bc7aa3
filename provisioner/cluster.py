"""The cluster's description as it is now: nodes come and go while the service runs.

Whoever keeps a `Cluster` sees the newest reading of the file at each use; whoever needs one consistent state (a
decision, an update) takes `spec` once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from stacks.spec import ClusterSpec, NodeSpec

APPLIED = "applied_cluster"
"""The ledger's fact that says which version of the cluster's file the stack has."""
_NOT_IN_THE_STACK = {"address", "availability", "labels", "max_instances", "ports"}
"""What may change about a node without any resource changing."""


def fingerprint(cluster: ClusterSpec) -> str:
    """Return a name for what the stack gets from a cluster's file, apart from its instances."""
    said = [*sorted(in_stack(node) for node in cluster.nodes), cluster.helper_image]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def in_stack(node: NodeSpec) -> str:
    """Return what of a node the stack's resources are made of."""
    return node.model_dump_json(exclude=_NOT_IN_THE_STACK)


class Cluster:
    """One cluster, by what its file says; replaced as a whole when the file changes."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.name = spec.name
        self._spec = spec

    @property
    def spec(self) -> ClusterSpec:
        """Return the newest description."""
        return self._spec

    @property
    def nodes(self) -> tuple[NodeSpec, ...]:
        """Return the nodes."""
        return self._spec.nodes

    @property
    def images(self) -> Mapping[str, str]:
        """Return the image catalogue."""
        return self._spec.images

    @property
    def helper_image(self) -> str:
        """Return the image of the helper containers."""
        return self._spec.helper_image

    def node(self, node_id: str) -> NodeSpec | None:
        """Return the node of that id, or None."""
        return self._spec.node(node_id)

    def replace(self, spec: ClusterSpec) -> None:
        """Take over a newer description of the same cluster."""
        assert spec.name == self.name
        self._spec = spec
