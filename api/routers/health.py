"""Whether the service works: open to everybody, cheap, and no activity of any instance."""

from __future__ import annotations

from fastapi import APIRouter

from api.errors import refusals
from api.schemas import HealthResponse
from api.services import ServicesDep
from provisioner.lease import leader_of
from provisioner.ledger.records import NodeStatus
from provisioner.states import UP

router = APIRouter(tags=["Health"])


@router.get(
    "/health",
    operation_id="healthCheck",
    summary="Health check",
    response_description="Service is healthy",
    responses=refusals(),
)
def check_health(services: ServicesDep) -> HealthResponse:
    """Count instances and nodes in the ledger."""
    counts = services.ledger.instances.counts()
    nodes = services.ledger.nodes.list()
    return HealthResponse(
        status="healthy",
        instances_count=sum(counts.values()),
        running_instances=sum(counts[status] for status in UP),
        nodes_count=len(nodes),
        nodes_online=sum(node.status is NodeStatus.ONLINE for node in nodes),
        leader=leader_of(services.ledger),
        leading=services.is_leading,
    )
