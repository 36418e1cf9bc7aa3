"""Chooses the node and the ports of an instance: a pure function over what the nodes have and have promised.

Runs inside the ledger's write transaction, so two callers never get the same port or the last place twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from provisioner.errors import InvalidRequest, NoCapacity, UnknownNode
from provisioner.ledger.instances import NodeLoad
from provisioner.ledger.records import NodeRecord, NodeStatus
from stacks.spec import Availability, ClusterSpec, NodeSpec

OFFLINE = "offline"

PortProbe = Callable[[NodeSpec, int], bool]
"""Says whether a port is free on a node, beyond what the ledger knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What an instance needs of a node."""

    memory_gb: float
    cpu_cores: int
    ports: int
    node_preference: str | None = None
    avoid: frozenset[str] = frozenset()
    """Nodes that it must not go to."""
    former_ports: tuple[int, ...] = ()
    """Ports it had before, taken again when they are free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overcommit:
    """How many times a node's memory and CPU may be promised."""

    memory: float
    cpu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an instance goes."""

    node: NodeSpec
    ports: tuple[int, ...]


def choose_place(
    need: Need,
    *,
    cluster: ClusterSpec,
    nodes: Sequence[NodeRecord],
    loads: Sequence[NodeLoad],
    overcommit: Overcommit,
    port_free: PortProbe,
) -> Place:
    """Return the emptiest online node that has room, the preferred one first.

    Raises UnknownNode for a preference that is no node, InvalidRequest for a size that no node could ever have, and
    NoCapacity, naming what each node lacks, when none has room now.
    """
    known = {record.id: record for record in nodes}
    promised = {load.node_id: load for load in loads}
    if need.node_preference is not None and cluster.node(need.node_preference) is None:
        names = ", ".join(node.id for node in cluster.nodes)
        raise UnknownNode(f"There is no node '{need.node_preference}'; the cluster has: {names}.")
    _refuse_impossible(need, known=known, overcommit=overcommit)
    lacks: dict[str, str] = {}
    fitting: list[tuple[tuple[bool, float, str], NodeSpec]] = []
    for node in cluster.nodes:
        record = known.get(node.id)
        load = promised.get(node.id) or NodeLoad(
            node_id=node.id, instances=0, memory_gb=0, cpu_cores=0, ports=frozenset()
        )
        lack = _find_lack(need, record=record, node=node, load=load, overcommit=overcommit)
        if lack is not None:
            lacks[node.id] = lack
            continue
        memory_gb = (record.memory_bytes or 0) / 2**30 if record else 0
        used = load.memory_gb / memory_gb if memory_gb else load.instances / node.max_instances
        fitting.append(((node.id != need.node_preference, used, node.id), node))
    for _, node in sorted(fitting, key=lambda pair: pair[0]):
        taken = promised[node.id].ports if node.id in promised else frozenset()
        ports = _pick_ports(need, node=node, taken=taken, port_free=port_free)
        if ports is not None:
            return Place(node=node, ports=ports)
        lacks[node.id] = "no free port left"
    said = "; ".join(f"node {node_id}: {lack}" for node_id, lack in lacks.items())
    away = all(lack == OFFLINE for lack in lacks.values())
    raise NoCapacity(
        f"No node has room now ({said}).",
        resolution="Retry once a node answers." if away else "Delete an instance or make one dormant, then retry.",
    )


def _refuse_impossible(need: Need, *, known: Mapping[str, NodeRecord], overcommit: Overcommit) -> None:
    sized = [record for record in known.values() if record.memory_bytes and record.cpu_cores]
    if not sized:
        return
    most_memory_gb = max((record.memory_bytes or 0) / 2**30 for record in sized) * overcommit.memory
    most_cores = max(record.cpu_cores or 0 for record in sized)
    if need.memory_gb > most_memory_gb:
        raise InvalidRequest(
            f"config.memory_gb: {need.memory_gb:g} GB is more than any node has ({most_memory_gb:.1f} GB)."
        )
    if need.cpu_cores > most_cores:
        raise InvalidRequest(f"config.cpu_cores: {need.cpu_cores} is more than any node has ({most_cores:g}).")


def _find_lack(
    need: Need, *, record: NodeRecord | None, node: NodeSpec, load: NodeLoad, overcommit: Overcommit
) -> str | None:
    if record is None or record.status is NodeStatus.OFFLINE:
        return OFFLINE
    if node.id in need.avoid:
        return "is to be left"
    if node.availability is not Availability.ACTIVE:
        return f"is {node.availability.value}"
    if load.instances >= node.max_instances:
        return f"has its {node.max_instances} instances"
    free_gb = (record.memory_bytes or 0) / 2**30 * overcommit.memory - load.memory_gb
    if need.memory_gb > free_gb:
        return f"{max(free_gb, 0):.1f} GB of memory left, {need.memory_gb:g} needed"
    free_cores = (record.cpu_cores or 0) * overcommit.cpu - load.cpu_cores
    if need.cpu_cores > free_cores:
        return f"{max(free_cores, 0):g} CPU cores left, {need.cpu_cores} needed"
    return None


def _pick_ports(need: Need, *, node: NodeSpec, taken: frozenset[int], port_free: PortProbe) -> tuple[int, ...] | None:
    allowed = range(node.ports.first, node.ports.last + 1)
    candidates = [port for port in need.former_ports if port in allowed] + list(allowed)
    picked: list[int] = []
    for port in candidates:
        if len(picked) == need.ports:
            break
        if port not in taken and port not in picked and port_free(node, port):
            picked.append(port)
    return tuple(picked) if len(picked) == need.ports else None
