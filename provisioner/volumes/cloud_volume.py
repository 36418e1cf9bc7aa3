"""The volume of an instance's home, from nothing to a file system on its node, and back.

    volume    found by its tags, or created: from nothing, or from the snapshot that the instance is revived from
    attached  to the machine that the instance's node is
    device    awaited on the node, known by the volume's id
    prepared  formatted, or (from a snapshot) checked and grown: once, and then the volume is tagged as somebody's

Each step may be repeated and be cut off anywhere. A create that nobody saw the answer of is asked again with the same
token, and gives the same volume; where the token is spent (its volume was removed), the next one is taken. Half-made
volumes are adopted, or removed where they can't be used; one that is tagged `prepared` is somebody's profile, and is
never removed, moved or formatted on the way to a new one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from provisioner.errors import CloudConflict, CloudError, CloudMissing, SnapshotMissing
from provisioner.volumes.cloud import (
    GENERATION_TAG,
    LIFE_TAG,
    PREPARED_TAG,
    Cloud,
    DeviceNameTaken,
    Owner,
    TokenSpent,
    Volume,
    VolumeBusy,
    VolumeState,
)
from provisioner.volumes.devices import Devices
from provisioner.volumes.waiting import Patience

log = structlog.get_logger(__name__)

TOKENS = 8
"""How many volumes of one wish may have been made and removed before it is given up."""
DEVICE_NAMES = tuple(f"/dev/sd{letter}" for letter in "fghijklmnop") + tuple(
    f"/dev/xvd{first}{second}" for first in "bc" for second in "abcdefghijklmnopqrstuvwxyz"
)
"""What AWS advises for data volumes."""
_NAME_TAG = "Name"


@dataclass(frozen=True, kw_only=True)
class VolumeRequest:
    """Which volume an instance needs, and where."""

    owner: Owner
    name: str
    """For people, in the cloud's console."""
    machine: str
    zone: str
    size_gib: int
    generation: int
    """Of the wish: another one never gets a volume that was made, and removed, for this one."""
    life: int = 0
    """The generation of the snapshot that the instance was revived from, 0 for its first life."""
    snapshot_id: Callable[[], str | None] = lambda: None
    """What the volume is made from; asked only where one has to be made."""
    given_up: frozenset[str] = frozenset()
    """Machines that are known to be away, and whose volumes may be taken from them."""


@dataclass(frozen=True, kw_only=True)
class ReadyVolume:
    """A volume with a file system, on its node."""

    id: str
    device: str
    size_gib: int
    zone: str


class VolumeWork:
    """Makes and removes the volumes of instances in one region."""

    def __init__(
        self,
        cloud: Cloud,
        *,
        patience: Patience | None = None,
        wanted: Callable[[], bool] = lambda: True,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Work until it is not `wanted` any more."""
        self._cloud = cloud
        self._patience = patience or Patience()
        self._wanted = wanted
        self._progress = progress

    def ensure(self, request: VolumeRequest, *, devices: Devices) -> ReadyVolume:
        """Return the instance's volume, ready to be mounted on its node; makes what is missing. Idempotent.

        Raises:
            SnapshotMissing: the cloud does not have the snapshot that it is to be made from.
            CloudConflict: there is one already, which can't be had without risking what is on it.
            CloudError: the cloud could not, or not in time.
        """
        started = time.monotonic()
        volume = self.ensure_volume(request)
        volume = self.ensure_attached(volume, request)
        device = devices.find(volume.id, size_gib=volume.size_gib, timeout_s=self._patience.device_s)
        self.ensure_prepared(volume, device, request=request, devices=devices)
        log.info(
            "cloud volume ready",
            instance=request.owner.instance,
            volume=volume.id,
            device=device,
            seconds=round(time.monotonic() - started, 2),
        )
        return ReadyVolume(id=volume.id, device=device, size_gib=volume.size_gib, zone=volume.zone)

    def ensure_volume(self, request: VolumeRequest) -> Volume:
        """Return the instance's volume, wherever it is attached; creates it where there is none."""
        usable: list[Volume] = []
        for volume in self._find(request.owner):
            if volume.state is VolumeState.ERROR and not volume.prepared:
                self._remove(volume)
            elif volume.tags.get(LIFE_TAG) == str(request.life):
                usable.append(volume)
            elif not volume.prepared and volume.attachment is None:
                self._remove(volume)  # half-made for an earlier life
        kept = self._choose(usable, request)
        if kept is None:
            kept = self._create(request)
        return self._await_state(kept.id, VolumeState.AVAILABLE, VolumeState.IN_USE)

    def _choose(self, volumes: list[Volume], request: VolumeRequest) -> Volume | None:
        """Return the volume to use; removes half-made ones that are in its way."""
        prepared = [volume for volume in volumes if volume.prepared]
        if len(prepared) > 1:
            raise CloudConflict(
                f"Instance {request.owner.instance} has several volumes: {', '.join(v.id for v in prepared)}.",
                resolution="Find out which one holds its profile, and delete the others.",
            )
        here = [v for v in volumes if v.zone == request.zone and v.size_gib >= request.size_gib]
        if prepared and prepared[0].state is VolumeState.ERROR:
            raise CloudConflict(
                f"Volume {prepared[0].id} of instance {request.owner.instance} has failed.",
                resolution="Make what can be saved of it a snapshot in the cloud's console, then delete the instance.",
            )
        if prepared and prepared[0] not in here:
            wrong = prepared[0]
            raise CloudConflict(
                f"Volume {wrong.id} of instance {request.owner.instance} is in {wrong.zone} and has {wrong.size_gib}"
                f" GiB; the node is in {request.zone} and {request.size_gib} GiB are needed.",
                resolution="A volume can't leave its zone: correct cloud.zone of the node, or use one in that zone.",
            )
        ours = [v for v in here if v.attachment is not None and v.attachment.machine == request.machine]
        # The same for everybody who looks: prepared, attached here, oldest.
        rank = sorted(here, key=lambda v: (v not in prepared, v not in ours, v.created_at is None, v.created_at, v.id))
        for volume in volumes:
            if rank and volume.id == rank[0].id:
                continue
            log.warning("half-made volume removed", instance=request.owner.instance, volume=volume.id)
            self._remove(volume)
        return rank[0] if rank else None

    def _create(self, request: VolumeRequest) -> Volume:
        self._check_machine(request)
        source = request.snapshot_id()
        tags = request.owner.all_tags | {
            GENERATION_TAG: str(request.generation),
            LIFE_TAG: str(request.life),
            _NAME_TAG: request.name,
        }
        self._progress(f"creating a volume of {request.size_gib} GiB in {request.zone}")
        for attempt in range(TOKENS):
            try:
                made = self._cloud.create_volume(
                    token=_token(request, source=source, attempt=attempt),
                    zone=request.zone,
                    size_gib=request.size_gib,
                    snapshot_id=source,
                    tags=tags,
                )
            except TokenSpent:
                continue
            except CloudMissing as error:
                raise SnapshotMissing(
                    f"There is no snapshot {source} in {self._cloud.region} any more.", detail=error.detail
                ) from error
            try:
                volume = self._await_state(
                    made.id,
                    VolumeState.AVAILABLE,
                    VolumeState.IN_USE,
                    VolumeState.ERROR,
                    VolumeState.DELETING,
                    VolumeState.DELETED,
                )
            except CloudMissing:
                continue  # a volume of an earlier try, removed since
            if volume.state is VolumeState.ERROR:
                self._remove(volume)
            elif not volume.gone:
                return volume
        raise CloudError(
            f"No volume of {request.size_gib} GiB could be made in {request.zone}: {TOKENS} of them failed.",
            resolution="Look into the cloud's console: quota, zone, and the key that volumes are encrypted with.",
        )

    def _check_machine(self, request: VolumeRequest) -> None:
        """Raise CloudError for a machine that is elsewhere, before there is a volume that could not be attached."""
        resolution = "Correct cloud.instance_id and cloud.zone of the node in the cluster's file."
        try:
            machine = self._cloud.describe_machine(request.machine)
        except CloudMissing as error:
            raise CloudError(
                f"There is no machine {request.machine} in {self._cloud.region}.",
                detail=error.detail,
                resolution=resolution,
            ) from error
        if machine.zone != request.zone:
            raise CloudError(
                f"Machine {machine.id} is in {machine.zone}, and its node says {request.zone}.", resolution=resolution
            )

    def ensure_attached(self, volume: Volume, request: VolumeRequest) -> Volume:
        """Attach a volume to its node's machine; takes it from another one only if that does not run any more."""
        if volume.attachment is not None and volume.attachment.machine != request.machine:
            self._take_from(volume, request)
            volume = self._await_detached(volume.id)
        if volume.attachment is not None and volume.attachment.leaving:
            volume = self._await_detached(volume.id)  # cut off there, before
        if volume.attachment is None:
            self._progress(f"attaching volume {volume.id}")
            self._attach(volume.id, request.machine)
        return self._await(
            volume.id,
            lambda v: v.state is VolumeState.IN_USE and v.attachment is not None and v.attachment.state == "attached",
            what=f"Volume {volume.id} is not attached to {request.machine}",
        )

    def _attach(self, volume_id: str, machine: str) -> None:
        names = {v.attachment.device for v in self._cloud.find_attached(machine) if v.attachment is not None}
        for device in DEVICE_NAMES:
            if device in names:
                continue
            try:
                self._cloud.attach(volume_id, machine=machine, device=device)
            except DeviceNameTaken:
                continue  # of the machine's own disks, or taken a moment ago
            except VolumeBusy:
                # Another attempt, whose answer was lost, was first.
                found = self._cloud.describe_volume(volume_id)
                if found.attachment is None or found.attachment.machine != machine:
                    raise
            return
        raise CloudError(
            f"Machine {machine} has no device name left for another volume.",
            resolution="Let the node have fewer instances (max_instances).",
        )

    def _take_from(self, volume: Volume, request: VolumeRequest) -> None:
        assert volume.attachment is not None
        holder = volume.attachment.machine
        force = holder in request.given_up
        try:
            runs = self._cloud.describe_machine(holder).runs
        except CloudMissing:
            runs = False
        if runs and not force:
            raise CloudConflict(
                f"Volume {volume.id} of instance {request.owner.instance} is attached to machine {holder}, which runs.",
                resolution=f"Make the instance dormant there first; if that machine is lost, stop it in the console,"
                f" and it is attached to {request.machine} then.",
            )
        log.warning("volume taken from another machine", volume=volume.id, machine=holder, forced=force and runs)
        self._cloud.detach(volume.id, machine=holder, force=force and runs)

    def ensure_prepared(self, volume: Volume, device: str, *, request: VolumeRequest, devices: Devices) -> None:
        """Make, or check and grow, the file system, once; a volume that is tagged as prepared is only looked at."""
        if self._cloud.describe_volume(volume.id).prepared:
            devices.check(device, volume_id=volume.id)
            return
        self._progress(f"preparing the file system of volume {volume.id}")
        devices.prepare(device, volume_id=volume.id, blank=request.life == 0 or request.snapshot_id() is None)
        self._cloud.tag(volume.id, {PREPARED_TAG: "true"})

    def release(self, owner: Owner, *, force: bool = False, allowed: Callable[[], bool] = lambda: True) -> int:
        """Detach and delete every volume of an instance, whatever is on it; return how many there were. Idempotent.

        Nothing may use them any more. `allowed` is asked once they are known: what it lets go was there before it was
        asked, so a volume that is made for a later wish is not among them, however long this was held up. With `force`
        a machine that does not let go is not waited for.
        """
        volumes = self._find(owner)
        if not allowed():
            return 0
        for volume in volumes:
            self._remove(volume, force=force)
        return len(volumes)

    def remove(self, volume_id: str) -> None:
        """Detach and delete one volume, whatever is on it. Idempotent."""
        try:
            volume = self._cloud.describe_volume(volume_id)
        except CloudMissing:
            return
        if not volume.gone:
            self._remove(volume)

    def _find(self, owner: Owner) -> list[Volume]:
        return [volume for volume in self._cloud.find_volumes(owner.tags) if not volume.gone]

    def _remove(self, volume: Volume, *, force: bool = False) -> None:
        try:
            if volume.attachment is not None:
                self._progress(f"detaching volume {volume.id}")
                self._cloud.detach(volume.id, machine=volume.attachment.machine, force=force)
            if volume.attachment is not None or volume.state in (VolumeState.CREATING, VolumeState.IN_USE):
                self._await_detached(volume.id)
            self._cloud.delete_volume(volume.id)
        except CloudMissing:
            return
        self._await(volume.id, lambda v: v.gone, what=f"Volume {volume.id} is not deleted", missing_is_done=True)
        log.info("cloud volume removed", volume=volume.id)

    def _await_detached(self, volume_id: str) -> Volume:
        return self._await(
            volume_id,
            lambda v: v.attachment is None and v.state in (VolumeState.AVAILABLE, VolumeState.ERROR),
            what=f"Volume {volume_id} is not detached",
        )

    def _await_state(self, volume_id: str, *states: VolumeState) -> Volume:
        return self._await(volume_id, lambda v: v.state in states, what=f"Volume {volume_id} is not there")

    def _await(
        self, volume_id: str, accept: Callable[[Volume], bool], *, what: str, missing_is_done: bool = False
    ) -> Volume:
        """Wait until a volume is as wanted. One that is not known is waited for a little: listings lag behind."""
        unknown_until = self._patience.clock() + self._patience.visible_s
        last: list[Volume] = []

        def look() -> Volume | None:
            try:
                volume = self._cloud.describe_volume(volume_id)
            except CloudMissing:
                if missing_is_done:
                    return last[-1] if last else _GONE
                if self._patience.clock() >= unknown_until:
                    raise
                return None
            last.append(volume)
            return volume if accept(volume) else None

        return self._patience.await_that(look, what=what, limit_s=self._patience.volume_s, wanted=self._wanted)


_GONE = Volume(id="", state=VolumeState.DELETED, zone="", size_gib=0)


def _token(request: VolumeRequest, *, source: str | None, attempt: int) -> str:
    what = (request.owner.ledger_id, request.owner.urn, request.generation, request.life, request.zone)
    return hashlib.sha256(repr((*what, request.size_gib, source, attempt)).encode()).hexdigest()
