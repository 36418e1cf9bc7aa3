"""Measures how full the disks of nodes on other machines are, where only the engine can tell.

A helper container is asked, whose root is on the file system that has the engine's data. Nodes on this machine are
measured with every heartbeat instead (health.py), which costs nothing there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import structlog

from provisioner import machine
from provisioner.cluster import Cluster
from provisioner.docker_hosts.disk import measure_data_disk
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import DockerError
from provisioner.health import MOST_NODES_AT_ONCE
from provisioner.ledger import Ledger
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)


class NodeDisks:
    """The disks of one cluster's nodes."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts

    def step(self) -> None:
        """Measure every node that is online and elsewhere once, all at the same time."""
        online = self._ledger.nodes.online()
        nodes = [node for node in self._cluster.nodes if node.id in online]
        with ThreadPoolExecutor(max_workers=MOST_NODES_AT_ONCE, thread_name_prefix="machineuse-node-disk") as pool:
            list(pool.map(self._measure, nodes))

    def _measure(self, node: NodeSpec) -> None:
        host = self._hosts.of(node)
        try:
            if machine.is_same_machine(node.host, host.info()):
                return
            total_bytes, used_bytes = measure_data_disk(
                host,
                helper_image=self._cluster.helper_image,
                cluster=self._cluster.name,
                ledger_id=self._ledger.id,
            )
        except DockerError as error:  # it is away just now, or has not got the helpers' image yet
            log.info("disk of a node not measured", node=node.id, error=error.message, detail=error.detail)
            return
        percent = round(100.0 * used_bytes / total_bytes, 2)
        self._ledger.nodes.observe(node.id, values={"disk_bytes": total_bytes, "disk_percent": percent})
