"""Turns the ledger's records into the API's words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from api import schemas
from api.services import Services
from provisioner.ledger.loads import NodeLoad
from provisioner.ledger.records import EventRecord, InstanceRecord, NodeRecord, NodeStatus, SnapshotState
from provisioner.ledger.samples import Scope, Usage
from provisioner.settings import Settings
from provisioner.states import UP
from stacks.spec import LOOPBACK


def show_instances(services: Services, records: Sequence[InstanceRecord]) -> list[schemas.Instance]:
    """Show instances with what their nodes and the newest samples say of them."""
    nodes = {node.id: node for node in services.ledger.nodes.list({record.node_id for record in records})}
    running = [record.id for record in records if record.status in UP]
    usages = services.ledger.samples.latest(Scope.INSTANCE, running)
    return [
        _show_instance(
            record,
            node=nodes.get(record.node_id),
            usage=usages.get(record.id),
            public_address=services.settings.public_address,
        )
        for record in records
    ]


def show_instance(services: Services, record: InstanceRecord) -> schemas.Instance:
    """Show one instance."""
    return show_instances(services, [record])[0]


def _show_instance(
    record: InstanceRecord, *, node: NodeRecord | None, usage: Usage | None, public_address: str | None
) -> schemas.Instance:
    address = node.address if node else "localhost"
    if public_address is not None and address in LOOPBACK:  # any other is where that node's clients reach it
        address = public_address
    return schemas.Instance(
        id=record.id,
        status=record.status,
        node_id=record.node_id,
        subdomain=record.id,
        debug_port=record.debug_port,
        stream_port=record.stream_port,
        created_at=_moment(record.created_at),
        # The ledger's values were checked when they came in, by the bounds of that day.
        config=schemas.InstanceConfig.model_construct(
            memory_gb=record.memory_gb,
            cpu_cores=record.cpu_cores,
            disk_gb=record.disk_gb,
            idle_timeout_minutes=record.idle_timeout_minutes,
            auto_snapshot=record.auto_snapshot,
        ),
        resources=_show_usage(record, usage),
        urls=schemas.InstanceUrls(
            debug=_url(address, record.debug_port), stream=_url(address, record.stream_port, path="/")
        ),
        image=record.image,
        image_requested=record.image_requested,
        image_base=record.image_base,
        operation=record.operation,
        moving=record.moving,
        error=_show_error(record),
        node_status=node.status if node else NodeStatus.OFFLINE,
        node_labels=dict(record.node_labels),
        last_active_at=_moment(record.last_active_at),
        snapshots=[
            schemas.Snapshot(
                generation=snapshot.generation,
                state=snapshot.state,
                bytes=snapshot.bytes,
                live=snapshot.live,
                node_id=snapshot.node_id,
                created_at=_moment(snapshot.created_at),
            )
            for snapshot in record.snapshots
            if snapshot.state is not SnapshotState.EXPIRING  # on its way out: nothing can be restored from it
        ],
        restored_by=record.restored_by,
        restore_note=record.restore_note,
        disk_bytes=record.disk_bytes,
        disk_over=record.disk_over,
        disk_enforced=record.disk_enforced,
    )


def show_nodes(services: Services, records: Sequence[NodeRecord]) -> list[schemas.Node]:
    """Show nodes with what they have promised."""
    loads = {load.node_id: load for load in services.ledger.instances.loads()}
    return [_show_node(record, load=loads.get(record.id), settings=services.settings) for record in records]


def _show_node(record: NodeRecord, *, load: NodeLoad | None, settings: Settings) -> schemas.Node:
    return schemas.Node(
        id=record.id,
        status=record.status,
        address=record.address,
        instances_count=load.instances if load else 0,
        max_instances=record.max_instances,
        resources=schemas.ResourceUsage(
            cpu_percent=record.cpu_percent or 0.0,
            memory_percent=record.memory_percent or 0.0,
            disk_percent=record.disk_percent or 0.0,
        ),
        last_heartbeat=None if record.last_heartbeat is None else _moment(record.last_heartbeat),
        error=record.error,
        cpu_cores=record.cpu_cores,
        memory_bytes=record.memory_bytes,
        disk_bytes=record.disk_bytes,
        availability=record.availability,
        labels=dict(record.labels),
        reserved=schemas.NodeAmounts(
            memory_gb=round(load.memory_mib / 1024, 3) if load else 0,
            cpu_cores=load.cpu_cores if load else 0,
            disk_gb=round(load.disk_mib / 1024, 3) if load else 0,
        ),
        reservable=_show_reservable(record, settings),
    )


def _show_reservable(record: NodeRecord, settings: Settings) -> schemas.NodeAmounts | None:
    if record.memory_bytes is None or record.cpu_cores is None:
        return None
    disk_bytes = record.disk_bytes
    return schemas.NodeAmounts(
        memory_gb=round(record.memory_bytes / 2**30 * settings.memory_overcommit, 3),
        cpu_cores=round(record.cpu_cores * settings.cpu_overcommit, 3),
        disk_gb=None if disk_bytes is None else round(disk_bytes / 2**30 * settings.disk_overcommit, 3),
    )


def show_event(record: EventRecord) -> schemas.InstanceEvent:
    """Show one event."""
    return schemas.InstanceEvent(id=record.id, at=_moment(record.at), kind=record.kind, message=record.message)


def show_moment(at: float) -> str:
    """Write seconds since the epoch as RFC 3339, in UTC."""
    return _moment(at).isoformat().replace("+00:00", "Z")


def _show_usage(record: InstanceRecord, usage: Usage | None) -> schemas.ResourceUsage:
    if record.status not in UP:
        return schemas.ResourceUsage(cpu_percent=0.0, memory_percent=0.0, disk_percent=0.0)
    disk_percent = 100.0 * (record.disk_bytes or 0) / (record.disk_gb * 2**30)
    return schemas.ResourceUsage(
        cpu_percent=usage.cpu_percent if usage else 0.0,
        memory_percent=usage.memory_percent if usage else 0.0,
        disk_percent=usage.disk_percent if usage and usage.disk_percent is not None else round(disk_percent, 2),
    )


def _show_error(record: InstanceRecord) -> schemas.InstanceError | None:
    if record.error_code is None:
        return None
    return schemas.InstanceError(code=record.error_code, message=record.error_message or "It failed.")


def _url(address: str, port: int | None, *, path: str = "") -> str | None:
    if port is None:
        return None
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}{path}"


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
