"""What moves between two nodes, with the real ledger, service and Mover around an engine in memory."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.images import ImageCatalogue
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.moves import Mover
from provisioner.service import InstanceService
from provisioner.settings import Settings
from stacks.spec import Availability, ClusterSpec, NodeSpec, OfflinePolicy
from tests.support.world import ID, NAMES, World, empty_ledger

DAY_S = 86400.0


class Moves:
    """Two nodes, `a` with an instance and `b` with room, and what moves between them."""

    def __init__(self, location: Path | SecretStr, *, action: str = "move") -> None:
        self.world = World(empty_ledger(location))
        self.ledger = self.world.ledger
        nodes = (NodeSpec(id="a", host="unix:///a"), NodeSpec(id="b", host="unix:///b"))
        policy = OfflinePolicy(action=action, after_minutes=1)  # type: ignore[arg-type]
        self.cluster = Cluster(ClusterSpec(name="unit", nodes=nodes, offline=policy))
        self.ledger.nodes.sync(nodes)
        for node in nodes:
            self.observe(node.id, status=NodeStatus.ONLINE)
        self.service = InstanceService(
            self.ledger,
            cluster=self.cluster,
            settings=Settings(),
            catalogue=ImageCatalogue(self.cluster, hosts=DockerHosts()),
            changes=Changes(),
            port_free=lambda _node, _port: True,
        )
        self.restart()

    def restart(self) -> None:
        """Begin anew with what is in the ledger, like a service that was killed."""
        self.world.crash()
        self.mover = Mover(self.ledger, cluster=self.cluster, service=self.service, settings=Settings())

    def observe(self, node_id: str, **values: object) -> None:
        known = {"cpu_cores": 8.0, "memory_bytes": 2**34, "misses": 0, "offline_since": None}
        self.ledger.nodes.observe(node_id, values=known | values)

    def lose(self, node_id: str, *, ago_s: float = DAY_S) -> None:
        self.observe(node_id, status=NodeStatus.OFFLINE, misses=9, offline_since=time.time() - ago_s)

    def mark(self, node_id: str, availability: Availability) -> None:
        spec = self.cluster.spec
        nodes = tuple(n.model_copy(update={"availability": availability}) if n.id == node_id else n for n in spec.nodes)
        self.cluster.replace(spec.model_copy(update={"nodes": nodes}))
        self.ledger.nodes.sync(nodes)

    def add(self, instance_id: str = ID, *, snapshot: bool = True, **fields: object) -> InstanceRecord:
        """Add a running instance on node a, with a verified live snapshot that holds what its home held then."""
        self.world.add(id=instance_id, node_id="a", **fields)
        self.world.settle()
        self.world.engine.made[NAMES.volume_urn(instance_id)] = "old"
        if snapshot:
            self.world.wish(lambda r: lifecycle.wish_live_snapshot(r, reason="test"), instance_id)
            self.world.settle()
        self.world.engine.made[NAMES.volume_urn(instance_id)] = "new"
        return self.ledger.instances.get(instance_id)

    def run(self, *, rounds: int = 6) -> None:
        for _ in range(rounds):
            self.mover._pauses.clear()
            self.mover.step()
            self.world.settle()

    def events(self, kind: str) -> list[str]:
        return [event.message for event in self.ledger.events.list(instance_id=ID) if event.kind == kind]

    @property
    def record(self) -> InstanceRecord:
        return self.ledger.instances.get(ID)
