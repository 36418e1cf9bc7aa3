"""Samples what instances and nodes use, and answers questions about it.

An instance's percentages are of what it was given: its CPU cores, its memory, its disk. A node's are of the whole
machine. A node that is not this machine has its CPU and memory summed up from its containers, because a Docker engine
does not tell what else runs there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog

from provisioner import machine
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.inventory import list_containers
from provisioner.docker_hosts.stats import Reading, cpu_percent, read_container
from provisioner.errors import DockerError, InvalidRequest, NodeUnreachable
from provisioner.health import MOST_NODES_AT_ONCE
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord, NodeRecord, NodeStatus
from provisioner.ledger.samples import HOUR, RAW, TEN_MINUTES, Sample, Scope, Usage
from provisioner.states import Status
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

FIRST_WINDOW_S = 0.4
"""CPU use is a difference: a container seen for the first time is read twice, this far apart."""
READS_AT_ONCE = 4
"""Containers of one node that are read at the same time."""
PRUNE_EVERY_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """How a question's period is answered: at most 180 points."""

    length_s: int
    resolution_s: int
    step_s: int


PERIODS: Mapping[str, Period] = {
    "1h": Period(length_s=HOUR, resolution_s=RAW, step_s=30),
    "24h": Period(length_s=24 * HOUR, resolution_s=TEN_MINUTES, step_s=TEN_MINUTES),
    "7d": Period(length_s=7 * 24 * HOUR, resolution_s=HOUR, step_s=HOUR),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsReport:
    """The answer for a cluster or a node: counts of now, use over the period (of the nodes, as machines)."""

    total_instances: int
    running_instances: int
    """Running or idle."""
    avg_cpu_percent: float
    avg_memory_percent: float
    timestamps: tuple[float, ...]
    """When each point's stretch of time began, in seconds since the epoch."""
    cpu: tuple[float, ...]
    memory: tuple[float, ...]


def read_metrics(ledger: Ledger, *, period: str, node_id: str | None = None) -> MetricsReport:
    """Return the metrics of the cluster, or of one node. Raises NotFound (node) and InvalidRequest (period)."""
    if period not in PERIODS:
        raise InvalidRequest(f"period: '{period}' is none of {', '.join(PERIODS)}.")
    if node_id is not None:
        ledger.nodes.get(node_id)
    asked = PERIODS[period]
    points = ledger.samples.series(
        Scope.NODE,
        since=time.time() - asked.length_s,
        resolution_s=asked.resolution_s,
        step_s=asked.step_s,
        subject=node_id,
    )
    samples = sum(point.count for point in points) or 1
    counts = {status: ledger.instances.page(status=status, node_id=node_id, limit=1)[1] for status in Status}
    return MetricsReport(
        total_instances=sum(counts.values()),
        running_instances=counts[Status.RUNNING] + counts[Status.IDLE],
        avg_cpu_percent=round(sum(point.cpu_percent * point.count for point in points) / samples, 2),
        avg_memory_percent=round(sum(point.memory_percent * point.count for point in points) / samples, 2),
        timestamps=tuple(point.at for point in points),
        cpu=tuple(round(point.cpu_percent, 2) for point in points),
        memory=tuple(round(point.memory_percent, 2) for point in points),
    )


class Sampler:
    """Samples one cluster's nodes and instances."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._last: defaultdict[str, dict[str, Reading]] = defaultdict(dict)
        """The last reading of each container, by node and container id."""
        self._meters: defaultdict[str, machine.CpuMeter] = defaultdict(machine.CpuMeter)
        self._steps = 0

    def step(self) -> None:
        """Take one sample of every node that is online and of every instance that runs there."""
        at = time.time()
        records = {record.id: record for record in self._ledger.instances.all()}
        online = {node.id: node for node in self._ledger.nodes.list() if node.status is NodeStatus.ONLINE}
        nodes = [node for node in self._cluster.nodes if node.id in online]
        samples: list[Sample] = []
        with ThreadPoolExecutor(max_workers=MOST_NODES_AT_ONCE, thread_name_prefix="machineuse-sample") as pool:
            for taken in pool.map(lambda node: self._sample(node, online[node.id], records=records), nodes):
                samples.extend(taken)
        self._ledger.samples.add(samples, at=at)
        if self._steps % PRUNE_EVERY_STEPS == 0:
            self._ledger.samples.prune()
        self._steps += 1

    def _sample(self, node: NodeSpec, known: NodeRecord, *, records: Mapping[str, InstanceRecord]) -> list[Sample]:
        host = self._hosts.of(node)
        try:
            info = host.info()
            listed = list_containers(host, cluster=self._cluster.name, ledger_id=self._ledger.id)
            running: dict[str, InstanceRecord] = {}
            for container in listed:
                record = records.get(container.instance_id or "")
                if record is not None and container.state == "running":
                    running[container.id] = record
            before = self._last[node.id]
            readings = self._read(host, list(running))
            fresh = [container_id for container_id in readings if container_id not in before]
            if fresh:
                time.sleep(FIRST_WINDOW_S)
                before = before | {container_id: readings[container_id] for container_id in fresh}
                readings |= self._read(host, fresh)
        except DockerError as error:
            log.warning("sample failed", node=node.id, error=error.message, detail=error.detail)
            return []
        self._last[node.id] = readings
        cores_used, memory_used = 0.0, 0
        samples: list[Sample] = []
        for container_id, reading in readings.items():
            record = running[container_id]
            cpu = cpu_percent(before[container_id], reading, cores=record.cpu_cores)
            if cpu is None:
                continue
            cores_used += cpu / 100 * record.cpu_cores
            memory_used += reading.memory_bytes
            samples.append(Sample(scope=Scope.INSTANCE, subject=record.id, usage=_usage(record, reading, cpu=cpu)))
        node_usage = self._node_usage(node, known, info, cores_used=cores_used, memory_used=memory_used)
        return [*samples, Sample(scope=Scope.NODE, subject=node.id, usage=node_usage)]

    def _read(self, host: DockerHost, container_ids: list[str]) -> dict[str, Reading]:
        def read(container_id: str) -> Reading | None:
            try:
                return read_container(host, container_id=container_id)
            except NodeUnreachable:
                raise
            except DockerError as error:
                log.debug("container not read", container=container_id, error=error.message)
                return None  # gone meanwhile; the others are told all the same

        if not container_ids:
            return {}
        with ThreadPoolExecutor(max_workers=READS_AT_ONCE, thread_name_prefix="machineuse-stats") as pool:
            readings = dict(zip(container_ids, pool.map(read, container_ids), strict=True))
        return {container_id: reading for container_id, reading in readings.items() if reading is not None}

    def _node_usage(
        self, node: NodeSpec, known: NodeRecord, info: Mapping[str, Any], *, cores_used: float, memory_used: int
    ) -> Usage:
        if machine.is_same_machine(node.host, info):
            return Usage(
                cpu_percent=self._meters[node.id].read(),
                memory_percent=machine.memory_percent(),
                disk_percent=known.disk_percent,
            )
        usage = Usage(
            cpu_percent=min(100.0 * cores_used / max(float(info.get("NCPU") or 1), 1.0), 100.0),
            memory_percent=min(100.0 * memory_used / max(int(info.get("MemTotal") or 1), 1), 100.0),
            disk_percent=known.disk_percent,
        )
        self._ledger.nodes.observe(
            node.id,
            values={"cpu_percent": round(usage.cpu_percent, 2), "memory_percent": round(usage.memory_percent, 2)},
        )
        return usage


def _usage(record: InstanceRecord, reading: Reading, *, cpu: float) -> Usage:
    return Usage(
        cpu_percent=cpu,
        memory_percent=min(100.0 * reading.memory_bytes / (record.memory_gb * 2**30), 100.0),
        disk_percent=None if record.disk_bytes is None else 100.0 * record.disk_bytes / (record.disk_gb * 2**30),
    )
