"""Measures placements in a cluster of 1,000 nodes of mixed sizes and zones that fills up with 50,000 instances.

    python -m bench.placement [--nodes 1000] [--instances 50000] [--transactions 300]

First the pure function alone, for each instance, one after the other; from the same order of instances, round robin
over the nodes that have room says how even the result is. Then the ledger with all these instances in it: the decision
inside the write transaction (reading the nodes that changed and their loads, choosing, reading the ports), and the
whole transaction, which puts a new instance on the disk. Before each one, some nodes have a heartbeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from provisioner.ledger import Ledger, tables
from provisioner.ledger.instances import LoadReader
from provisioner.ledger.loads import NodeState, to_mib
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.placement import Limits, Need, Place, choose_place, weigh
from stacks.spec import ClusterSpec, NodeSpec
from tests.support.records import make_record

Result = TypeVar("Result")
LIMITS = Limits(memory=1.0, cpu=16.0, disk=4.0, free_disk_gb=2.0)
SIZES = ((32, 8), (64, 16), (128, 32), (256, 64))
"""GiB of memory and cores of the nodes."""
NEEDS = ((0.5, 1), (1, 1), (1, 2), (2, 2), (4, 4))
"""GiB of memory and cores of the instances."""
ZONES = ("a", "b", "c")
BEATS = 20
"""Heartbeats between two placements: with 1,000 nodes and one every 5 s each, that is ten placements a second."""


def make_nodes(count: int) -> tuple[ClusterSpec, list[NodeState]]:
    """Make the cluster: nodes of four sizes in three zones, each with the live load that happens to be there."""
    specs, states = [], []
    for number in range(count):
        memory_gb, cores = SIZES[number % len(SIZES)]
        zone = ZONES[number % len(ZONES)]
        specs.append(NodeSpec(id=f"n{number:04}", host=f"ssh://n{number}", max_instances=200, labels={"zone": zone}))
        states.append(
            NodeState(
                id=specs[-1].id,
                online=True,
                labels_json=json.dumps({"arch": "amd64", "os": "linux", "zone": zone}),
                cpu_cores=float(cores),
                memory_bytes=memory_gb * 2**30,
                disk_bytes=memory_gb * 16 * 2**30,
                disk_quota=False,
                cpu_percent=random.uniform(0, 60),
                memory_percent=random.uniform(10, 60),
                disk_percent=random.uniform(5, 60),
            )
        )
    return ClusterSpec(name="bench", nodes=tuple(specs)), states


def make_need() -> Need:
    """Make an instance; one in ten asks for a zone."""
    memory_gb, cores = random.choice(NEEDS)
    labels = {"zone": random.choice(ZONES)} if random.random() < 0.1 else {}
    return Need(memory_gb=memory_gb, cpu_cores=cores, disk_gb=10, ports=2, labels=labels)


class Simulation:
    """Places instances on nodes in memory."""

    def __init__(self, cluster: ClusterSpec, states: Sequence[NodeState]) -> None:
        self.cluster = cluster
        self.states = list(states)
        self.ports: dict[str, set[int]] = {state.id: set() for state in states}
        self._index = {state.id: index for index, state in enumerate(states)}
        self._next = 0

    def choose(self, need: Need) -> Place:
        """Choose a place as the service does."""
        return choose_place(
            need,
            cluster=self.cluster,
            nodes=self.states,
            limits=LIMITS,
            ports_of=lambda node_id: frozenset(self.ports[node_id]),
            port_free=lambda *_: True,
        )

    def take_turns(self, need: Need) -> Place:
        """Choose the next node in turn that has room."""
        for _ in self.states:
            index, self._next = self._next, (self._next + 1) % len(self.states)
            node = self.cluster.nodes[index]
            if isinstance(weigh(need, node=node, state=self.states[index], limits=LIMITS), float):
                return Place(node=node, ports=(), disk_quota=False)
        raise SystemExit("the cluster is too small")

    def put(self, need: Need, place: Place) -> None:
        """Note that an instance is there."""
        index = self._index[place.node.id]
        state = self.states[index]
        self.ports[place.node.id].update(place.ports)
        self.states[index] = state._replace(
            instances=state.instances + 1,
            promised_memory_mib=state.promised_memory_mib + to_mib(need.memory_gb),
            promised_cpu_cores=state.promised_cpu_cores + need.cpu_cores,
            promised_disk_mib=state.promised_disk_mib + to_mib(need.disk_gb),
        )

    def imbalance(self) -> str:
        """Return how unevenly the nodes' memory is promised."""
        shares = [state.promised_memory_mib * 2**20 / (state.memory_bytes or 1) for state in self.states]
        mean = statistics.mean(shares)
        return f"std/mean {statistics.pstdev(shares) / mean:.3f}   max/mean {max(shares) / mean:.2f}   mean {mean:.0%}"


def fill_ledger(ledger: Ledger, simulation: Simulation, placed: Sequence[tuple[Need, Place]]) -> None:
    """Write nodes and instances in bulk, as if each had been created."""
    ledger.nodes.sync(simulation.cluster.nodes)
    instances, ports = [], []
    for number, (need, place) in enumerate(placed):
        record = make_draft(need, place, number=number)
        row = {column.name: getattr(record, column.name) for column in tables.instances.columns}
        instances.append(row | {"status": record.status.value, "wanted": record.wanted.value})
        ports += [{"node_id": record.node_id, "port": port, "instance_id": record.id} for port in place.ports]
    engine = sa.create_engine(f"sqlite:///{ledger.location}")
    with engine.begin() as connection:
        for state in simulation.states:
            values = state._asdict() | {"status": NodeStatus.ONLINE.value}
            known = {name: value for name, value in values.items() if name in tables.nodes.columns}
            connection.execute(tables.nodes.update().where(tables.nodes.c.id == state.id).values(**known))
            connection.execute(
                tables.node_loads.insert().values(
                    node_id=state.id,
                    instances=state.instances,
                    memory_mib=state.promised_memory_mib,
                    cpu_cores=state.promised_cpu_cores,
                    disk_mib=state.promised_disk_mib,
                )
            )
        connection.execute(tables.instances.insert(), instances)
        connection.execute(tables.ports.insert(), ports)
    engine.dispose()


def make_draft(need: Need, place: Place, *, number: int) -> InstanceRecord:
    """Make the record of an instance."""
    debug_port, stream_port = place.ports
    return dataclasses.replace(
        make_record(id=f"mu-{number:08}", node_id=place.node.id, debug_port=debug_port, stream_port=stream_port),
        memory_gb=need.memory_gb,
        cpu_cores=need.cpu_cores,
        node_labels=need.labels,
    )


class Stopwatch:
    """Collects how long something took: by the clock, and of the processor, which is what a busy machine leaves."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._wall_s: list[float] = []
        self._cpu_s: list[float] = []

    def time(self, work: Callable[[], Result]) -> Result:
        """Run something and note its times."""
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        result = work()
        self._cpu_s.append(time.thread_time() - cpu_s)
        self._wall_s.append(time.perf_counter() - wall_s)
        return result

    def __str__(self) -> str:
        wall_s = sorted(self._wall_s)
        median, p99 = (
            f"{1000 * found:6.2f} ms" for found in (statistics.median(wall_s), wall_s[len(wall_s) * 99 // 100])
        )
        cpu = f"{1000 * statistics.median(self._cpu_s):6.2f} ms"
        return f"{self._name:<34} median {median}   p99 {p99}   processor {cpu}   n={len(wall_s)}"


def time_transactions(ledger: Ledger, cluster: ClusterSpec, *, count: int, first: int) -> tuple[Stopwatch, Stopwatch]:
    """Create instances in the ledger; return the times of the decisions, and of the whole transactions."""
    decisions, wholes = Stopwatch("reading and choosing, in the ledger"), Stopwatch("the whole transaction")
    for number in range(first, first + count):
        need = make_need()
        for node in random.sample(cluster.nodes, BEATS):
            ledger.nodes.observe(node.id, values={"cpu_percent": random.uniform(0, 60), "last_heartbeat": time.time()})

        def decide(loads: LoadReader, need: Need = need) -> Place:
            return choose_place(
                need,
                cluster=cluster,
                nodes=loads.nodes(),
                limits=LIMITS,
                ports_of=loads.ports,
                port_free=lambda *_: True,
            )

        def draft(loads: LoadReader, need: Need = need, number: int = number) -> tuple[InstanceRecord, str]:
            place = decisions.time(lambda: decide(loads, need))
            return make_draft(need, place, number=number), "bench"

        wholes.time(lambda draft=draft: ledger.instances.create(draft))
    return decisions, wholes


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--instances", type=int, default=50_000)
    parser.add_argument("--transactions", type=int, default=300)
    options = parser.parse_args()
    random.seed(1)
    cluster, states = make_nodes(options.nodes)
    needs = [make_need() for _ in range(options.instances)]
    ours, in_turn = Simulation(cluster, states), Simulation(cluster, states)
    placed: list[tuple[Need, Place]] = []
    choosing = Stopwatch("choosing")
    for need in needs:
        place = choosing.time(lambda need=need: ours.choose(need))
        ours.put(need, place)
        placed.append((need, place))
        in_turn.put(need, in_turn.take_turns(need))
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger.create(Path(directory) / "ledger.db")
        fill_ledger(ledger, ours, placed)
        gc.freeze()  # what this benchmark keeps would be looked through again and again; a service has nothing like it
        decisions, wholes = time_transactions(ledger, cluster, count=options.transactions, first=options.instances)
        ledger.close()
    for line in (
        choosing,
        decisions,
        wholes,
        f"memory promised, ours         {ours.imbalance()}",
        f"memory promised, round robin  {in_turn.imbalance()}",
    ):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
