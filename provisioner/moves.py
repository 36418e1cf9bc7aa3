"""Moves instances to other nodes: off a node that is drained, and off one that is lost where the cluster says so.

A move is two things that exist anyway, one after the other: the instance is made dormant, and then revived elsewhere.

    drained   a snapshot is taken first, so nothing is lost; one instance at a time, those in use last
    lost      the last verified snapshot has to do; what came after it is lost, and events and instance say so. The
              body on the lost node is given up: noted as left over, and removed when the node is back. What was only
              being restored there has nothing to lose, and is moved even where the others are to wait

Nothing is given up or put to sleep before another node has room for it. The ledger says which instances are on their
way (`moving`), so a move that a crash interrupts goes on after it, and uncordoning a node only stops the next ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import structlog

from provisioner import lifecycle
from provisioner.cluster import Cluster
from provisioner.errors import Conflict, InvalidRequest, NoCapacity, NotFound
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord, Moving, NodeRecord, NodeStatus
from provisioner.service import InstanceService
from provisioner.settings import Settings
from provisioner.states import UP, Status, Wanted
from stacks.spec import Availability

log = structlog.get_logger(__name__)

MAX_PAUSE_S = 60.0
TELL_AGAIN_S = 600.0
"""When it is told anew why an instance can't be moved, if that has changed: how much room is left always does."""


class Mover:
    """Moves the instances of one cluster."""

    def __init__(self, ledger: Ledger, *, cluster: Cluster, service: InstanceService, settings: Settings) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._service = service
        self._settings = settings
        self._told: dict[str, tuple[str, float]] = {}
        """What was said of an instance last, and when."""
        self._pauses: dict[str, tuple[float, float]] = {}
        """Until when an instance is left alone after a move that did not work, and for how long that was."""

    def step(self) -> None:
        """Begin and continue whatever moves are due."""
        now = time.monotonic()  # what has not been tried again for so long has got where it was to go
        self._pauses = {id_: pause for id_, pause in self._pauses.items() if now < pause[0] + MAX_PAUSE_S}
        nodes = {node.id: node for node in self._ledger.nodes.list()}
        lost = {node.id: node for node in nodes.values() if node.status is NodeStatus.OFFLINE}
        for node in lost.values():
            self._leave_lost_node(node)
        if lost:
            self._redirect(lost)
        moving = self._ledger.instances.moving()
        for record in moving:
            if record.wanted is Wanted.DORMANT and record.settled_generation >= record.generation:
                self._try(record, self._service.revive_elsewhere)
        if any(record.moving is Moving.DRAIN and not _is_held_up(record, silent=lost) for record in moving):
            return
        for node_id in [spec.id for spec in self._cluster.nodes if spec.availability is Availability.DRAINING]:
            if node_id in nodes and nodes[node_id].status is NodeStatus.ONLINE:
                self._drain_one(node_id)

    def _redirect(self, lost: Mapping[str, NodeRecord]) -> None:
        """Begin anew elsewhere what was to be revived on a lost node, whatever the policy: there is nothing to lose."""
        for record in self._ledger.instances.unsettled():
            if record.node_id in lost and lifecycle.is_coming_back(record):
                self._give_up_body(record, node=lost[record.node_id], even_running=False)

    def _leave_lost_node(self, node: NodeRecord) -> None:
        policy = self._cluster.spec.offline
        if policy.action != "move" or _away_s(node) < policy.after_minutes * self._settings.minute_s:
            return
        for record in self._ledger.instances.on_node(node.id):
            if not lifecycle.waits_for_node(record):
                continue
            if record.status is Status.FAILED:
                self._tell(record, f"node {node.id} is lost, but a failed instance can't be moved: it waits for it")
            elif record.last_verified is None:
                self._tell(record, f"node {node.id} is lost, and it has no snapshot: it waits for the node")
            else:
                self._give_up_body(record, node=node, even_running=True)

    def _give_up_body(self, record: InstanceRecord, *, node: NodeRecord, even_running: bool) -> None:
        def give_up(instance_id: str) -> InstanceRecord:
            return self._service.give_up_body(instance_id, away_s=_away_s(node), even_running=even_running)

        self._try(record, give_up)

    def _drain_one(self, node_id: str) -> None:
        """Begin to move the instance that is used least; the others have their turn when it is there."""
        bodies = [record for record in self._ledger.instances.on_node(node_id) if record.body]
        for record in bodies:
            if record.status is Status.FAILED:
                self._tell(record, f"node {node_id} is drained, but a failed instance can't be moved: delete it")
        ready = [record for record in bodies if record.status in UP and record.settled_generation >= record.generation]
        for record in sorted(ready, key=lambda r: (r.status is not Status.IDLE, r.last_active_at, r.id)):
            if self._try(record, self._service.drain):
                return

    def _try(self, record: InstanceRecord, move: Callable[[str], InstanceRecord]) -> bool:
        """Try one step of a move, unless one did not work a short while ago; return whether it was begun."""
        until, pause_s = self._pauses.get(record.id, (0.0, 0.5))
        if time.monotonic() < until:
            return False
        # Whatever becomes of it: a move that fails further on comes back here, and must not do so again and again.
        pause_s = min(pause_s * 2, MAX_PAUSE_S)
        self._pauses[record.id] = (time.monotonic() + pause_s, pause_s)
        try:
            now = move(record.id)
        except (NoCapacity, InvalidRequest) as error:  # too large by now for any node: one was made smaller, say
            self._tell(record, f"it can't be moved from node {record.node_id} now: {error.explain()}")
            return False
        except (Conflict, NotFound) as error:
            log.debug("not moved", instance=record.id, error=error.message)  # somebody was quicker
            return False
        begun = now.generation != record.generation
        if begun:
            log.info("moving", instance=record.id, node=record.node_id, wanted=now.wanted.value, on=now.node_id)
        return begun

    def _tell(self, record: InstanceRecord, message: str) -> None:
        said, at = self._told.get(record.id, ("", float("-inf")))
        if message == said or time.monotonic() - at < TELL_AGAIN_S:
            return
        self._told[record.id] = (message, time.monotonic())
        log.warning("not moved", instance=record.id, node=record.node_id, reason=message)
        self._ledger.events.add("not_moved", message=message, instance_id=record.id, node_id=record.node_id)


def _away_s(node: NodeRecord) -> float:
    return time.time() - (node.offline_since or time.time())


def _is_held_up(record: InstanceRecord, *, silent: Collection[str]) -> bool:
    """Say whether a move can't go on before a node answers: no other instance needs to wait for it."""
    return record.node_id in silent and not record.sleeps_safely
