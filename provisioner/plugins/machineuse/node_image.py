"""`machineuse:index:NodeImage`: an image of the cluster's catalogue, on a node before any instance needs it there.

Creating it brings the image: from a registry, or from another node. Nothing is removed with it: an instance may still
use the image, and what nobody uses is removed when the node's disk is wanted for something else.
"""

from __future__ import annotations

from typing import ClassVar

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.images import find_image, find_usable_image
from provisioner.docker_hosts.transfers import bring_image
from provisioner.plugins.machineuse.inputs import NodeImageInputs, differ, parse
from provisioner.plugins.machineuse.shared import MachineuseResource
from provisioner.plugins.policy import DeletePolicy
from provisioner.plugins.resources import Call, Created, Difference, Found
from provisioner.plugins.values import Properties


class NodeImageType(MachineuseResource):
    """Brings images to nodes."""

    model = NodeImageInputs
    computed: ClassVar[frozenset[str]] = frozenset({"imageId"})

    def __init__(self, *, hosts: DockerHosts, policy: DeletePolicy) -> None:
        self._hosts = hosts
        self._policy = policy

    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """See a difference only in which image it is, and on which node: not in where it could be copied from."""
        del call, id
        return differ(("nodeId", "dockerHost", "image"), old=old_outputs | old_inputs, new=news)

    def create(self, call: Call, *, inputs: Properties) -> Created:
        """Bring the image, or find it there; raises `UnknownImage` and `NodeUnreachable`."""
        wanted = parse(NodeImageInputs, inputs)
        host = wanted.host(self._hosts)
        found = find_usable_image(host, wanted.image, emulated=wanted.emulated)
        if found is None:
            found = bring_image(
                host,
                wanted.image,
                sources=[source.host(self._hosts) for source in wanted.sources],
                emulated=wanted.emulated,
                say=call.say,
                report=call.progress,
            )
            for name in (wanted.image, found.id):
                self._policy.note_image(node_id=wanted.node_id, name=name)
        return Created(id=f"{wanted.node_id}/{wanted.image}", outputs=inputs | {"imageId": found.id})

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        """Say whether the node still has an image of that name."""
        del call
        wanted = parse(NodeImageInputs, outputs | inputs)
        if find_image(wanted.host(self._hosts), wanted.image) is None:
            return None
        return Found(id=id, inputs=inputs, outputs=outputs)

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        """Remove nothing."""
        del call, id, inputs, outputs
