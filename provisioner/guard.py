"""Answers our plugins' question before every delete: may this go? From the ledger, which knows what is wanted."""

from __future__ import annotations

from collections.abc import Mapping

from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.lifecycle import DELETED
from provisioner.plugins.policy import DeleteDecision
from provisioner.states import Wanted
from stacks.names import INSTANCE_LABEL, LEDGER_LABEL

BODY_KINDS = frozenset({"container", "volume", "mount", "cloud_volume"})
REMADE_KINDS = frozenset({"container", "mount"})
"""What is remade at once when it is replaced, with nothing lost: the home is elsewhere."""


class LedgerGuard:
    """Refuses to delete what the ledger wants alive, or what belongs to another ledger."""

    def __init__(self, ledger: Ledger, *, stop_timeout_s: int) -> None:
        self._ledger = ledger
        self._stop_timeout_s = stop_timeout_s

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        """Decide from the instance's record; what belongs to no instance may go."""
        instance_id = labels.get(INSTANCE_LABEL)
        if instance_id is None:
            return DeleteDecision(allowed=True)
        owner = labels.get(LEDGER_LABEL)
        if owner is not None and owner != self._ledger.id:
            return DeleteDecision(
                allowed=False,
                reason=f"The {kind} of instance {instance_id} belongs to ledger {owner}, and this is ledger"
                f" {self._ledger.id}. Set MACHINEUSE_DATA_DIR to the data directory of the service that made it.",
            )
        record = self._ledger.instances.find(instance_id)
        if record is not None:
            reason = _reason_to_keep(record, urn=urn, kind=kind, replacing=replacing)
        elif self._ledger.events.tell_of(DELETED, instance_id=instance_id):
            reason = None
        else:
            # An older copy of the ledger, put back, does not know what was made since: that is no reason to delete it.
            reason = (
                f"The {kind} of instance {instance_id} is not deleted: this ledger has never known that instance."
                " If it is not needed, remove it from its node, and from the stack with `pulumi state delete`."
            )
        if reason is not None:
            return DeleteDecision(allowed=False, reason=reason)
        return DeleteDecision(
            allowed=True,
            force=record is not None and record.force,
            abandon=record is not None and self.is_away(_node_of(record, urn=urn, kind=kind)),
            stop_timeout_s=self._stop_timeout_s,
        )

    def is_away(self, node_id: str) -> bool:
        """Say whether a node is known not to answer: whoever asks it all the same holds up the whole update."""
        return self._ledger.nodes.is_offline(node_id)

    def note_leftover(self, *, urn: str, host: str, name: str) -> None:
        """Remember what a forced delete left on a node that did not answer."""
        there = [node.id for node in self._ledger.nodes.list() if node.host == host]
        if len(there) > 1:  # by different `ssh_opts` the same address is another machine: the instance's own it is
            there = [node_id for node_id in there if self._has_instance_of(urn, node_id=node_id)] or there
        if there:
            self._ledger.leftovers.add(node_id=there[0], urn=urn, name=name)

    def _has_instance_of(self, urn: str, *, node_id: str) -> bool:
        return any(f"::{record.id}-" in urn for record in self._ledger.instances.on_node(node_id))

    def note_image(self, *, node_id: str, name: str) -> None:
        """Remember an image that was brought to a node."""
        self._ledger.node_images.note(node_id=node_id, name=name)


def _node_of(record: InstanceRecord, *, urn: str, kind: str) -> str:
    """Return the node that something of an instance is on: a snapshot's copy may be on another than its body."""
    taken = next((s for s in record.snapshots if urn.endswith(f"-snapshot-{s.generation}")), None)
    return taken.node_id if kind == "snapshot" and taken is not None else record.node_id


def _reason_to_keep(record: InstanceRecord, *, urn: str, kind: str, replacing: bool) -> str | None:
    if record.wanted is Wanted.ABSENT:
        return None
    if kind in BODY_KINDS:
        if record.sleeps_safely or (replacing and kind in REMADE_KINDS):
            return None  # snapshotted and verified; or remade
        return (
            f"The {kind} of instance {record.id} is not deleted: the ledger wants the instance"
            f" {record.wanted.value}, and no verified snapshot took its place. Delete the instance through the API,"
            " or make it dormant."
        )
    if kind == "snapshot":
        kept = next((s for s in record.snapshots if urn.endswith(f"-snapshot-{s.generation}")), None)
        if kept is not None and kept.generation not in record.obsolete_snapshots:
            return f"Snapshot {kept.generation} of instance {record.id} is not deleted: the ledger keeps it."
    return None
