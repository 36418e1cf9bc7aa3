"""`machineuse:index:Snapshot`: an instance's home volume and changes, kept while nothing of it runs.

Creating it is taking the snapshot, and only what is verified is created. It is never replaced because its container is
gone: that is what it is for. When its node leaves the cluster, an update removes what that keeps of it, and the archive
is all there is from then on. Deleting it removes the quick copy, the image built from it, and, last, the archive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from typing import ClassVar

import structlog

from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import (
    CloudError,
    DockerError,
    NodeUnreachable,
    SnapshotCorrupt,
    SnapshotKeyMissing,
    SnapshotMissing,
    StillWanted,
)
from provisioner.plugins.machineuse.inputs import SnapshotInputs, differ, parse
from provisioner.plugins.machineuse.shared import MachineuseResource
from provisioner.plugins.policy import DeleteDecision, DeletePolicy
from provisioner.plugins.resources import Call, Change, ChangeKind, Created, Difference, Found
from provisioner.plugins.values import Properties
from provisioner.snapshots.capture import Capture, CaptureRequest, CaptureResult
from provisioner.snapshots.machine import Volumes
from provisioner.snapshots.manifest import Manifest
from provisioner.snapshots.restore import restored_tag
from provisioner.snapshots.store import SnapshotStore
from provisioner.volumes.cloud import Owner, Regions
from provisioner.volumes.cloud_snapshot import SnapshotWork
from provisioner.volumes.devices import NodeDevices
from stacks.names import CLUSTER_LABEL, INSTANCE_LABEL, LEDGER_LABEL, URN_LABEL

log = structlog.get_logger(__name__)

_NODE = "dockerHost"
"""The input that is empty once the snapshot's node has left the cluster."""
_GENERATION_LABEL = "machineuse.generation"


class SnapshotType(MachineuseResource):
    """Takes, finds and removes snapshots."""

    model = SnapshotInputs
    computed: ClassVar[frozenset[str]] = frozenset(
        {
            "manifestSha256",
            "bytes",
            "entries",
            "createdAt",
            "parts",
            "stoppedCleanly",
            "quickCopy",
            "quickCopyError",
            "cloudSnapshot",
        }
    )

    def __init__(self, *, store: SnapshotStore, hosts: DockerHosts, policy: DeletePolicy, regions: Regions) -> None:
        self._regions = regions
        self._store = store
        self._hosts = hosts
        self._policy = policy

    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """See a difference in which snapshot it is, and in that its node is gone; all else tells how it was taken."""
        del call, id
        old = old_outputs | old_inputs
        found = differ(("instance", "generation"), old=old, new=news)
        if old.get(_NODE) and news.get(_NODE) == "":
            change = Change(kind=ChangeKind.UPDATE, replace=False)
            return dataclasses.replace(found, changes={**found.changes, _NODE: change})
        return found

    def create(self, call: Call, *, inputs: Properties) -> Created:
        """Take the snapshot, or find the one that an interrupted run completed; raises `SnapshotFailed`.

        A node that is away is not asked: a snapshot that is whole without it is all that can be had.
        """
        wanted = parse(SnapshotInputs, inputs)
        capture = Capture(
            CaptureRequest(
                snapshot=wanted.snapshot,
                cluster=wanted.cluster,
                node_id=wanted.node_id,
                container=wanted.container,
                volumes=Volumes(home=wanted.volume, copy=wanted.copy_volume, home_path=wanted.home_path),
                image=wanted.image,
                live=wanted.live,
                stop_timeout_s=wanted.stop_timeout_s,
                labels=labels_of(
                    cluster=wanted.cluster,
                    instance=wanted.instance,
                    ledger_id=wanted.ledger_id,
                    urn=call.urn,
                    generation=wanted.generation,
                ),
            ),
            machine=self._machine(wanted),
            store=self._store,
            progress=call.progress,
            home_keeper=self._cloud_home(wanted, region=wanted.cloud_region, urn=call.urn),
        )
        if self._policy.is_away(wanted.node_id):
            result = capture.find()
            # Half a copy at best, and no use to anybody.
            self._policy.note_leftover(urn=call.urn, host=wanted.docker_host, name=wanted.copy_volume)
        else:
            result = capture.run()
        if result.copy_error is not None:
            call.warn(f"Snapshot {wanted.snapshot} is whole, but the node kept no quick copy: {result.copy_error}")
        if not result.manifest.stopped_cleanly and not result.manifest.live:
            call.warn("The browser had to be killed: the last seconds of its profile may be missing in the snapshot.")
        return Created(id=str(wanted.snapshot), outputs=_outputs(inputs, result))

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        """Say whether the snapshot is still in the store.

        One that is damaged, or whose key is missing, is: it is for people to decide about.
        """
        wanted = parse(SnapshotInputs, outputs | inputs)
        try:
            self._store.read_manifest(wanted.snapshot)
        except SnapshotMissing:
            return None
        except (SnapshotCorrupt, SnapshotKeyMissing) as error:
            call.warn(error.explain())
        return Found(id=id, inputs=inputs, outputs=outputs)

    def update(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Properties:
        """Take over new inputs; of a node that leaves the cluster, remove what it keeps of the snapshot. Idempotent.

        That stays there while the archive can't be read, and where the node can't do it: both are told, and no reason
        for the node to stay in the cluster. Raises `SnapshotFailed` while the store can't be asked.
        """
        del id
        outputs = old_outputs | news
        left = parse(SnapshotInputs, old_outputs | old_inputs)
        if not left.docker_host or news.get(_NODE):
            return outputs
        try:
            self._store.read_manifest(left.snapshot)
            machine = self._machine(left)
            machine.remove_copy(left.copy_volume)
            machine.remove_image(restored_tag(left.snapshot))
        except (SnapshotMissing, SnapshotCorrupt, SnapshotKeyMissing, DockerError) as error:
            log.warning("copy left on a removed node", snapshot=str(left.snapshot), node=left.node_id, error=str(error))
            call.warn(
                f"{left.copy_volume}, a copy of snapshot {left.snapshot}, is left on node {left.node_id}, which the"
                f" cluster does not have any more: {error.explain()}"
            )
        return outputs | {"quickCopy": False}

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        """Remove the quick copy, the restored image, the cloud's snapshot and the archive.

        Of a node that left the cluster, only what is elsewhere.

        Raises:
            StillWanted: the policy says no.
            NodeUnreachable: the node does not answer, and the policy does not say to leave it alone.
            SnapshotFailed: the store can't be written.
        """
        del id
        gone = parse(SnapshotInputs, outputs | inputs)
        labels = labels_of(
            cluster=gone.cluster,
            instance=gone.instance,
            ledger_id=gone.ledger_id,
            urn=call.urn,
            generation=gone.generation,
        )
        decision = self._policy.check_delete(urn=call.urn, labels=labels, kind="snapshot", replacing=call.replacing)
        if not decision.allowed:
            raise StillWanted(decision.reason or f"Snapshot {gone.snapshot} is still wanted.", detail=call.urn)
        if gone.docker_host:
            self._clear_node(call, gone, decision=decision)
        try:
            self._delete_cloud_home(gone, urn=call.urn)
        except CloudError as error:
            if not decision.force:
                raise
            call.warn(f"{error.message} The cloud's snapshot of {gone.snapshot} is left; it is removed later.")
        self._store.delete(gone.snapshot)

    def _clear_node(self, call: Call, gone: SnapshotInputs, *, decision: DeleteDecision) -> None:
        machine = self._machine(gone)
        leftovers: dict[str, Callable[[], object]] = {
            gone.copy_volume: lambda: machine.remove_copy(gone.copy_volume),
            restored_tag(gone.snapshot): lambda: machine.remove_image(restored_tag(gone.snapshot)),
        }
        for name, remove in leftovers.items():
            try:
                if decision.abandon:
                    raise NodeUnreachable(f"Node {gone.node_id} does not answer.")
                remove()
            except NodeUnreachable:
                if not decision.force and not decision.abandon:
                    raise
                self._policy.note_leftover(urn=call.urn, host=gone.docker_host, name=name)
                call.warn(f"{name} is left on node {gone.node_id}, which does not answer; it is removed later.")

    def _delete_cloud_home(self, gone: SnapshotInputs, *, urn: str) -> None:
        home = None
        with contextlib.suppress(SnapshotMissing, SnapshotCorrupt, SnapshotKeyMissing):
            home = self._store.read_manifest(gone.snapshot).cloud_home
        keeper = self._cloud_home(gone, region=home.region if home is not None else gone.cloud_region, urn=urn)
        if keeper is not None:
            keeper.discard()

    def _cloud_home(self, inputs: SnapshotInputs, *, region: str | None, urn: str) -> SnapshotWork | None:
        if region is None:
            return None
        owner = Owner(cluster=inputs.cluster, ledger_id=inputs.ledger_id, instance=inputs.instance, urn=urn)
        devices = None  # of a node that left the cluster
        if inputs.docker_host:
            devices = NodeDevices(
                inputs.host(self._hosts),
                helper_image=inputs.helper_image,
                name=inputs.volume,
                labels=owner.all_tags,
            )
        return SnapshotWork(cloud=self._regions.of(region), owner=owner, generation=inputs.generation, devices=devices)

    def _machine(self, inputs: SnapshotInputs) -> DockerMachine:
        return DockerMachine(
            inputs.host(self._hosts),
            helper_image=inputs.helper_image,
            labels={CLUSTER_LABEL: inputs.cluster, LEDGER_LABEL: inputs.ledger_id},
        )


def labels_of(*, cluster: str, instance: str, ledger_id: str, urn: str, generation: int) -> dict[str, str]:
    """Return the labels of everything that is made for one snapshot."""
    return {
        CLUSTER_LABEL: cluster,
        INSTANCE_LABEL: instance,
        LEDGER_LABEL: ledger_id,
        URN_LABEL: urn,
        _GENERATION_LABEL: str(generation),
    }


def _outputs(inputs: Properties, result: CaptureResult) -> Properties:
    manifest = result.manifest
    return inputs | {
        "manifestSha256": hashlib.sha256(manifest.to_json()).hexdigest(),
        "bytes": manifest.stored_bytes,
        "entries": manifest.home.entries if manifest.cloud_home is None else 0,
        "cloudSnapshot": manifest.cloud_home.snapshot_id if manifest.cloud_home is not None else None,
        "createdAt": manifest.created_at.isoformat(),
        "parts": _parts(manifest),
        "stoppedCleanly": manifest.stopped_cleanly,
        "quickCopy": result.copied,
        "quickCopyError": result.copy_error,
    }


def _parts(manifest: Manifest) -> list[Properties]:
    return [
        {
            "name": part.name.value,
            "bytes": part.bytes,
            "sha256": part.sha256,
            "uncompressedBytes": part.uncompressed_bytes,
            "entries": part.entries,
        }
        for part in manifest.parts
    ]
