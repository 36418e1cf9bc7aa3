"""Chooses where a cluster's instances go: what placement.py is asked, inside the transaction that makes it binding."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable

from provisioner.cluster import Cluster
from provisioner.errors import InvalidRequest, NoCapacity
from provisioner.ledger.instances import LoadReader
from provisioner.ledger.records import InstanceRecord
from provisioner.placement import Arrivals, Limits, Need, Place, choose_place
from provisioner.settings import Settings
from provisioner.states import Wanted
from stacks.spec import NodeSpec


def port_is_free(node: NodeSpec, port: int) -> bool:
    """Say whether nothing on this machine holds the port; a node elsewhere is taken at the ledger's word.

    An engine behind a Unix socket may be elsewhere too: then the address is not one of this machine's.
    """
    if not node.host.startswith("unix://"):
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((node.bind_ip, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


class Placer:
    """The places of one cluster."""

    def __init__(self, cluster: Cluster, *, settings: Settings, port_free: Callable[[NodeSpec, int], bool]) -> None:
        self._cluster = cluster
        self._limits = Limits(
            memory=settings.memory_overcommit,
            cpu=settings.cpu_overcommit,
            disk=settings.disk_overcommit,
            free_disk_gb=settings.free_disk_gb,
        )
        self._port_free = port_free
        self._arriving: dict[str, tuple[Need, Place]] = {}
        """Where each instance that leaves its node is counted on; the Mover is the only one to ask."""

    def place(self, need: Need, *, loads: LoadReader | Arrivals) -> Place:
        """Return the place for a need. Raises InvalidRequest and NoCapacity."""
        return choose_place(
            need,
            cluster=self._cluster.spec,
            nodes=loads.nodes(),
            limits=self._limits,
            ports_of=loads.ports,
            port_free=self._port_free,
        )

    def place_again(
        self, record: InstanceRecord, *, loads: LoadReader, node_preference: str | None = None, strict: bool = False
    ) -> Place:
        """Return the place for an instance that exists. Raises InvalidRequest and NoCapacity."""
        need = self._need_again(record, loads=loads, node_preference=node_preference, strict=strict)
        return self.place(need, loads=loads)

    def check_room_elsewhere(
        self, record: InstanceRecord, *, moving: Iterable[InstanceRecord], loads: LoadReader
    ) -> None:
        """Raise NoCapacity unless another node has room for the instance, beside all that are on their way already.

        Where those go is not chosen anew for each: a whole rack may be lost, and nobody can write meanwhile.
        """
        arrivals = Arrivals(loads.nodes(), ports_of=loads.ports)
        before, self._arriving = self._arriving, {}
        for other in moving:
            if other.wanted is Wanted.DORMANT and other.id != record.id:
                # That one waits; there may be room for a smaller one.
                with contextlib.suppress(NoCapacity, InvalidRequest):
                    self._count_on(other, before.get(other.id), arrivals=arrivals, loads=loads)
        self._count_on(record, None, arrivals=arrivals, loads=loads)

    def _count_on(
        self, record: InstanceRecord, before: tuple[Need, Place] | None, *, arrivals: Arrivals, loads: LoadReader
    ) -> None:
        """Count on an instance's arrival: where it was counted on before, or elsewhere. Raises NoCapacity."""
        if before is None or not arrivals.has_room(*before, limits=self._limits):
            need = self._need_again(record, loads=loads, leave=True)
            before = need, self.place(need, loads=arrivals)
        arrivals.add(*before)
        self._arriving[record.id] = before

    def _need_again(
        self,
        record: InstanceRecord,
        *,
        loads: LoadReader,
        node_preference: str | None = None,
        strict: bool = False,
        leave: bool = False,
    ) -> Need:
        """Return what an instance that exists needs of a node; to `leave` the one that it is on, if so asked.

        Where something of it is left over, it can't go: that is removed by name, and would be taken for what is left.
        """
        avoid = dict.fromkeys(self._nodes_out_of_reach(record), "out of reach of its home in the cloud")
        avoid |= dict.fromkeys(loads.nodes_with_leftovers(record.id), "an earlier life of it is still to be removed")
        if leave:
            avoid[record.node_id] = "is to be left"
        taken = record.snapshot(record.snapshot_generation)
        return Need(
            memory_gb=record.memory_gb,
            cpu_cores=record.cpu_cores,
            disk_gb=record.disk_gb,
            ports=2 if record.browser else 0,
            labels=record.node_labels,
            volume="ebs" if taken is not None and taken.volume == "ebs" else None,
            node_preference=node_preference,
            strict=strict,
            home_node=taken.node_id if taken is not None else record.node_id,
            avoid=avoid,
        )

    def _nodes_out_of_reach(self, record: InstanceRecord) -> frozenset[str]:
        """Return the nodes that a dormant instance's home can't be given back on: one in the cloud stays in its region.

        Raises NoCapacity where that is all of them.
        """
        kept = record.snapshot(record.snapshot_generation)
        if kept is None or kept.volume != "ebs":
            return frozenset()
        last = self._cluster.node(kept.node_id)
        region = last.cloud.region if last is not None and last.cloud is not None else None
        nodes = self._cluster.nodes
        near = {n.id for n in nodes if n.volume == "ebs" and n.cloud is not None and region in (None, n.cloud.region)}
        if not near:
            raise NoCapacity(
                f"The home of instance {record.id} is a snapshot in the cloud"
                + (f" in {region}" if region else "")
                + ", and the cluster has no node with `volume: ebs` there.",
                resolution="Add such a node to the cluster's file.",
            )
        return frozenset(node.id for node in nodes) - near
