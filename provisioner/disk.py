"""Watches how much disk the instances use: their home, and what their container wrote above its image.

Where a node's storage can't enforce `disk_gb`, going over it is one event, coming back another, and the browser keeps
running all the while.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import structlog

from provisioner.browser_status import ask_all
from provisioner.cluster import Cluster
from provisioner.docker_hosts.disk import measure_volumes
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.inventory import list_containers
from provisioner.errors import DockerError
from provisioner.health import MOST_NODES_AT_ONCE
from provisioner.idle import up_browsers
from provisioner.ledger import Ledger
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord
from provisioner.states import UP
from stacks.names import Names
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

WELL_BELOW = 0.95
"""Part of `disk_gb` below which the use counts as back: a use that swings around the limit is not many events."""


def disk_limit_bytes(record: InstanceRecord) -> int:
    """Return `disk_gb` in bytes."""
    return int(record.disk_gb * 2**30)


def observe_disk(record: InstanceRecord, *, used_bytes: int) -> Update | None:
    """Note the use, and that it crossed the limit; None when nothing changed."""
    limit = disk_limit_bytes(record)
    over = used_bytes > (limit * WELL_BELOW if record.disk_over else limit)
    if over is record.disk_over:
        return Update(values={"disk_bytes": used_bytes}) if used_bytes != record.disk_bytes else None
    said = f"{used_bytes / 2**30:.2f} GB of its {record.disk_gb:g} GB of disk"
    return Update(
        values={"disk_bytes": used_bytes, "disk_over": over},
        event=("disk_over", f"it uses {said}; it keeps running") if over else ("disk_back", f"it uses {said} again"),
    )


class DiskWatch:
    """Disk use of one cluster's instances."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._names = Names(cluster.name)

    def step(self) -> None:
        """Measure every instance that is up once."""
        _, urls = up_browsers(self._ledger, cluster=self._cluster)
        answers = ask_all(urls)
        homes = {key: answer.home_bytes for key, answer in answers.items() if answer.home_bytes is not None}
        silent = urls.keys() - answers.keys()  # asked again next time
        up: dict[str, list[InstanceRecord]] = {}
        for record in self._ledger.instances.all():
            if record.status in UP and record.id not in silent:
                up.setdefault(record.node_id, []).append(record)
        online = self._ledger.nodes.online()
        nodes = [node for node in self._cluster.nodes if node.id in online and node.id in up]
        used: dict[str, int] = {}
        with ThreadPoolExecutor(max_workers=MOST_NODES_AT_ONCE, thread_name_prefix="machineuse-disk") as pool:
            for found in pool.map(lambda node: self._measure(node, up[node.id], homes=homes), nodes):
                used |= found

        def observe(record: InstanceRecord, _: LoadReader) -> Update | None:
            return observe_disk(record, used_bytes=used[record.id])

        self._ledger.instances.change_many(list(used), observe)

    def _measure(self, node: NodeSpec, records: list[InstanceRecord], *, homes: dict[str, int]) -> dict[str, int]:
        host = self._hosts.of(node)
        try:
            containers = list_containers(host, cluster=self._cluster.name, ledger_id=self._ledger.id, with_sizes=True)
            # Volumes of images without our agent: the engine has to walk through them all, so only where one is.
            volumes = measure_volumes(host) if any(record.id not in homes for record in records) else {}
        except DockerError as error:
            log.warning("disk not measured", node=node.id, error=error.message, detail=error.detail)
            return {}
        layers = {container.name: container.layer_bytes or 0 for container in containers}
        used: dict[str, int] = {}
        for record in records:
            home = homes.get(record.id, volumes.get(self._names.docker_volume(record.id)))
            layer = layers.get(self._names.docker_container(record.id))
            if home is not None and layer is not None:
                used[record.id] = home + layer
        return used
