"""Turns ledger records into the specs that the Pulumi program declares, and names the resources they consist of."""

from __future__ import annotations

import math
from collections.abc import Iterable

from provisioner.ledger.records import InstanceRecord
from provisioner.states import Wanted
from stacks.names import Names
from stacks.spec import CloudVolumeSpec, InstanceSpec, RestoreSpec, SnapshotRef


def spec_of(record: InstanceRecord) -> InstanceSpec | None:
    """Return what the program declares for this record; None for one that should be absent.

    A pure function of the ledger, so a full program and the control plane's partial ones agree.
    """
    if record.wanted is Wanted.ABSENT:
        return None
    refs = {
        s.generation: SnapshotRef.model_validate(
            {
                "instance_id": record.id,
                "generation": s.generation,
                "node_id": s.node_id,
                "live": s.live,
                "volume": s.volume,
            }
        )
        for s in record.snapshots
        if s.generation not in record.obsolete_snapshots
    }
    body = not record.sleeps_safely
    restore = None
    if body and record.restore_generation is not None and record.restore_method is not None:
        restored = record.snapshot(record.restore_generation)
        source = SnapshotRef(
            instance_id=record.id,
            generation=record.restore_generation,
            node_id=restored.node_id if restored is not None else record.node_id,
        )
        restore = RestoreSpec(snapshot=source, method=record.restore_method)
    cloud_volume = None
    if body and record.volume == "ebs":
        cloud_volume = CloudVolumeSpec(
            size_gib=math.ceil(record.disk_gb),
            generation=record.generation,
            restored_generation=record.restore_generation or 0,
        )
    return InstanceSpec(
        id=record.id,
        node_id=record.node_id,
        image=record.image,
        browser=record.browser,
        memory_mib=record.memory_mib,
        cpus=record.cpu_cores,
        disk_quota_gib=record.disk_gb if record.disk_enforced and cloud_volume is None else None,
        debug_port=record.debug_port,
        stream_port=record.stream_port,
        body=body,
        cloud_volume=cloud_volume,
        restore=restore,
        snapshots=tuple(refs.values()),
    )


def specs_of(records: Iterable[InstanceRecord]) -> list[InstanceSpec]:
    """Return the specs of all records that should exist."""
    return [spec for spec in map(spec_of, records) if spec is not None]


def body_urns(record: InstanceRecord, *, names: Names) -> list[str]:
    """Return the URNs of what a running instance consists of, besides its component."""
    urns = [names.volume_urn(record.id), names.container_urn(record.id)]
    if record.volume == "ebs":
        urns.append(names.cloud_volume_urn(record.id))
    if record.restore_generation is not None:
        urns.append(names.restore_urn(record.id))
    return urns


def all_urns(record: InstanceRecord, *, names: Names) -> list[str]:
    """Return every URN that may be in the stack for this record."""
    snapshots = [names.snapshot_urn(record.id, s.generation) for s in record.snapshots]
    return [names.component_urn(record.id), *body_urns(record, names=names), *snapshots]
