"""Watches who uses the browsers: unused ones become idle, used ones running again, long idle ones go dormant.

Each browser's own agent counts what clients do by CDP and live view; asking it, or asking the API about an instance,
is not use. An agent that does not answer decides nothing, and no decision rests on how long this service was away:
what the agent says now comes first.
"""

from __future__ import annotations

import time

import structlog

from provisioner import lifecycle
from provisioner.browser_status import Ask, agent_url, ask_all
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.errors import Conflict, NotFound, SnapshotFailed
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord
from provisioner.service import InstanceService
from provisioner.settings import Settings
from provisioner.states import UP, Status

log = structlog.get_logger(__name__)


def up_browsers(ledger: Ledger, *, cluster: Cluster) -> tuple[dict[str, InstanceRecord], dict[str, str]]:
    """Return the instances whose browser can be asked now, and where, both by id."""
    online = ledger.nodes.online()
    records: dict[str, InstanceRecord] = {}
    urls: dict[str, str] = {}
    for record in ledger.instances.all():
        node = cluster.node(record.node_id)
        if record.status not in UP or record.debug_port is None or node is None or node.id not in online:
            continue
        records[record.id] = record
        urls[record.id] = agent_url(node, debug_port=record.debug_port)
    return records, urls


class IdleWatch:
    """Idleness of one cluster's instances."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: Cluster,
        settings: Settings,
        service: InstanceService,
        changes: Changes,
        ask: Ask = ask_all,
    ) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._settings = settings
        self._service = service
        self._changes = changes
        self._ask = ask

    def step(self) -> None:
        """Ask every browser that is up once, note what it says, and wish dormancy where it is time."""
        records, urls = up_browsers(self._ledger, cluster=self._cluster)
        answers = self._ask(urls)
        now = time.time()
        last_active = {
            instance_id: now - answer.last_activity_s
            for instance_id, answer in answers.items()
            if answer.last_activity_s is not None
        }

        def observe(record: InstanceRecord) -> Update | None:
            return lifecycle.observe_activity(
                record, last_active_at=last_active[record.id], idle_after_s=self._settings.idle_after_s
            )

        # Most say nothing new: only those that do cost a write.
        news = [instance_id for instance_id in last_active if observe(records[instance_id]) is not None]
        for instance_id in self._ledger.instances.change_many(news, lambda record, _: observe(record)):
            self._changes.notify(instance_id)
        for instance_id, at in last_active.items():
            record = records[instance_id]
            if self._overslept(record, last_active_at=max(at, record.last_active_at), now=now):
                self._let_sleep(record)

    def _overslept(self, record: InstanceRecord, *, last_active_at: float, now: float) -> bool:
        return (
            record.status is Status.IDLE
            and record.auto_snapshot
            and record.idle_timeout_minutes > 0
            and record.settled_generation >= record.generation
            and now - last_active_at >= record.idle_timeout_minutes * self._settings.minute_s
        )

    def _let_sleep(self, record: InstanceRecord) -> None:
        minutes = record.idle_timeout_minutes
        try:
            self._service.make_dormant(record.id, reason=f"idle for {minutes} minute{'s' if minutes != 1 else ''}")
        except (Conflict, NotFound, SnapshotFailed) as error:
            # Somebody was quicker, or its node has gone.
            log.debug("not made dormant", instance=record.id, error=error.message)
        else:
            log.info("idle: to be made dormant", instance=record.id, minutes=minutes)
