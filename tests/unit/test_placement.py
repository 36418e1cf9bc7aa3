"""Placement, as pure functions over a snapshot of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioner.errors import InvalidRequest, NoCapacity, UnknownNode
from provisioner.ledger.loads import NodeState, to_mib
from provisioner.placement import Limits, Need, Place, choose_place
from stacks.spec import Availability, CloudIdentity, ClusterSpec, NodeSpec, PortRange

LIMITS = Limits(memory=1, cpu=1, disk=2, free_disk_gb=2)
GIB = 2**30


def node(name: str, **fields: Any) -> NodeSpec:
    return NodeSpec(**{"id": name, "max_instances": 10, "ports": PortRange(first=21000, last=21009)} | fields)


def seen(
    name: str, *, gib: float = 16, memory_gb: float = 0, disk_gib: float | None = None, **fields: Any
) -> NodeState:
    known: dict[str, Any] = {
        "id": name,
        "online": True,
        "labels_json": '{"arch": "amd64", "os": "linux"}',
        "cpu_cores": 4,
        "memory_bytes": int(gib * GIB),
        "disk_bytes": None if disk_gib is None else int(disk_gib * GIB),
        "disk_quota": False,
        "cpu_percent": None,
        "memory_percent": None,
        "disk_percent": None,
        "promised_memory_mib": to_mib(memory_gb),
    }
    return NodeState(**known | fields)


def need(**fields: Any) -> Need:
    return Need(**{"memory_gb": 1, "cpu_cores": 1, "disk_gb": 10, "ports": 2} | fields)


def place(
    wanted: Need,
    *,
    nodes: Sequence[NodeSpec],
    states: Sequence[NodeState],
    ports: Mapping[str, frozenset[int]] | None = None,
    busy: frozenset[int] = frozenset(),
) -> Place:
    return choose_place(
        wanted,
        cluster=ClusterSpec(name="c", nodes=tuple(nodes)),
        nodes=states,
        limits=LIMITS,
        ports_of=lambda node_id: (ports or {}).get(node_id, frozenset()),
        port_free=lambda _, port: port not in busy,
    )


def refusal(wanted: Need, *, nodes: Sequence[NodeSpec], states: Sequence[NodeState], **more: Any) -> NoCapacity:
    with pytest.raises(NoCapacity) as caught:
        place(wanted, nodes=nodes, states=states, **more)
    assert caught.value.retry_after_s > 0
    assert caught.value.resolution
    return caught.value


A_AND_B = [node("a"), node("b")]


# ---- which of those that fit


def test_the_node_that_promised_least_of_itself_is_chosen() -> None:
    assert place(need(), nodes=A_AND_B, states=[seen("a", memory_gb=4), seen("b")]).node.id == "b"
    # 6 of 64 GB is less than 2 of 16.
    states = [seen("a", memory_gb=2), seen("b", gib=64, memory_gb=6)]
    assert place(need(), nodes=A_AND_B, states=states).node.id == "b"


def test_what_a_node_runs_out_of_first_counts() -> None:
    states = [seen("a", promised_cpu_cores=3), seen("b", memory_gb=4)]
    assert place(need(), nodes=A_AND_B, states=states).node.id == "b"
    states = [seen("a", instances=8), seen("b", memory_gb=4)]
    assert place(need(), nodes=A_AND_B, states=states).node.id == "b"
    states = [seen("a", disk_gib=50, promised_disk_mib=80 * 1024), seen("b", disk_gib=50, memory_gb=4)]
    assert place(need(), nodes=A_AND_B, states=states).node.id == "b"


def test_of_nodes_that_promised_as_much_the_less_busy_one_is_chosen() -> None:
    assert place(need(), nodes=A_AND_B, states=[seen("a", cpu_percent=90), seen("b")]).node.id == "b"
    assert place(need(), nodes=A_AND_B, states=[seen("a", memory_percent=90), seen("b")]).node.id == "b"


def test_a_burst_is_spread_though_the_load_is_not_seen_yet() -> None:
    nodes = [node(name, max_instances=100, ports=PortRange()) for name in "abc"]
    states = [seen("a", gib=64, cpu_percent=5), seen("b", gib=64, cpu_percent=30), seen("c", gib=64)]
    chosen = []
    for _ in range(60):
        found = place(need(cpu_cores=0, ports=0), nodes=nodes, states=states).node.id
        chosen.append(found)
        states = [
            state._replace(promised_memory_mib=state.promised_memory_mib + 1024, instances=state.instances + 1)
            if state.id == found
            else state
            for state in states
        ]
    assert min(chosen.count(name) for name in "abc") >= 15


def test_nodes_that_are_alike_are_taken_by_name() -> None:
    assert place(need(), nodes=[node("b"), node("a")], states=[seen("a"), seen("b")]).node.id == "a"


# ---- preferences


def test_the_preferred_node_is_chosen_while_it_has_room() -> None:
    wanted = need(node_preference="a")
    there = place(wanted, nodes=A_AND_B, states=[seen("a", memory_gb=4), seen("b")])
    assert (there.node.id, there.note) == ("a", None)
    elsewhere = place(wanted, nodes=A_AND_B, states=[seen("a", memory_gb=15.5), seen("b")])
    assert elsewhere.node.id == "b"
    assert elsewhere.note == "node a, which is preferred: 0.5 GB of memory left, 1 needed"


def test_a_strict_preference_takes_no_other_node_and_says_what_that_one_lacks() -> None:
    wanted = need(node_preference="a", strict=True)
    assert place(wanted, nodes=A_AND_B, states=[seen("a", memory_gb=4), seen("b")]).node.id == "a"
    error = refusal(wanted, nodes=A_AND_B, states=[seen("a", memory_gb=15.5), seen("b")])
    assert error.message == "Node a has no room now (node a: 0.5 GB of memory left, 1 needed)."


def test_a_strict_preference_names_a_node() -> None:
    with pytest.raises(InvalidRequest, match="node_strict"):
        place(need(strict=True), nodes=A_AND_B, states=[seen("a"), seen("b")])


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(UnknownNode, match="no node 'x'"):
        place(need(node_preference="x"), nodes=A_AND_B, states=[seen("a"), seen("b")])


def test_the_node_with_the_copy_is_chosen_unless_another_one_is_preferred() -> None:
    states = [seen("a", memory_gb=12), seen("b")]
    assert place(need(home_node="a"), nodes=A_AND_B, states=states).node.id == "a"
    assert place(need(home_node="a", node_preference="b"), nodes=A_AND_B, states=states).node.id == "b"


def test_a_node_with_the_copy_that_will_not_do_is_left_and_it_is_said_why() -> None:
    nodes = [node("a", availability=Availability.CORDONED), node("b")]
    elsewhere = place(need(home_node="a"), nodes=nodes, states=[seen("a"), seen("b")])
    assert (elsewhere.node.id, elsewhere.note) == ("b", "node a, which has its copy: cordoned")
    gone = place(need(home_node="x"), nodes=nodes, states=[seen("a"), seen("b")])
    assert (gone.node.id, gone.note) == ("b", "node x, which has its copy, is not in the cluster any more")


# ---- what a node must have


def test_labels_must_all_match_by_the_file_or_by_the_engine() -> None:
    nodes = [node("a", labels={"zone": "1"}), node("b", labels={"zone": "2", "arch": "special"})]
    states = [seen("a"), seen("b")]
    assert place(need(labels={"zone": "2"}), nodes=nodes, states=states).node.id == "b"
    assert place(need(labels={"zone": "1", "arch": "amd64"}), nodes=nodes, states=states).node.id == "a"
    assert place(need(labels={"arch": "special"}), nodes=nodes, states=states).node.id == "b"
    error = refusal(need(labels={"zone": "2", "arch": "amd64"}), nodes=nodes, states=states)
    assert error.message == "No node has room now (node a: not labelled zone=2; node b: not labelled arch=amd64)."


def test_a_home_on_a_cloud_volume_stays_on_one() -> None:
    cloud = CloudIdentity(instance_id="i-1", zone="z")
    nodes = [node("a"), node("b", volume="ebs", cloud=cloud)]
    states = [seen("a"), seen("b", memory_gb=4)]
    assert place(need(volume="ebs"), nodes=nodes, states=states).node.id == "b"
    assert place(need(volume="docker"), nodes=nodes, states=states).node.id == "a"
    assert place(need(), nodes=nodes, states=states).node.id == "a"


def test_a_home_on_a_cloud_volume_takes_no_disk_of_its_node() -> None:
    nodes = [node("a", volume="ebs", cloud=CloudIdentity(instance_id="i-1", zone="z"))]
    states = [seen("a", disk_gib=5, disk_percent=10)]
    assert place(need(disk_gb=100), nodes=nodes, states=states).node.id == "a"
    full = [seen("a", disk_gib=5, disk_percent=90)]  # its container and its image are there all the same
    assert "disk full, 0.5 GB free" in refusal(need(disk_gb=100), nodes=nodes, states=full).message


def test_a_node_that_is_to_be_left_is_not_taken() -> None:
    assert place(need(avoid={"a": "is to be left"}), nodes=A_AND_B, states=[seen("a"), seen("b")]).node.id == "b"
    wanted = need(avoid={"a": "is to be left"}, node_preference="a", home_node="a")
    assert place(wanted, nodes=A_AND_B, states=[seen("a"), seen("b")]).node.id == "b"
    why = {"a": "is to be left", "b": "an earlier life of it is still to be removed"}
    said = refusal(need(avoid=why), nodes=A_AND_B, states=[seen("a"), seen("b")]).message
    assert "node a: is to be left; node b: an earlier life of it is still to be removed" in said


def test_a_container_gets_no_more_cores_than_its_node_has() -> None:
    limits = Limits(memory=1, cpu=16, disk=2, free_disk_gb=2)
    chosen = choose_place(
        need(cpu_cores=6),
        cluster=ClusterSpec(name="c", nodes=tuple(A_AND_B)),
        nodes=[seen("a"), seen("b", cpu_cores=8, memory_gb=8)],
        limits=limits,
        ports_of=lambda _: frozenset(),
        port_free=lambda *_: True,
    )
    assert chosen.node.id == "b"


@pytest.mark.parametrize("size", [{"memory_gb": 17}, {"cpu_cores": 5}, {"disk_gb": 41}])
def test_a_size_that_no_node_could_ever_have_is_refused(size: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=f"config.{next(iter(size))}.*more than any node has"):
        place(need(**size), nodes=[node("a")], states=[seen("a", disk_gib=20, online=False)])


def test_a_size_is_not_refused_for_good_while_a_node_has_never_said_what_it_has() -> None:
    states = [seen("a"), seen("b", online=False, memory_bytes=None, cpu_cores=None)]
    assert "node b: offline" in refusal(need(memory_gb=17), nodes=A_AND_B, states=states).message
    assert "node b: offline" in refusal(need(cpu_cores=5), nodes=A_AND_B, states=states[:1]).message


def test_a_node_that_left_the_cluster_says_nothing_about_what_others_have() -> None:
    with pytest.raises(InvalidRequest, match="more than any node has"):
        place(need(memory_gb=17), nodes=[node("a")], states=[seen("a"), seen("gone", gib=64)])


# ---- what is said when there is no room


def test_what_is_not_quite_enough_does_not_look_like_enough() -> None:
    lacking = refusal(need(), nodes=[node("a")], states=[seen("a", memory_gb=15.02)])
    assert "0.9 GB of memory left, 1 needed" in lacking.message
    with pytest.raises(InvalidRequest, match=r"15.6 GB is more than any node has \(15.5 GB\)"):
        place(need(memory_gb=15.6), nodes=[node("a")], states=[seen("a", gib=15.58)])


def test_no_room_says_what_each_node_lacks() -> None:
    lacking = {
        "a": (node("a"), seen("a", online=False), "offline"),
        "b": (node("b"), seen("b", memory_gb=15.5), "0.5 GB of memory left, 1 needed"),
        "c": (node("c", max_instances=1), seen("c", instances=1), "has its 1 instances"),
        "d": (node("d", availability=Availability.DRAINING), seen("d"), "draining"),
        "e": (node("e"), seen("e", promised_cpu_cores=4), "0 CPU cores left, 1 needed"),
        "f": (
            node("f"),
            seen("f", disk_gib=20, promised_disk_mib=35 * 1024),
            "5.0 GB of disk left, 10 needed",
        ),
        "g": (node("g"), seen("g", disk_gib=20, disk_percent=95), "disk full, 1.0 GB free"),
    }
    for name, (spec, state, words) in lacking.items():
        assert f"(node {name}: {words})" in refusal(need(), nodes=[spec], states=[state]).message
    closed_since = refusal(need(), nodes=[node("a")], states=[seen("a", availability="cordoned")])
    assert "(node a: cordoned)" in closed_since.message
    never_seen = refusal(need(), nodes=[node("a")], states=[])
    assert "node a: offline" in never_seen.message
    ports = {"a": frozenset(range(21000, 21005))}
    no_ports = refusal(need(), nodes=[node("a")], states=[seen("a")], ports=ports, busy=frozenset(range(21004, 21009)))
    assert "node a: no free port left" in no_ports.message


def test_a_thousand_nodes_are_counted_by_what_they_lack() -> None:
    nodes = [node(f"n{number}") for number in range(1000)]
    states = [seen(f"n{number}", memory_gb=15.2 + number / 1000) for number in range(600)]
    states += [seen(f"n{number}", instances=10) for number in range(600, 999)]
    said = refusal(need(), nodes=nodes, states=states).message
    assert said == (
        "No node has room now (1 node: offline; 399 nodes: have all their instances;"
        " 600 nodes: at most 0.7 GB of memory left, 1 needed)."
    )


@pytest.mark.parametrize(
    ("spec", "state", "advice"),
    [
        (node("a"), seen("a", instances=10), "Delete an instance"),
        (node("a"), seen("a", online=False), "once a node answers"),
        (node("a", availability=Availability.CORDONED), seen("a"), "availability"),
        (node("a", labels={"zone": "2"}), seen("a"), "add one that has it"),
    ],
)
def test_no_room_says_what_to_do(spec: NodeSpec, state: NodeState, advice: str) -> None:
    assert advice in str(
        refusal(need(labels={"zone": "1"} if spec.labels else {}), nodes=[spec], states=[state]).resolution
    )


# ---- whatever the cluster looks like

percents = st.none() | st.floats(0, 100)
labels = st.dictionaries(st.sampled_from(["zone", "gpu"]), st.sampled_from(["1", "2"]), max_size=2)
names = st.sampled_from("abcd")


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[NodeSpec], list[NodeState], dict[str, frozenset[int]]]:
    nodes, states, ports = [], [], {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        volume = draw(st.sampled_from(["docker", "docker", "ebs"]))
        cloud = CloudIdentity(instance_id="i", zone="z") if volume == "ebs" else None
        availability = draw(st.sampled_from([Availability.ACTIVE, Availability.ACTIVE, *Availability]))
        nodes.append(node(name, volume=volume, cloud=cloud, availability=availability, labels=draw(labels)))
        ports[name] = draw(st.frozensets(st.integers(21000, 21009)))
        if draw(st.integers(0, 9)) == 0:
            continue  # never seen
        states.append(
            seen(
                name,
                online=draw(st.sampled_from([True, True, False])),
                availability=draw(st.sampled_from(["active", "active", "draining"])),
                gib=draw(st.sampled_from([1, 4, 16])),
                cpu_cores=draw(st.sampled_from([None, 1, 4])),
                disk_gib=draw(st.sampled_from([None, 5, 100])),
                cpu_percent=draw(percents),
                memory_percent=draw(percents),
                disk_percent=draw(percents),
                instances=draw(st.integers(0, 11)),
                promised_memory_mib=draw(st.integers(0, 17 * 1024)),
                promised_cpu_cores=draw(st.integers(0, 5)),
                promised_disk_mib=draw(st.integers(0, 250 * 1024)),
            )
        )
    return nodes, states, ports


needs = st.builds(
    need,
    memory_gb=st.floats(0.125, 16),
    cpu_cores=st.integers(1, 4),
    disk_gb=st.floats(0.1, 50),
    ports=st.sampled_from([0, 2]),
    labels=labels,
    volume=st.sampled_from([None, None, "docker", "ebs"]),
    node_preference=st.just("a"),
    strict=st.sampled_from([False, False, True]),
    home_node=st.none() | names,
    avoid=st.dictionaries(names, st.just("is to be left"), max_size=1),
)


@settings(deadline=None, max_examples=500)
@given(cluster=clusters(), wanted=needs, busy=st.frozensets(st.integers(21000, 21009)))
def test_a_place_never_breaks_a_limit_and_is_always_the_same(
    cluster: tuple[list[NodeSpec], list[NodeState], dict[str, frozenset[int]]], wanted: Need, busy: frozenset[int]
) -> None:
    nodes, states, ports = cluster

    def choose(specs: Sequence[NodeSpec], seen_now: Sequence[NodeState]) -> Place:
        return place(wanted, nodes=specs, states=seen_now, ports=ports, busy=busy)

    try:
        chosen = choose(nodes, states)
    except (NoCapacity, InvalidRequest) as refused:
        with pytest.raises(type(refused)):
            choose(nodes[::-1], states[::-1])
        return
    state = next(state for state in states if state.id == chosen.node.id)
    assert state.online
    assert chosen.node.availability is Availability.ACTIVE
    assert state.availability == "active"
    assert chosen.node.id not in wanted.avoid
    assert not wanted.strict or chosen.node.id == wanted.node_preference
    assert wanted.labels.items() <= chosen.node.labels.items()
    assert wanted.volume in (None, chosen.node.volume)
    assert state.instances < chosen.node.max_instances
    assert state.memory_bytes is not None
    assert (state.promised_memory_mib + wanted.memory_gb * 1024) * 2**20 <= state.memory_bytes * LIMITS.memory
    assert state.cpu_cores is not None
    assert state.promised_cpu_cores + wanted.cpu_cores <= state.cpu_cores * LIMITS.cpu
    if state.disk_bytes is not None:
        if chosen.node.volume == "docker":
            assert (state.promised_disk_mib + wanted.disk_gb * 1024) * 2**20 <= state.disk_bytes * LIMITS.disk
        assert state.disk_bytes * (1 - (state.disk_percent or 0) / 100) >= LIMITS.free_disk_gb * GIB - 1
    assert len(set(chosen.ports)) == wanted.ports
    assert set(chosen.ports) <= set(range(21000, 21010)) - ports[chosen.node.id] - busy
    assert choose(nodes[::-1], states[::-1]) == chosen
