"""`machineuse:index:CloudVolume`: the cloud's volume that an instance's home is on, attached to its node and formatted.

It is never replaced: what is on it is the point. A volume that an interrupted run, or the control plane ahead of the
update, made for the same instance and life is adopted.
"""

from __future__ import annotations

from typing import ClassVar

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import CloudConflict, CloudError, CloudMissing, InvalidRequest, StillWanted
from provisioner.plugins.machineuse.inputs import CloudVolumeInputs, parse
from provisioner.plugins.machineuse.shared import MachineuseResource
from provisioner.plugins.policy import DeleteDecision, DeletePolicy
from provisioner.plugins.resources import Call, Created, Difference, Found
from provisioner.plugins.values import Properties
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.store import SnapshotStore
from provisioner.volumes.cloud import Owner, Regions
from provisioner.volumes.cloud_volume import VolumeRequest, VolumeWork
from provisioner.volumes.devices import NodeDevices
from stacks.names import URN_LABEL
from stacks.spec import CloudIdentity


class CloudVolumeType(MachineuseResource):
    """Makes, adopts and removes cloud volumes."""

    model = CloudVolumeInputs
    computed: ClassVar[frozenset[str]] = frozenset({"device", "volumeId"})

    def __init__(self, *, store: SnapshotStore, hosts: DockerHosts, policy: DeletePolicy, regions: Regions) -> None:
        self._store = store
        self._hosts = hosts
        self._policy = policy
        self._regions = regions

    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """See no difference: the URN says whose it is, and nothing else is worth what is on it."""
        del call, id, old_inputs, old_outputs, news
        return Difference()

    def create(self, call: Call, *, inputs: Properties) -> Created:
        """Make the volume, or find the one that there is; raises CloudConflict, CloudError, SnapshotMissing."""
        wanted = parse(CloudVolumeInputs, inputs)
        owner = _owner(wanted, urn=call.urn)
        ready = VolumeWork(
            self._regions.of(_region(wanted)), wanted=lambda: not call.cancelled.is_set(), progress=call.progress
        ).ensure(
            VolumeRequest(
                owner=owner,
                name=wanted.name,
                machine=wanted.machine,
                zone=wanted.zone,
                size_gib=wanted.size_gib,
                generation=wanted.generation,
                life=wanted.restored_generation,
                snapshot_id=lambda: find_source(
                    self._store,
                    instance=wanted.instance,
                    generation=wanted.restored_generation,
                    region=_region(wanted),
                ),
            ),
            devices=NodeDevices(
                wanted.host(self._hosts),
                helper_image=wanted.helper_image,
                name=wanted.name,
                labels=owner.all_tags,
            ),
        )
        return Created(id=ready.id, outputs=inputs | {"volumeId": ready.id, "device": ready.device})

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        """Say whether the volume is still there."""
        del call
        wanted = parse(CloudVolumeInputs, outputs | inputs)
        try:
            volume = self._regions.of(_region(wanted)).describe_volume(id)
        except CloudMissing:
            return None
        return None if volume.gone else Found(id=id, inputs=inputs, outputs=outputs)

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        """Detach and delete the volume, and half-made ones of the same instance.

        Raises:
            StillWanted: the policy says no; nothing was touched.
            CloudError: the cloud could not, and the deletion is not forced. What a forced one leaves is an orphan,
                which the control plane removes later.
        """
        gone = parse(CloudVolumeInputs, outputs | inputs)
        owner = _owner(gone, urn=call.urn)

        def ask() -> DeleteDecision:
            return self._policy.check_delete(
                urn=call.urn, labels=owner.all_tags, kind="cloud_volume", replacing=call.replacing
            )

        decision = ask()
        if not decision.allowed:
            raise StillWanted(decision.reason or f"Volume {id} is still wanted.", detail=f"{URN_LABEL}={call.urn}")
        try:
            work = VolumeWork(self._regions.of(_region(gone)), progress=call.progress)
            work.release(owner, force=decision.force, allowed=lambda: ask().allowed)
            work.remove(id)
        except CloudError as error:
            if not decision.force:
                raise
            call.warn(f"{error.message} Volume {id} is left; it is removed later.")


def find_source(store: SnapshotStore, *, instance: str, generation: int, region: str) -> str | None:
    """Return the cloud's snapshot that a volume of this life is made from; None for a blank one.

    Raises SnapshotMissing and SnapshotCorrupt (a volume never starts blank because its snapshot is not known), and
    CloudConflict for a snapshot in another region.
    """
    if not generation:
        return None
    home = store.read_manifest(SnapshotId(instance_id=instance, generation=generation)).cloud_home
    if home is None:
        return None
    if home.region != region:
        raise CloudConflict(
            f"The home of instance {instance} is the snapshot {home.snapshot_id} in {home.region}, and the node is in"
            f" {region}.",
            resolution=f"Revive it on a node in {home.region}.",
        )
    return home.snapshot_id


def _owner(inputs: CloudVolumeInputs, *, urn: str) -> Owner:
    return Owner(cluster=inputs.cluster, ledger_id=inputs.ledger_id, instance=inputs.instance, urn=urn)


def _region(inputs: CloudVolumeInputs) -> str:
    if not inputs.zone:
        raise InvalidRequest("A CloudVolume needs a zone.")
    return CloudIdentity(instance_id=inputs.machine, zone=inputs.zone).region
