"""The whole program on one screen: nodes first, then instances.

It runs in full (`pulumi up`, `pulumi preview`) and in part: the control plane declares only the instances that change
and names just their resources as targets, so the time of an update does not grow with the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pulumi
import pulumi_docker as docker

from stacks import names
from stacks.claim import Claim
from stacks.images import NodeImage
from stacks.instance import Instance, endpoint_arguments
from stacks.names import CLUSTER_LABEL, LEDGER_LABEL, URN_LABEL, Names
from stacks.spec import ARCH, ClusterSpec, InstanceSpec, NodeSpec

WINDOW = 64
"""Resources whose registration is awaited together: the SDK's bookkeeping is quadratic in what is pending."""


async def declare(
    spec: ClusterSpec,
    *,
    ledger_id: str,
    instances: Sequence[InstanceSpec],
    claim: bool = True,
    images: bool = False,
) -> None:
    """Declare the cluster's nodes and these instances.

    With `claim` the stack is first claimed for the ledger: a stack that belongs to another ledger fails right there,
    before anything else is registered, so nothing can be taken for unwanted because the wrong ledger does not know it.
    The catalogue's images on the nodes belong to such a full program, and to one that is about them (`images`).
    Raises RunError, and declares nothing more, for an instance whose node can't have it any more.
    """
    if claim:
        await _registered([Claim("cluster", ledger_id=ledger_id)])
    for instance in instances:
        _check_node(instance, spec=spec)
    providers = {node.id: _declare_node(node, spec=spec, ledger_id=ledger_id) for node in spec.nodes}
    pending: list[pulumi.Resource] = _declare_images(spec) if images or claim else []
    for instance in instances:
        node = spec.node(instance.node_id)
        provider = providers.get(instance.node_id)  # a dormant one sleeps in the store, whatever became of its node
        component = Instance(instance, cluster=spec, ledger_id=ledger_id, provider=provider, node=node)
        pending += [component, *component.resources]
        if len(pending) >= WINDOW:
            await _registered(pending)
            pending = []
    await _registered(pending)


def provider_arguments(node: NodeSpec) -> dict[str, Any]:
    """Return how a node's engine is reached, as the arguments of its provider."""
    return {"host": node.host, "cert_path": node.cert_path, "ssh_opts": list(node.ssh_opts) or None}


def _declare_node(node: NodeSpec, *, spec: ClusterSpec, ledger_id: str) -> docker.Provider:
    provider = docker.Provider(names.provider_name(node.id), **provider_arguments(node))
    name = names.network_name(node.id)
    labels = {
        CLUSTER_LABEL: spec.name,
        LEDGER_LABEL: ledger_id,
        URN_LABEL: Names(spec.name).urn(names.NETWORK_TYPE, name),
    }
    docker.Network(
        name,
        name=Names(spec.name).docker_network(ledger_id),
        driver="bridge",
        # Instances must not reach each other.
        options={"com.docker.network.bridge.enable_icc": "false"},
        labels=[docker.NetworkLabelArgs(label=k, value=v) for k, v in labels.items()],
        opts=pulumi.ResourceOptions(provider=provider),
    )
    return provider


def _declare_images(spec: ClusterSpec) -> list[pulumi.Resource]:
    """Declare every image of the catalogue, and the helpers', on every node: a closed one may be opened again."""
    return [
        NodeImage(
            names.node_image_name(node.id, image),
            node_id=node.id,
            **endpoint_arguments(node),
            image=image,
            sources=[endpoint_arguments(other) for other in spec.nodes if other.id != node.id],
            emulated=node.labels.get(ARCH),
        )
        for node in spec.nodes
        for image in spec.wanted_images
    ]


def _check_node(instance: InstanceSpec, *, spec: ClusterSpec) -> None:
    node = spec.node(instance.node_id)
    if node is None and instance.body:
        raise pulumi.RunError(
            f"Instance {instance.id} is on node '{instance.node_id}', which the cluster's file does not name. Put"
            " the node back into the file, drain it (`machineuse node drain`), then remove it."
        )
    if node is not None and node.cloud is None and instance.cloud_volume is not None:
        raise pulumi.RunError(
            f"Instance {instance.id} is on a cloud volume on node '{node.id}', which has no `cloud` in the cluster's"
            " file. Put its instance_id and zone back, drain it (`machineuse node drain`), then change it."
        )


async def _registered(resources: Iterable[pulumi.Resource]) -> None:
    for resource in resources:
        await resource.urn.future()
