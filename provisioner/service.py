"""What callers may ask of instances: each verb writes a wish into the ledger and wakes the converger.

Everything that can be refused is refused here, at once, from the ledger: nothing waits for an update to be told no.
Nothing here changes anything on a node. `outcome` waits for what becomes of a wish.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from provisioner import lifecycle
from provisioner.changes import RECHECK_S, Changes
from provisioner.cluster import Cluster
from provisioner.errors import (
    Conflict,
    LedgerUnavailable,
    MachineuseError,
    NotFound,
    SnapshotCorrupt,
    SnapshotFailed,
    SnapshotKeyMissing,
    SnapshotMissing,
)
from provisioner.images import ImageCatalogue, ResolvedImage
from provisioner.ledger import Ledger
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord, Moving
from provisioner.placement import Need, Place
from provisioner.placer import Placer, port_is_free
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import NodeSpec

_ID_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"  # no letters that look like others
QUICK_START = "quick_start"
FULL_RESTORE = "full_restore"

_RAISED_FROM_RECORD: dict[str, type[MachineuseError]] = {
    error.code: error for error in (SnapshotFailed, SnapshotCorrupt, SnapshotKeyMissing, SnapshotMissing)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateRequest:
    """A new instance, as a caller asks for it."""

    image: str
    memory_gb: float
    cpu_cores: int
    disk_gb: float
    idle_timeout_minutes: int
    auto_snapshot: bool
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """What the node's labels must say."""
    node_preference: str | None = None
    node_strict: bool = False
    """Whether only the preferred node will do."""


class InstanceService:
    """The verbs."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: Cluster,
        settings: Settings,
        catalogue: ImageCatalogue,
        changes: Changes,
        kill: Callable[[InstanceRecord], None] = lambda _: None,
        port_free: Callable[[NodeSpec, int], bool] = port_is_free,
    ) -> None:
        """Serve one cluster. `kill` ends an instance's container at once, without being waited for."""
        self._ledger = ledger
        self._cluster = cluster
        self._catalogue = catalogue
        self._changes = changes
        self._kill = kill
        self._placer = Placer(cluster, settings=settings, port_free=port_free)

    def create(self, request: CreateRequest) -> InstanceRecord:
        """Want a new instance. Raises InvalidRequest (image, node, size) and NoCapacity."""
        online = self._ledger.nodes.online()
        if not online:  # nobody could say whether there is such an image: refuse for what is known
            with self._ledger.instances.reader() as loads:
                self._placer.place(_need_of(request, ports=0), loads=loads)
        preferred = sorted(
            self._cluster.nodes, key=lambda node: (node.id not in online, node.id != request.node_preference)
        )
        image = self._catalogue.resolve(request.image, nodes=preferred)

        def draft(loads: LoadReader) -> tuple[InstanceRecord, str]:
            need = _need_of(request, ports=2 if image.browser else 0)
            return self._draft(request, image=image, place=self._placer.place(need, loads=loads))

        return self._woken(self._ledger.instances.create(draft))

    def make_dormant(self, instance_id: str, *, reason: str = "asked for by a caller") -> InstanceRecord:
        """Want the instance dormant. Raises NotFound, Conflict, and SnapshotFailed where its node is offline."""

        def decide(record: InstanceRecord, loads: LoadReader) -> Update | None:
            update = lifecycle.wish_dormant(record, reason=reason)
            if update is not None and record.moving is None and not loads.is_online(record.node_id):
                raise SnapshotFailed(
                    f"Node {record.node_id} does not answer, so no snapshot of instance {record.id} can be taken now.",
                    resolution="Retry once its node is online; the instance stays as it is.",
                )
            return update

        return self._wish(instance_id, decide)

    def revive(
        self,
        instance_id: str,
        *,
        method: str,
        node_preference: str | None = None,
        node_strict: bool = False,
    ) -> InstanceRecord:
        """Want a dormant instance back: on the preferred node, on the one with its copy, or on any that will do.

        Raises NotFound, Conflict, InvalidRequest (node) and NoCapacity.
        """

        def decide(record: InstanceRecord, loads: LoadReader) -> Update | None:
            if record.wanted is Wanted.RUNNING and record.operation in ("reviving", "moving"):
                return None  # being revived already: this caller waits for the same outcome
            lifecycle.check_revivable(record)
            place = self._placer.place_again(record, loads=loads, node_preference=node_preference, strict=node_strict)
            return lifecycle.wish_revived(
                record,
                method=method,
                node_id=place.node.id,
                ports=place.ports,
                volume=place.node.volume,
                disk_enforced=place.disk_enforced,
                why_there=place.note,
            )

        return self._wish(instance_id, decide)

    def drain(self, instance_id: str) -> InstanceRecord:
        """Want a running instance dormant, to be revived on another node. Raises NotFound and NoCapacity."""
        moving = self._ledger.instances.moving()  # by one caller, the Mover: there are no more of them when it decides

        def decide(record: InstanceRecord, loads: LoadReader) -> Update | None:
            self._placer.check_room_elsewhere(record, moving=moving, loads=loads)
            return lifecycle.wish_drained(record)

        return self._wish(instance_id, decide)

    def give_up_body(self, instance_id: str, *, away_s: float, even_running: bool) -> InstanceRecord:
        """Want an instance of a lost node given back elsewhere, if there is a place. Raises NotFound and NoCapacity.

        Unless `even_running`, only one that is still being restored there, which loses nothing by it.
        """
        moving = self._ledger.instances.moving()

        def decide(record: InstanceRecord, loads: LoadReader) -> Update | None:
            if loads.is_online(record.node_id):
                return None  # it is back
            if not even_running and not lifecycle.is_coming_back(record):
                return None  # it came back just before
            self._placer.check_room_elsewhere(record, moving=moving, loads=loads)
            return lifecycle.wish_moved(record, away_s=away_s)

        return self._wish(instance_id, decide)

    def revive_elsewhere(self, instance_id: str) -> InstanceRecord:
        """Revive an instance that is being moved. Raises NotFound, Conflict and NoCapacity."""

        def decide(record: InstanceRecord, loads: LoadReader) -> Update | None:
            if record.moving is None:
                return None
            lifecycle.check_revivable(record)
            place = self._placer.place_again(record, loads=loads)
            return lifecycle.wish_revived(
                record,
                method=FULL_RESTORE,
                node_id=place.node.id,
                ports=place.ports,
                volume=place.node.volume,
                disk_enforced=place.disk_enforced,
            )

        return self._wish(instance_id, decide)

    def delete(self, instance_id: str, *, force: bool) -> InstanceRecord:
        """Want the instance gone, with its snapshots. Raises NotFound."""
        record = self._wish(instance_id, lambda record, _: lifecycle.wish_absent(record, force=force))
        if record.force:
            self._kill(record)
        return record

    async def outcome(self, wished: InstanceRecord, *, timeout_s: float) -> InstanceRecord | None:
        """Wait for what became of a wish: the instance as it then is, or None when it is gone.

        After `timeout_s` returns the instance as it is by then, its operation under way. Raises the error that ended
        the wish, where the instance goes on without it (snapshot failed, archive corrupt), and Conflict when another
        wish took its place. A move off a lost node goes on with the wish: dormant is no outcome halfway through it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changes.subscribe(wished.id) as changed:
            while True:
                try:
                    record = await asyncio.to_thread(self._ledger.instances.find, wished.id)
                except LedgerUnavailable:
                    if time.monotonic() >= deadline:
                        raise
                    await asyncio.sleep(RECHECK_S)  # the wish is in the ledger: what becomes of it can wait
                    continue
                if record is None:
                    if wished.wanted is Wanted.ABSENT:
                        return None
                    raise NotFound(f"Instance {wished.id} was deleted meanwhile.")
                _raise_outcome(record, wished=wished)
                remaining_s = deadline - time.monotonic()
                moves = wished.wanted is Wanted.RUNNING and record.moving is Moving.OFFLINE
                if (record.settled_generation >= wished.generation and not moves) or remaining_s <= 0:
                    return record
                try:
                    await asyncio.wait_for(changed.wait(), min(remaining_s, RECHECK_S))
                except TimeoutError:
                    continue
                changed.clear()

    def _wish(self, instance_id: str, decide: Callable[[InstanceRecord, LoadReader], Update | None]) -> InstanceRecord:
        record = self._ledger.instances.change(instance_id, decide)
        if record is None:
            raise NotFound(f"There is no instance '{instance_id}'.")
        return self._woken(record)

    def _woken(self, record: InstanceRecord) -> InstanceRecord:
        self._changes.notify(record.id)
        self._changes.work.set()
        return record

    def _draft(self, request: CreateRequest, *, image: ResolvedImage, place: Place) -> tuple[InstanceRecord, str]:
        now = time.time()
        debug_port, stream_port = place.ports if image.browser else (None, None)
        record = InstanceRecord(
            id="mu-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(8)),
            node_id=place.node.id,
            image_requested=request.image,
            image=image.image,
            image_base=image.base,
            browser=image.browser,
            memory_gb=request.memory_gb,
            cpu_cores=request.cpu_cores,
            disk_gb=request.disk_gb,
            disk_enforced=place.disk_enforced,
            idle_timeout_minutes=request.idle_timeout_minutes,
            auto_snapshot=request.auto_snapshot,
            node_labels=request.node_labels,
            volume=place.node.volume,
            created_at=now,
            wanted=Wanted.RUNNING,
            generation=1,
            applied_generation=0,
            settled_generation=0,
            body=True,
            repair=False,
            force=False,
            attempts=0,
            retry_at=0.0,
            status=Status.CREATING,
            status_since=now,
            last_active_at=now,
            debug_port=debug_port,
            stream_port=stream_port,
            disk_bytes=None,
            disk_over=False,
            snapshot_generation=None,
            restore_generation=None,
            restore_method=None,
            restored_by=None,
            restore_note=None,
            error_code=None,
            error_message=None,
            error_generation=None,
        )
        runs = image.image if image.image == image.requested else f"{image.image} for '{image.requested}'"
        base = f" (built on {image.base})" if image.base else ""
        note = f" ({place.note})" if place.note else ""
        return record, f"to run {runs}{base} on node {place.node.id}{note}"


def _need_of(request: CreateRequest, *, ports: int) -> Need:
    return Need(
        memory_gb=request.memory_gb,
        cpu_cores=request.cpu_cores,
        disk_gb=request.disk_gb,
        ports=ports,
        labels=request.node_labels,
        node_preference=request.node_preference,
        strict=request.node_strict,
    )


def _raise_outcome(record: InstanceRecord, *, wished: InstanceRecord) -> None:
    """Raise what ended the wish, if something did and the instance goes on without it."""
    if record.error_generation == wished.generation and record.error_code in _RAISED_FROM_RECORD:
        raise _RAISED_FROM_RECORD[record.error_code](record.error_message or "It failed.")
    if record.error_generation == wished.generation and wished.wanted is Wanted.DORMANT:
        raise SnapshotFailed(record.error_message or "The snapshot failed.")
    if record.error_generation == wished.generation and wished.restore_generation is not None:
        raise Conflict(record.error_message or "It could not be revived.")
    if record.wanted is Wanted.ABSENT and wished.wanted is not Wanted.ABSENT:
        raise Conflict(f"Instance {record.id} is being deleted.")
