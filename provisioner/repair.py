"""Compares what is on the nodes with the ledger: has lost containers made again, and removes what nobody owns.

A container that is gone or stopped though its instance should run is lost: the converger makes it again around the
home volume, which stays. A container or volume with our labels whose instance the ledger does not have, in whatever
state, is an orphan: it is removed when the ledger's events say that the instance was deleted, and only told of when
they don't (an older ledger was put back, say): that may be somebody's profile. Neither is believed at first sight: both
must be seen in two looks in a row, and the ledger is asked once more in the transaction, or right before the removal.

A paused container is not lost. It is one that a live snapshot was being taken of when the service died, or its node
went away: it is resumed, unless that snapshot is still pending, for then its next attempt does so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.containers import remove_container, resume_container
from provisioner.docker_hosts.helpers import remove_helpers
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.inventory import ListedContainer, ListedVolume, list_containers, list_volumes
from provisioner.docker_hosts.volumes import remove_volume
from provisioner.errors import DockerError, NotFound
from provisioner.health import MOST_NODES_AT_ONCE
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord, SnapshotState
from provisioner.lifecycle import DELETED
from provisioner.snapshots.machine import RESTORED_REPOSITORY
from provisioner.states import UP, Wanted
from stacks.names import CONTAINER_TYPE, Names
from stacks.spec import NodeSpec

log = structlog.get_logger(__name__)

SIGHTINGS = 2
"""In how many steps in a row something must be seen before it is acted on."""
VOLUMES_EVERY_STEPS = 6
"""Listing volumes costs an engine more than listing containers, and what is left there is in nobody's way."""

_STOPPED = frozenset({"created", "exited", "dead", "removing"})
_PAUSED = "paused"
_CONTAINER, _VOLUME = "container", "volume"

Seen = TypeVar("Seen", bound=Hashable)


class Sightings:
    """Counts in how many steps in a row each thing was seen."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()

    def see(self, things: Iterable[Seen]) -> list[Seen]:
        """Take what one step saw; return what was seen often enough. What this step did not see starts anew."""
        seen = list(things)
        self._counts = Counter({thing: self._counts[thing] + 1 for thing in seen})
        return [thing for thing in seen if self._counts[thing] >= SIGHTINGS]


class Repair:
    """Looks after what is on the nodes of one cluster."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, hosts: DockerHosts, changes: Changes) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._changes = changes
        self._names = Names(cluster.name)
        self._lost: defaultdict[str, Sightings] = defaultdict(Sightings)
        self._paused: defaultdict[str, Sightings] = defaultdict(Sightings)
        self._orphans: defaultdict[tuple[str, str], Sightings] = defaultdict(Sightings)
        self._old_copies: defaultdict[str, Sightings] = defaultdict(Sightings)
        self._strangers: set[tuple[str, str]] = set()
        self._steps = 0
        self._pool = ThreadPoolExecutor(max_workers=MOST_NODES_AT_ONCE, thread_name_prefix="machineuse-repair")

    def step(self) -> None:
        """Look at every node that is online, all at once."""
        online = self._ledger.nodes.online()
        with_volumes = self._steps % VOLUMES_EVERY_STEPS < SIGHTINGS  # in steps that follow on each other
        self._steps += 1
        looks = [
            self._pool.submit(self._look_at, node, with_volumes=with_volumes)
            for node in self._cluster.nodes
            if node.id in online
        ]
        for look in looks:
            look.result()

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look_at(self, node: NodeSpec, *, with_volumes: bool) -> None:
        host = self._hosts.of(node)
        try:
            self._remove_leftovers(node, host)
            # The node first, then the ledger: what the ledger knows by then can't be an orphan.
            containers = list_containers(host, cluster=self._cluster.name, ledger_id=self._ledger.id)
            volumes = (
                list_volumes(host, cluster=self._cluster.name, ledger_id=self._ledger.id) if with_volumes else None
            )
            records = {record.id: record for record in self._ledger.instances.on_node(node.id)}
            self._find_lost(node, containers, records.values())
            self._resume_paused(node, host, containers, records)
            self._remove_orphans(node, host, kind=_CONTAINER, owners=[(c.instance_id, c.name) for c in containers])
            if volumes is not None:
                self._remove_orphans(node, host, kind=_VOLUME, owners=[(v.instance_id, v.name) for v in volumes])
                self._remove_old_copies(node, host, volumes=volumes, records=records)
        except DockerError as error:
            log.warning("look at a node failed", node=node.id, error=error.message, detail=error.detail)

    # ---- lost

    def _find_lost(self, node: NodeSpec, containers: list[ListedContainer], records: Iterable[InstanceRecord]) -> None:
        by_name = {container.name: container for container in containers}
        reasons: dict[tuple[str, int], str] = {}
        for record in records:
            if not _should_run(record):
                continue
            container = by_name.get(self._names.docker_container(record.id))
            if container is None:
                reasons[record.id, record.generation] = f"its container is gone from node {node.id}"
            elif container.state in _STOPPED:
                reasons[record.id, record.generation] = (
                    f"its container has stopped: {container.status or 'not started'}"
                )
        for instance_id, generation in self._lost[node.id].see(reasons):
            self._repair(instance_id, generation=generation, reason=reasons[instance_id, generation])

    def _repair(self, instance_id: str, *, generation: int, reason: str) -> None:
        try:
            now = self._ledger.instances.change(
                instance_id,
                lambda r, _: lifecycle.wish_repaired(r, reason=reason) if r.generation == generation else None,
            )
        except NotFound:
            return  # deleted meanwhile
        if now is not None and now.generation != generation and now.repair:
            log.warning("container lost", instance=instance_id, reason=reason)
            self._changes.notify(instance_id)
            self._changes.work.set()

    def _resume_paused(
        self,
        node: NodeSpec,
        host: DockerHost,
        containers: Iterable[ListedContainer],
        records: Mapping[str, InstanceRecord],
    ) -> None:
        paused = [each.name for each in containers if each.state == _PAUSED and _may_resume(records, each)]
        for name in self._paused[node.id].see(paused):
            try:
                resume_container(host, name)
            except DockerError as error:
                log.warning("container not resumed", node=node.id, container=name, error=error.message)
                continue
            log.warning("container resumed", node=node.id, container=name)

    # ---- orphans and leftovers

    def _remove_orphans(
        self,
        node: NodeSpec,
        host: DockerHost,
        *,
        kind: str,
        owners: Sequence[tuple[str | None, str]],
    ) -> None:
        known = self._ledger.instances.existing(instance_id for instance_id, _ in owners if instance_id is not None)
        suspects = [(instance_id, name) for instance_id, name in owners if instance_id not in known]
        for instance_id, name in self._orphans[node.id, kind].see(suspects):
            if instance_id is not None and self._ledger.instances.find(instance_id) is not None:
                continue
            if instance_id is None and "-probe-" not in name:
                continue  # the cluster's, not an instance's
            if instance_id is not None and not self._ledger.events.tell_of(DELETED, instance_id=instance_id):
                self._tell_of_stranger(node, kind=kind, name=name, instance_id=instance_id)
                continue
            self._remove_orphan(
                node, host, kind=kind, name=name, instance_id=instance_id, was="belonged to no instance and"
            )

    def _remove_orphan(
        self, node: NodeSpec, host: DockerHost, *, kind: str, name: str, instance_id: str | None, was: str
    ) -> None:
        try:
            if kind == _CONTAINER:
                remove_container(host, name, kill=True)
            else:
                remove_helpers(host, name)
                remove_volume(host, name)
        except DockerError as error:
            log.warning("orphan not removed", node=node.id, kind=kind, name=name, error=error.message)
            return
        log.warning("orphan removed", node=node.id, kind=kind, name=name)
        self._ledger.events.add(
            "orphan_removed",
            message=f"{kind} {name} on node {node.id} {was} was removed",
            instance_id=instance_id,
            node_id=node.id,
        )

    def _remove_old_copies(
        self,
        node: NodeSpec,
        host: DockerHost,
        *,
        volumes: Iterable[ListedVolume],
        records: Mapping[str, InstanceRecord],
    ) -> None:
        """Remove copies of snapshots that are gone, as those go while a node is not in the cluster's file.

        Of snapshots that were, that is: what an older ledger, put back, has yet to come to is kept.
        """
        old = []
        for volume in volumes:
            _, _, generation = volume.name.rpartition("-copy-")
            if not generation.isdigit() or volume.instance_id is None:
                continue
            known = records.get(volume.instance_id)
            record = known or self._ledger.instances.find(volume.instance_id)  # it may live elsewhere by now
            if record is None or int(generation) > record.generation:
                continue
            copy = self._names.docker_copy(record.id, int(generation))
            if volume.name == copy and record.snapshot(int(generation)) is None:
                old.append((record.id, copy))
        for instance_id, name in self._old_copies[node.id].see(old):
            was = "was a copy of a snapshot that is gone, and"
            self._remove_orphan(node, host, kind=_VOLUME, name=name, instance_id=instance_id, was=was)

    def _tell_of_stranger(self, node: NodeSpec, *, kind: str, name: str, instance_id: str) -> None:
        if (node.id, name) in self._strangers:
            return
        self._strangers.add((node.id, name))
        log.warning("unknown instance", node=node.id, kind=kind, name=name)
        self._ledger.events.add(
            "orphan_kept",
            message=f"{kind} {name} on node {node.id} is of an instance that this ledger has never known; it is kept",
            instance_id=instance_id,
            node_id=node.id,
        )

    def _remove_leftovers(self, node: NodeSpec, host: DockerHost) -> None:
        """Remove what a forced delete had to leave while the node did not answer; containers come first in the list."""
        left = self._ledger.leftovers.list(node.id)
        for leftover in sorted(left, key=lambda one: CONTAINER_TYPE not in one.urn):
            try:
                if CONTAINER_TYPE in leftover.urn:
                    remove_container(host, leftover.name, kill=True)
                elif leftover.name.startswith(f"{RESTORED_REPOSITORY}:"):
                    DockerMachine(host, helper_image=self._cluster.helper_image).remove_image(leftover.name)
                else:
                    remove_helpers(host, leftover.name)
                    remove_volume(host, leftover.name)
            except DockerError as error:
                log.warning("leftover not removed", node=node.id, name=leftover.name, error=error.message)
                continue
            log.info("leftover removed", node=node.id, name=leftover.name)
            self._ledger.leftovers.remove(leftover.id)


def _may_resume(records: Mapping[str, InstanceRecord], container: ListedContainer) -> bool:
    record = records.get(container.instance_id or "")
    return (
        record is not None
        and _should_run(record)
        and not any(each.state is SnapshotState.PENDING for each in record.snapshots)
    )


def _should_run(record: InstanceRecord) -> bool:
    return record.wanted is Wanted.RUNNING and record.status in UP and record.settled_generation >= record.generation
