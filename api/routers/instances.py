"""Instances: reading answers from the ledger; changing writes a wish and waits for what becomes of it.

No handler touches Docker or Pulumi. What can be refused is refused at once; see InstanceService.
"""

from __future__ import annotations

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response

from api import views
from api.errors import refusals
from api.intake import Limit, Offset, QueryFlag, require_json
from api.schemas import CreateInstanceRequest, Instance, InstanceEvent, InstanceList, MessageResponse, ReviveRequest
from api.services import ServicesDep
from api.waiting import WaiterDep
from provisioner.errors import Conflict, LedgerUnavailable, NotFound
from provisioner.ledger.records import InstanceRecord
from provisioner.service import CreateRequest
from provisioner.states import Status

router = APIRouter(prefix="/v2/instances", tags=["Instances"])

InstanceId = Annotated[str, Path()]


@router.post(
    "",
    operation_id="createInstance",
    summary="Create instance",
    status_code=201,
    response_description="Instance created",
    responses=refusals(400, 413, 415, 503),
    dependencies=[Depends(require_json)],
)
async def create_instance(
    wanted: CreateInstanceRequest, request: Request, response: Response, services: ServicesDep, waiter: WaiterDep
) -> Instance:
    """Create an instance; answer once it runs or has failed (see `error`), or as `creating` when the wait is over."""
    record = await to_thread.run_sync(
        services.instances.create,
        CreateRequest(
            image=wanted.image,
            memory_gb=wanted.config.memory_gb,
            cpu_cores=wanted.config.cpu_cores,
            disk_gb=wanted.config.disk_gb,
            idle_timeout_minutes=wanted.config.idle_timeout_minutes,
            auto_snapshot=wanted.config.auto_snapshot,
            node_labels=wanted.node_labels,
            node_preference=wanted.node_preference,
            node_strict=wanted.node_strict,
        ),
    )
    response.headers["Location"] = request.url_for("get_instance", instance_id=record.id).path
    try:
        try:
            became = await waiter.outcome(record) or record
        except (Conflict, NotFound):
            became = record  # it was created; that somebody deletes it already is no answer to this call
        return await _show(services, became)
    except LedgerUnavailable as error:  # without its name, nobody would know whose it is
        raise LedgerUnavailable(
            f"Instance {record.id} was created, but the ledger's database does not answer now.",
            detail=error.detail,
            resolution="Ask for that instance in a moment, instead of creating another one.",
        ) from error


@router.get(
    "",
    operation_id="listInstances",
    summary="List instances",
    response_description="List of instances",
    responses=refusals(400),
)
def list_instances(
    services: ServicesDep,
    status: Status | None = None,
    node_id: str | None = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> InstanceList:
    """List instances, oldest first; one being deleted is listed until it is gone."""
    records, total = services.ledger.instances.page(status=status, node_id=node_id, limit=limit, offset=offset)
    return InstanceList(instances=views.show_instances(services, records), total=total, limit=limit, offset=offset)


@router.get(
    "/{instance_id}",
    operation_id="getInstance",
    summary="Get instance",
    response_description="Instance details",
    responses=refusals(404),
)
def get_instance(instance_id: InstanceId, services: ServicesDep) -> Instance:
    """Get one instance; asking is not activity."""
    return views.show_instance(services, services.ledger.instances.get(instance_id))


@router.delete(
    "/{instance_id}",
    operation_id="deleteInstance",
    summary="Delete instance",
    response_description="Instance deleted",
    responses=refusals(400, 404),
)
async def delete_instance(
    instance_id: InstanceId,
    services: ServicesDep,
    waiter: WaiterDep,
    force: Annotated[QueryFlag, Query(description="Kill it at once, in any state, even if its node is away.")] = False,
) -> MessageResponse:
    """Delete an instance with its volume and its snapshots; the browser is stopped gracefully first."""
    record = await to_thread.run_sync(lambda: services.instances.delete(instance_id, force=force))
    if await waiter.outcome(record) is None:
        return MessageResponse(message=f"Instance {instance_id} is deleted.")
    return MessageResponse(message=f"Instance {instance_id} is being deleted.")


@router.post(
    "/{instance_id}/dormant",
    operation_id="makeInstanceDormant",
    summary="Make instance dormant",
    response_description="Instance made dormant",
    responses=refusals(404, 409),
)
async def make_instance_dormant(instance_id: InstanceId, services: ServicesDep, waiter: WaiterDep) -> Instance:
    """Snapshot an instance, verify that, and only then free what it uses. Without a snapshot it goes on: 409."""
    record = await to_thread.run_sync(services.instances.make_dormant, instance_id)
    return await _show(services, await waiter.outcome(record) or record)


@router.post(
    "/{instance_id}/revive",
    operation_id="reviveInstance",
    summary="Revive dormant instance",
    response_description="Instance reviving",
    responses=refusals(400, 404, 409, 413, 415, 503),
    dependencies=[Depends(require_json)],
)
async def revive_instance(
    instance_id: InstanceId, services: ServicesDep, waiter: WaiterDep, wanted: ReviveRequest | None = None
) -> Instance:
    """Restore a dormant instance, with the same id. What can't be restored stays dormant, with its snapshot: 409."""
    how = wanted or ReviveRequest()
    record = await to_thread.run_sync(
        lambda: services.instances.revive(
            instance_id, method=how.method, node_preference=how.node_preference, node_strict=how.node_strict
        )
    )
    return await _show(services, await waiter.outcome(record) or record)


@router.get(
    "/{instance_id}/events",
    operation_id="listInstanceEvents",
    summary="List what happened to an instance",
    response_description="Events, newest last",
    responses=refusals(400, 404),
)
def list_instance_events(instance_id: InstanceId, services: ServicesDep, limit: Limit = 100) -> list[InstanceEvent]:
    """List the newest events of an instance, newest last."""
    services.ledger.instances.get(instance_id)  # raises NotFound
    return [views.show_event(event) for event in services.ledger.events.list(instance_id=instance_id, limit=limit)]


async def _show(services: ServicesDep, record: InstanceRecord) -> Instance:
    return await to_thread.run_sync(views.show_instance, services, record)
