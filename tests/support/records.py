"""Ledger records for unit tests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from provisioner.ledger.loads import NodeLoad
from provisioner.ledger.records import InstanceRecord
from provisioner.states import Status, Wanted


def make_record(**changes: Any) -> InstanceRecord:
    """Return a settled, running instance, with these fields changed."""
    fields: dict[str, Any] = {
        "id": "mu-test",
        "node_id": "local",
        "image_requested": "ubuntu:22.04",
        "image": "machineuse/browser:latest",
        "image_base": "debian 12",
        "browser": True,
        "memory_gb": 1.0,
        "cpu_cores": 1,
        "disk_gb": 10.0,
        "disk_enforced": False,
        "idle_timeout_minutes": 30,
        "auto_snapshot": True,
        "created_at": 1000.0,
        "wanted": Wanted.RUNNING,
        "generation": 1,
        "applied_generation": 1,
        "settled_generation": 1,
        "body": True,
        "repair": False,
        "force": False,
        "attempts": 0,
        "retry_at": 0.0,
        "status": Status.RUNNING,
        "status_since": 1000.0,
        "last_active_at": 1000.0,
        "debug_port": 21000,
        "stream_port": 21001,
        "disk_bytes": None,
        "disk_over": False,
        "snapshot_generation": None,
        "restore_generation": None,
        "restore_method": None,
        "restored_by": None,
        "restore_note": None,
        "error_code": None,
        "error_message": None,
        "error_generation": None,
    }
    return InstanceRecord(**fields | changes)


def sum_up(records: Iterable[InstanceRecord]) -> tuple[NodeLoad, ...]:
    """Return what each node has promised, added up from its instances."""
    held = [record for record in records if record.body or record.wanted is Wanted.RUNNING]
    return tuple(
        NodeLoad(
            node_id=node_id,
            instances=sum(r.node_id == node_id for r in held),
            memory_mib=sum(math.ceil(r.memory_gb * 1024) for r in held if r.node_id == node_id),
            cpu_cores=sum(r.cpu_cores for r in held if r.node_id == node_id),
            disk_mib=sum(math.ceil(r.disk_gb * 1024) for r in held if r.node_id == node_id and r.volume == "docker"),
        )
        for node_id in sorted({r.node_id for r in held})
    )
