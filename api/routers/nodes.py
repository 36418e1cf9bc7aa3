"""Nodes: what the cluster's file and the newest heartbeats say."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from api import views
from api.errors import refusals
from api.schemas import Node, NodeList
from api.services import ServicesDep

router = APIRouter(prefix="/v2/nodes", tags=["Nodes"])


@router.get(
    "", operation_id="listNodes", summary="List nodes", response_description="List of nodes", responses=refusals()
)
def list_nodes(services: ServicesDep) -> NodeList:
    """List every node of the cluster, by id."""
    return NodeList(nodes=views.show_nodes(services, services.ledger.nodes.list()))


@router.get(
    "/{node_id}",
    operation_id="getNode",
    summary="Get node",
    response_description="Node details",
    responses=refusals(404),
)
def get_node(node_id: Annotated[str, Path()], services: ServicesDep) -> Node:
    """Get one node."""
    return views.show_nodes(services, [services.ledger.nodes.get(node_id)])[0]
