"""Images in the program: which node has which image of the catalogue, served by the `machineuse` plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pulumi

from stacks.names import NODE_IMAGE_TYPE
from stacks.properties import CamelCaseResource


class NodeImage(CamelCaseResource):
    """An image that a node has; creating it brings the image there."""

    image_id: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        *,
        node_id: str,
        docker_host: str,
        docker_cert_path: str | None,
        docker_ssh_opts: Sequence[str] | None,
        image: str,
        sources: Sequence[Mapping[str, Any]],
        emulated: str | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """`sources` say how the engines are reached that the image may be copied from.

        `emulated` is an architecture that the node runs besides its own.
        """
        inputs = {
            "node_id": node_id,
            "docker_host": docker_host,
            "docker_cert_path": docker_cert_path,
            "docker_ssh_opts": docker_ssh_opts,
            "image": image,
            "sources": sources,
            "emulated": emulated,
        }
        super().__init__(NODE_IMAGE_TYPE, resource_name, inputs | {"image_id": None}, opts)
