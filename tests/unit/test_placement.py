"""Placement, as a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioner.errors import InvalidRequest, NoCapacity, UnknownNode
from provisioner.ledger.instances import NodeLoad
from provisioner.ledger.records import NodeRecord, NodeStatus
from provisioner.placement import Need, Overcommit, Place, choose_place
from stacks.spec import ClusterSpec, NodeSpec, PortRange

ALL_FREE = Overcommit(memory=1, cpu=1)


def node(name: str, *, max_instances: int = 10) -> NodeSpec:
    return NodeSpec(id=name, max_instances=max_instances, ports=PortRange(first=21000, last=21009))


def seen(name: str, *, status: NodeStatus = NodeStatus.ONLINE, gib: int = 16, cores: int = 4) -> NodeRecord:
    return NodeRecord(
        id=name,
        host="unix:///x",
        address="localhost",
        max_instances=10,
        status=status,
        error=None,
        misses=0,
        last_heartbeat=None,
        cpu_cores=cores,
        memory_bytes=gib * 2**30,
        disk_bytes=None,
        disk_quota=False,
        cpu_percent=None,
        memory_percent=None,
        disk_percent=None,
    )


def load(name: str, *, instances: int = 0, gib: float = 0, cores: int = 0, ports: set[int] | None = None) -> NodeLoad:
    return NodeLoad(node_id=name, instances=instances, memory_gb=gib, cpu_cores=cores, ports=frozenset(ports or ()))


def place(
    need: Need,
    *,
    nodes: list[NodeSpec],
    records: list[NodeRecord],
    loads: list[NodeLoad] | None = None,
    busy: frozenset[int] = frozenset(),
) -> Place:
    return choose_place(
        need,
        cluster=ClusterSpec(name="c", nodes=tuple(nodes)),
        nodes=records,
        loads=loads or [],
        overcommit=ALL_FREE,
        port_free=lambda _, port: port not in busy,
    )


SMALL = Need(memory_gb=1, cpu_cores=1, ports=2)


def test_the_emptiest_node_is_chosen() -> None:
    chosen = place(SMALL, nodes=[node("a"), node("b")], records=[seen("a"), seen("b")], loads=[load("a", gib=4)])
    assert chosen.node.id == "b"


def test_the_preferred_node_is_chosen_while_it_has_room() -> None:
    need = Need(memory_gb=1, cpu_cores=1, ports=2, node_preference="a")
    records = [seen("a"), seen("b")]
    assert place(need, nodes=[node("a"), node("b")], records=records, loads=[load("a", gib=4)]).node.id == "a"
    assert place(need, nodes=[node("a"), node("b")], records=records, loads=[load("a", gib=16)]).node.id == "b"


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(UnknownNode, match="no node 'x'"):
        place(Need(memory_gb=1, cpu_cores=1, ports=0, node_preference="x"), nodes=[node("a")], records=[seen("a")])


@pytest.mark.parametrize("need", [Need(memory_gb=17, cpu_cores=1, ports=0), Need(memory_gb=1, cpu_cores=5, ports=0)])
def test_a_size_that_no_node_could_ever_have_is_refused(need: Need) -> None:
    with pytest.raises(InvalidRequest, match="more than any node has"):
        place(need, nodes=[node("a")], records=[seen("a")])


def test_no_room_says_what_each_node_lacks() -> None:
    with pytest.raises(NoCapacity) as caught:
        place(
            SMALL,
            nodes=[node("a"), node("b"), node("c", max_instances=1)],
            records=[seen("a", status=NodeStatus.OFFLINE), seen("b"), seen("c")],
            loads=[load("b", gib=15.5), load("c", instances=1)],
        )
    assert "node a: offline" in caught.value.message
    assert "node b: 0.5 GB of memory left" in caught.value.message
    assert "node c: has its 1 instances" in caught.value.message
    assert caught.value.retry_after_s > 0


def test_former_ports_are_taken_again_when_free_and_busy_ones_never() -> None:
    need = Need(memory_gb=1, cpu_cores=1, ports=2, former_ports=(21007, 21008))
    chosen = place(
        need, nodes=[node("a")], records=[seen("a")], loads=[load("a", ports={21000})], busy=frozenset({21008, 21001})
    )
    assert chosen.ports == (21007, 21002)


@settings(deadline=None)
@given(
    instances=st.integers(0, 12),
    gib=st.floats(0, 20),
    cores=st.integers(0, 6),
    taken=st.sets(st.integers(21000, 21009)),
    busy=st.frozensets(st.integers(21000, 21009)),
    online=st.booleans(),
    memory_gb=st.floats(0.5, 16),
    cpu_cores=st.integers(1, 4),
)
def test_a_place_never_breaks_a_limit_and_is_always_the_same(
    instances: int,
    gib: float,
    cores: int,
    taken: set[int],
    busy: frozenset[int],
    online: bool,
    memory_gb: float,
    cpu_cores: int,
) -> None:
    status = NodeStatus.ONLINE if online else NodeStatus.OFFLINE
    need = Need(memory_gb=memory_gb, cpu_cores=cpu_cores, ports=2)
    loads = [load("a", instances=instances, gib=gib, cores=cores, ports=taken)]

    def choose() -> Place:
        return place(need, nodes=[node("a")], records=[seen("a", status=status)], loads=loads, busy=busy)

    try:
        chosen = choose()
    except NoCapacity:
        return
    assert online
    assert instances < 10
    assert gib + memory_gb <= 16
    assert cores + cpu_cores <= 4
    assert len(set(chosen.ports)) == 2
    assert not set(chosen.ports) & (taken | busy)
    assert choose() == chosen
