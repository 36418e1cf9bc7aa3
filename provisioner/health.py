"""Listens to the heartbeats of the nodes: each node's engine is asked for a sign of life, and what it has.

A node is offline after several misses in a row and online again with its first answer; each change is one event. From
the first miss on no update waits for it, and from the last on nobody does.
An engine that hangs costs one thread, its own, for a bounded time: it is not asked again before that thread is back.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import structlog

from provisioner import lifecycle, machine
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.disk import can_limit_volumes
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.images import ARCHITECTURES
from provisioner.errors import DockerError, NotFound
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeStatus
from provisioner.settings import Settings
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

MOST_NODES_AT_ONCE = 64
"""Nodes that are asked side by side; those that hang each hold one of these threads."""


class NodeHealth:
    """The heartbeats of one cluster's nodes."""

    def __init__(
        self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts, settings: Settings, changes: Changes
    ) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._settings = settings
        self._changes = changes
        self._pool = ThreadPoolExecutor(max_workers=MOST_NODES_AT_ONCE, thread_name_prefix="machineuse-heartbeat")
        self._beats: dict[str, Future[None]] = {}
        self._quotas: dict[tuple[str, str], bool] = {}
        """Whether a node's volumes can be limited, by its id and host; asked once a connection."""
        self._meters: defaultdict[str, machine.CpuMeter] = defaultdict(machine.CpuMeter)

    def step(self) -> None:
        """Ask every node whose last answer is in; return when all answered, at the latest after `heartbeat_s`."""
        self._begin()
        self._gather(timeout_s=self._settings.heartbeat_s)

    def beat_once(self) -> None:
        """Ask every node and wait until each answered or was given up: for the service's start."""
        self._begin()
        self._gather(timeout_s=None)

    def close(self) -> None:
        """Let go of the threads; one that waits for a hanging engine ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        for node in self._cluster.nodes:
            if node.id not in self._beats:
                self._beats[node.id] = self._pool.submit(self._beat, node)

    def _gather(self, *, timeout_s: float | None) -> None:
        done, _ = wait(self._beats.values(), timeout=timeout_s)
        self._beats = {node_id: beat for node_id, beat in self._beats.items() if beat not in done}
        for beat in done:
            beat.result()

    def _beat(self, node: NodeSpec) -> None:
        host = self._hosts.of(node)
        try:
            host.ping()
            info = host.info()
            if (node.id, node.host) not in self._quotas:
                self._quotas[node.id, node.host] = can_limit_volumes(
                    host, cluster=self._cluster.name, ledger_id=self._ledger.id
                )
        except DockerError as error:
            with contextlib.suppress(NotFound):  # the node was removed meanwhile
                self._miss(node, error)
        else:
            with contextlib.suppress(NotFound):
                self._answered(node, info)

    def _answered(self, node: NodeSpec, info: Mapping[str, Any]) -> None:
        was = self._ledger.nodes.get(node.id)
        self._ledger.nodes.observe(
            node.id,
            values={
                "status": NodeStatus.ONLINE,
                "error": None,
                "misses": 0,
                "last_heartbeat": time.time(),
                "offline_since": None,
                "cpu_cores": float(info.get("NCPU") or 0) or None,
                "memory_bytes": int(info.get("MemTotal") or 0) or None,
                "disk_quota": self._quotas[node.id, node.host],
                "labels": _labels_of_engine(info) | node.labels,
            }
            | self._measure(node, info),
            event=None if was.status is NodeStatus.ONLINE else ("node_online", f"node {node.id} answers"),
        )
        if was.misses:
            self._changes.work.set()  # what was kept out of updates
        if was.status is NodeStatus.OFFLINE:
            log.info("node online", node=node.id)
            waiting = [record.id for record in self._ledger.instances.unsettled() if record.node_id == node.id]
            self._ledger.instances.change_many(waiting, lambda record, _: lifecycle.note_node_back(record))
            self._changes.work.set()

    def _measure(self, node: NodeSpec, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return the use of a node that is this machine; of any other, metrics.py and node_disk.py tell."""
        if not machine.is_same_machine(node.host, info):
            return {}
        disk = machine.measure_disk(info["DockerRootDir"])
        return {
            "cpu_percent": self._meters[node.id].read(),
            "memory_percent": machine.memory_percent(),
            "disk_bytes": disk.total_bytes if disk else None,
            "disk_percent": disk.percent if disk else None,
        }

    def _miss(self, node: NodeSpec, error: DockerError) -> None:
        self._quotas.pop((node.id, node.host), None)  # it may come back as another engine
        known = self._ledger.nodes.get(node.id)
        misses = known.misses + 1
        values: dict[str, Any] = {"misses": misses, "error": error.explain()}
        event = None
        if known.status is NodeStatus.ONLINE and misses >= self._settings.offline_after_misses:
            event = ("node_offline", f"node {node.id} does not answer: {error.explain()}")
            log.warning("node offline", node=node.id, error=error.message, detail=error.detail)
        if known.status is NodeStatus.OFFLINE or event is not None:
            values |= {"status": NodeStatus.OFFLINE, "cpu_percent": None, "memory_percent": None, "disk_percent": None}
            values["offline_since"] = known.offline_since or time.time()
        self._ledger.nodes.observe(node.id, values=values, event=event)
        if known.status is NodeStatus.ONLINE:
            # An update that waits for it holds up all others; what takes its time beside them may yet come to an end.
            self._hosts.of(node).hang_up(only_work=event is None)
        if event is not None:
            self._changes.work.set()  # what needs nothing more of the node


def _labels_of_engine(info: Mapping[str, Any]) -> dict[str, str]:
    """Return what an engine says that its machine is, in the words of image platforms; the file's labels come first."""
    arch = str(info.get("Architecture") or "")
    said = {"arch": ARCHITECTURES.get(arch, arch), "os": str(info.get("OSType") or "")}
    return {name: value for name, value in said.items() if value}
