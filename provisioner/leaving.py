"""Tells how far a node is with giving away its instances, from the ledger alone: for whoever watches a drain.

Nothing here moves anything: the service does, and it goes on whether somebody watches or not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord, NodeRecord, NodeStatus
from provisioner.states import UP, Status, Wanted
from stacks.spec import Availability

SIGN_OF_LIFE_S = 15.0
"""How long after its last heartbeat a service is taken to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving:
    """What is still on a node, by instance id."""

    moving: Mapping[str, str]
    """Those that are on their way, and what is being done about them."""
    stuck: Mapping[str, str]
    """Those that can't be moved now, and why not."""
    waiting: tuple[str, ...]
    """Those whose turn comes."""

    @property
    def left(self) -> int:
        """Return how many are still there."""
        return len(self.moving) + len(self.stuck) + len(self.waiting)


def watch_leaving(ledger: Ledger, *, node_id: str) -> Leaving:
    """Return what is still on the node. Dormant instances are not: they sleep in the snapshot store."""
    moving: dict[str, str] = {}
    stuck: dict[str, str] = {}
    waiting: list[str] = []
    refusals = _refusals(ledger)
    for record in bodies_on(ledger, node_id=node_id):
        if record.operation is not None and record.wanted is not Wanted.RUNNING:
            moving[record.id] = record.operation.replace("_", " ")
        elif record.status is Status.FAILED:
            stuck[record.id] = "it has failed, and can't be moved: delete it"
        elif record.id in refusals:
            stuck[record.id] = refusals[record.id]
        elif record.status not in UP and record.error_message:
            stuck[record.id] = record.error_message
        else:
            waiting.append(record.id)
    return Leaving(moving=moving, stuck=stuck, waiting=tuple(waiting))


def bodies_on(ledger: Ledger, *, node_id: str) -> list[InstanceRecord]:
    """Return the instances that have, or may have, volume and container on the node."""
    return [record for record in ledger.instances.on_node(node_id) if record.body]


def service_runs(ledger: Ledger, *, heartbeat_s: float) -> bool:
    """Say whether some service looks after this ledger's nodes: one of them had a heartbeat just now.

    With all nodes away there is no heartbeat, and no telling.
    """
    beats = [node.last_heartbeat for node in ledger.nodes.list() if node.last_heartbeat is not None]
    return bool(beats) and time.time() - max(beats) < max(SIGN_OF_LIFE_S, 3 * heartbeat_s)


def is_closed(node: NodeRecord | None) -> bool:
    """Say whether the service has taken over that nothing new comes to the node."""
    return node is None or node.availability is not Availability.ACTIVE


def is_away(node: NodeRecord | None) -> bool:
    """Say whether a node is known not to answer."""
    return node is not None and node.status is NodeStatus.OFFLINE


def _refusals(ledger: Ledger) -> dict[str, str]:
    """Return what kept instances from being moved last, unless something happened to them since."""
    last: dict[str, tuple[str, str]] = {}
    for event in ledger.events.list(limit=2000):
        if event.instance_id is not None:
            last[event.instance_id] = (event.kind, event.message)
    return {
        instance_id: message for instance_id, (kind, message) in last.items() if kind in ("not_moved", "sleep_failed")
    }
