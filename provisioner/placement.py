"""Chooses the node and the ports of an instance: pure functions over what the nodes are, have, and have promised.

1. Filter: a node that is offline, closed, of another kind than asked for, or full is out, and it is known why.
2. Score: the preferred node first, then the one with the instance's copy, then the one that will be the emptiest.
3. Ports: the best node that has enough of them is the place.

Runs inside the ledger's write transaction, so two callers never get the same port or the last place twice. What counts
is what was promised, because that is exact and known at once. Live load is late: of a hundred instances created in one
second it would send all to one node. It only tells between nodes that have promised about as much.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from provisioner.errors import InvalidRequest, NoCapacity, UnknownNode
from provisioner.ledger.loads import MIB_PER_GB, NodeState, to_mib
from stacks.spec import Availability, ClusterSpec, NodeSpec

LIVE_WEIGHT = 0.2
"""A node whose cores or memory are all busy ranks like one that has promised this share of itself more."""
FEW_NODES = 5
"""Up to so many nodes are named one by one when none has room."""

PortProbe = Callable[[NodeSpec, int], bool]
"""Says whether a port is free on a node, beyond what the ledger knows."""
PortReader = Callable[[str], frozenset[int]]
"""Returns the ports that a node has promised; asked only for nodes that have room otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What an instance needs of a node."""

    memory_gb: float
    cpu_cores: int
    disk_gb: float
    ports: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the node's labels must say."""
    volume: str | None = None
    """What its home is on, once it has one; None for either."""
    node_preference: str | None = None
    strict: bool = False
    """Whether only the preferred node will do."""
    home_node: str | None = None
    """The node that has its quick copy: taken while it fits, and no matter when not."""
    avoid: Mapping[str, str] = field(default_factory=dict)
    """Nodes that will not do, and why not, in words that follow a node's name."""
    memory_mib: int = field(init=False)
    disk_mib: int = field(init=False)

    def __post_init__(self) -> None:
        """Round once what is compared with every node."""
        object.__setattr__(self, "memory_mib", to_mib(self.memory_gb))
        object.__setattr__(self, "disk_mib", to_mib(self.disk_gb))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How many times a node's memory, CPU and disk may be promised, and the free disk below which it takes nothing."""

    memory: float
    cpu: float
    disk: float
    free_disk_gb: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an instance goes."""

    node: NodeSpec
    ports: tuple[int, ...]
    disk_quota: bool
    """Whether the node's storage driver limits volumes."""

    @property
    def disk_enforced(self) -> bool:
        """Say whether a home there can't outgrow its `disk_gb`."""
        return self.disk_quota or self.node.volume == "ebs"

    note: str | None = None
    """Why it is not the preferred node, or not the one with the copy."""


class Lack(Enum):
    """Why a node will not do, in the order in which it is found out."""

    OFFLINE = auto()
    CLOSED = auto()
    AVOIDED = auto()
    LABELS = auto()
    VOLUME = auto()
    INSTANCES = auto()
    MEMORY = auto()
    CPU = auto()
    DISK = auto()
    DISK_FULL = auto()
    PORTS = auto()


_ACTIVE = Availability.ACTIVE
_ACTIVE_WORD = _ACTIVE.value  # looking it up takes longer than comparing it, a thousand times
_ROOM = frozenset({Lack.INSTANCES, Lack.MEMORY, Lack.CPU, Lack.DISK, Lack.DISK_FULL, Lack.PORTS})
"""What deleting an instance, or making one dormant, gives back."""


class Found(NamedTuple):
    """Why one node will not do."""

    kind: Lack
    left: float = 0
    """How much there is of what is too little."""
    what: str = ""
    """The label that it has not, what its availability is, or why it is to be avoided."""


class Arrivals:
    """The nodes as they will be once those have arrived that are on their way and have been promised nothing yet."""

    def __init__(self, nodes: Sequence[NodeState], *, ports_of: PortReader) -> None:
        self._nodes = {node.id: node for node in nodes}
        self._ports_of = ports_of
        self._promised: dict[str, frozenset[int]] = {}
        self._ports: defaultdict[str, set[int]] = defaultdict(set)

    def nodes(self) -> list[NodeState]:
        """Return every node, in no order."""
        return list(self._nodes.values())

    def ports(self, node_id: str) -> frozenset[int]:
        """Return the ports that a node will have promised."""
        if node_id not in self._promised:
            self._promised[node_id] = self._ports_of(node_id)
        return self._promised[node_id] | self._ports[node_id]

    def has_room(self, need: Need, place: Place, *, limits: Limits) -> bool:
        """Say whether a place that was chosen before will still do."""
        state = self._nodes.get(place.node.id)
        found = weigh(need, node=place.node, state=state, limits=limits)
        return not isinstance(found, Found) and self.ports(place.node.id).isdisjoint(place.ports)

    def add(self, need: Need, place: Place) -> None:
        """Count on one more arrival."""
        node = self._nodes[place.node.id]
        self._nodes[node.id] = node._replace(
            instances=node.instances + 1,
            promised_memory_mib=node.promised_memory_mib + need.memory_mib,
            promised_cpu_cores=node.promised_cpu_cores + need.cpu_cores,
            promised_disk_mib=node.promised_disk_mib + (need.disk_mib if place.node.volume == "docker" else 0),
        )
        self._ports[node.id].update(place.ports)


def choose_place(
    need: Need,
    *,
    cluster: ClusterSpec,
    nodes: Sequence[NodeState],
    limits: Limits,
    ports_of: PortReader,
    port_free: PortProbe,
) -> Place:
    """Return the place for an instance: the preferred node, the one with its copy, or the emptiest that has room.

    Raises UnknownNode for a preference that is no node, InvalidRequest for a size that no node could ever have, and
    NoCapacity, naming what the nodes lack, when none has room now.
    """
    if need.node_preference is not None and cluster.node(need.node_preference) is None:
        names = ", ".join(node.id for node in cluster.nodes[: FEW_NODES * 2])
        more = ", …" if len(cluster.nodes) > FEW_NODES * 2 else ""
        raise UnknownNode(f"There is no node '{need.node_preference}'; the cluster has: {names}{more}.")
    if need.strict and need.node_preference is None:
        raise InvalidRequest("node_strict: needs a node_preference.")
    states = {state.id: state for state in nodes}
    lacks: dict[str, Found] = {}
    fitting: list[tuple[bool, bool, float, str, NodeSpec]] = []
    for node in cluster.nodes:
        if need.strict and node.id != need.node_preference:
            continue
        found = weigh(need, node=node, state=states.get(node.id), limits=limits)
        if isinstance(found, Found):
            lacks[node.id] = found
        else:
            fitting.append((node.id != need.node_preference, node.id != need.home_node, found, node.id, node))
    heapq.heapify(fitting)  # mostly the first one is taken: cheaper than sorting all of them
    while fitting:
        node = heapq.heappop(fitting)[-1]
        taken = ports_of(node.id) if need.ports else frozenset()
        ports = pick_ports(need.ports, node=node, taken=taken, port_free=port_free)
        if ports is not None:
            note = _explain_other(need, chosen=node.id, lacks=lacks)
            return Place(node=node, ports=ports, disk_quota=states[node.id].disk_quota, note=note)
        lacks[node.id] = Found(Lack.PORTS)
    _refuse_impossible(need, cluster=cluster, nodes=nodes, limits=limits)
    raise _no_capacity(need, lacks=lacks)


def weigh(need: Need, *, node: NodeSpec, state: NodeState | None, limits: Limits) -> float | Found:
    """Return how full a node would be with the instance on it (less is better), or why it will not do, ports aside.

    Half of it is the share of what the node would run out of first, half the average of all shares. One function for
    both, because it runs for every node at each placement, and they rest on the same sums.
    """
    if state is None or not state.online:
        return Found(Lack.OFFLINE)
    if node.availability is not _ACTIVE:
        return Found(Lack.CLOSED, what=node.availability.value)
    if state.availability != _ACTIVE_WORD:  # whoever keeps the ledger has read a newer file
        return Found(Lack.CLOSED, what=state.availability)
    if node.id in need.avoid:
        return Found(Lack.AVOIDED, what=need.avoid[node.id])
    if need.labels:
        for key, value in need.labels.items():
            if node.labels.get(key, state.labels.get(key)) != value:
                return Found(Lack.LABELS, what=f"{key}={value}")
    if need.volume is not None and need.volume != node.volume:
        return Found(Lack.VOLUME)
    if state.instances >= node.max_instances:
        return Found(Lack.INSTANCES, node.max_instances)
    has_mib = (state.memory_bytes or 0) / 2**20 * limits.memory
    memory_mib = state.promised_memory_mib + need.memory_mib
    if memory_mib > has_mib:
        return Found(Lack.MEMORY, max(has_mib - state.promised_memory_mib, 0) / MIB_PER_GB)
    has_cores = state.cpu_cores or 0
    may_cores = has_cores * limits.cpu
    cpu_cores = state.promised_cpu_cores + need.cpu_cores
    if cpu_cores > may_cores or need.cpu_cores > has_cores:  # Docker limits no container to more than there are
        return Found(Lack.CPU, max(min(may_cores - state.promised_cpu_cores, has_cores), 0))
    instances = (state.instances + 1) / node.max_instances
    memory = memory_mib / has_mib
    cores = cpu_cores / may_cores
    cpu_percent, memory_percent = state.cpu_percent or 0, state.memory_percent or 0
    live = (cpu_percent if cpu_percent > memory_percent else memory_percent) / 100 * LIVE_WEIGHT
    if state.disk_bytes is None:
        return (max(instances, memory, cores) + (instances + memory + cores) / 3) / 2 + live
    has_disk_mib = state.disk_bytes / 2**20
    may_disk_mib = has_disk_mib * limits.disk
    disk_mib = state.promised_disk_mib + need.disk_mib
    if node.volume == "docker" and disk_mib > may_disk_mib:
        return Found(Lack.DISK, max(may_disk_mib - state.promised_disk_mib, 0) / MIB_PER_GB)
    if state.disk_percent is not None:
        free_gb = has_disk_mib * (1 - state.disk_percent / 100) / MIB_PER_GB
        if free_gb < limits.free_disk_gb:
            return Found(Lack.DISK_FULL, free_gb)
    if node.volume != "docker":
        return (max(instances, memory, cores) + (instances + memory + cores) / 3) / 2 + live
    disk = disk_mib / may_disk_mib
    return (max(instances, memory, cores, disk) + (instances + memory + cores + disk) / 4) / 2 + live


def pick_ports(count: int, *, node: NodeSpec, taken: frozenset[int], port_free: PortProbe) -> tuple[int, ...] | None:
    """Return the node's first free ports; None when it has too few."""
    picked: list[int] = []
    for port in range(node.ports.first, node.ports.last + 1):
        if len(picked) == count:
            break
        if port not in taken and port_free(node, port):
            picked.append(port)
    return tuple(picked) if len(picked) == count else None


def _refuse_impossible(need: Need, *, cluster: ClusterSpec, nodes: Sequence[NodeState], limits: Limits) -> None:
    states = {state.id: state for state in nodes}
    ours = [states.get(node.id) for node in cluster.nodes]
    sized = [state for state in ours if state is not None and state.memory_bytes and state.cpu_cores]
    if len(sized) < len(ours) or not sized:
        return  # one that never answered may be larger
    most_memory_gb = max(state.memory_bytes or 0 for state in sized) / 2**30 * limits.memory
    most_cores = max(state.cpu_cores or 0 for state in sized)
    if need.memory_gb > most_memory_gb:
        raise InvalidRequest(
            f"config.memory_gb: {need.memory_gb:g} GB is more than any node has ({_round_down(most_memory_gb)} GB)."
        )
    if need.cpu_cores > most_cores:
        raise InvalidRequest(f"config.cpu_cores: {need.cpu_cores} is more than any node has ({most_cores:g}).")
    disks = [state.disk_bytes for state in sized]
    if any(disk is None for disk in disks) or any(node.volume != "docker" for node in cluster.nodes):
        return
    most_disk_gb = max(disk or 0 for disk in disks) / 2**30 * limits.disk
    if need.disk_gb > most_disk_gb:
        raise InvalidRequest(
            f"config.disk_gb: {need.disk_gb:g} GB is more than any node has ({_round_down(most_disk_gb)} GB)."
        )


def _explain_other(need: Need, *, chosen: str, lacks: Mapping[str, Found]) -> str | None:
    """Say why the place is not the node that comes first; None when it is, or none does."""
    wanted, role = (need.node_preference, "is preferred") if need.node_preference else (need.home_node, "has its copy")
    if wanted is None or wanted == chosen:
        return None
    if wanted not in lacks:
        return f"node {wanted}, which {role}, is not in the cluster any more"
    return f"node {wanted}, which {role}: {_tell(need, lacks[wanted])}"


def _no_capacity(need: Need, *, lacks: Mapping[str, Found]) -> NoCapacity:
    if len(lacks) <= FEW_NODES:
        said = "; ".join(f"node {node_id}: {_tell(need, found)}" for node_id, found in lacks.items())
    else:
        said = "; ".join(_count(need, lacks.values()))
    kinds = {found.kind for found in lacks.values()}
    if kinds & _ROOM:
        resolution = "Delete an instance or make one dormant, then retry."
    elif Lack.OFFLINE in kinds:
        resolution = "Retry once a node answers."
    elif Lack.CLOSED in kinds:
        resolution = "Set a node's availability to active, or add a node, then retry."
    else:
        resolution = "Ask for less of a node, or add one that has it, then retry."
    who = f"Node {need.node_preference}" if need.strict else "No node"
    return NoCapacity(f"{who} has {'no ' if need.strict else ''}room now ({said}).", resolution=resolution)


def _count(need: Need, lacks: Iterable[Found]) -> Iterator[str]:
    """Count the nodes by what they lack, and tell the most that any has of it."""
    groups: dict[tuple[Lack, str], list[Found]] = {}
    for found in lacks:
        groups.setdefault((found.kind, found.what), []).append(found)
    for (kind, what), members in sorted(groups.items(), key=lambda group: (group[0][0].value, group[0][1])):
        most = Found(kind, max(found.left for found in members), what)
        yield f"{len(members)} {'nodes' if len(members) > 1 else 'node'}: {_tell(need, most, several=len(members) > 1)}"


def _round_down(gb: float) -> str:
    """Write an amount that is not enough so that it does not look like enough."""
    return f"{math.floor(gb * 10 + 1e-6) / 10:.1f}"


def _tell(need: Need, found: Found, *, several: bool = False) -> str:
    """Put into words what one node lacks, or what `several` do that have at most so much left."""
    left = f"at most {_round_down(found.left)}" if several else _round_down(found.left)
    return {
        Lack.OFFLINE: "offline",
        Lack.CLOSED: found.what,
        Lack.AVOIDED: found.what,
        Lack.LABELS: f"not labelled {found.what}",
        Lack.VOLUME: f"no {need.volume} volumes for homes",
        Lack.INSTANCES: "have all their instances" if several else f"has its {found.left:g} instances",
        Lack.MEMORY: f"{left} GB of memory left, {need.memory_gb:g} needed",
        Lack.CPU: f"{'at most ' if several else ''}{found.left:g} CPU cores left, {need.cpu_cores} needed",
        Lack.DISK: f"{left} GB of disk left, {need.disk_gb:g} needed",
        Lack.DISK_FULL: f"disk full, {left} GB free",
        Lack.PORTS: "no free port left",
    }[found.kind]
