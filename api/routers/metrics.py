"""Metrics: the stored samples as the contract has them, and the present state in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api import views
from api.errors import refusals
from api.schemas import ClusterMetrics, MetricsResponse, Timeseries
from api.services import Services, ServicesDep
from provisioner.ledger.records import NodeStatus
from provisioner.metrics import read_metrics

router = APIRouter(tags=["Metrics"])


@router.get(
    "/v2/metrics",
    operation_id="getMetrics",
    summary="Get metrics",
    response_description="Metrics data",
    responses=refusals(400, 404),
)
def get_metrics(
    services: ServicesDep, node_id: str | None = None, period: Literal["1h", "24h", "7d"] = "24h"
) -> MetricsResponse:
    """Get usage over a period, of the whole cluster or of one node."""
    report = read_metrics(services.ledger, period=period, node_id=node_id)
    return MetricsResponse(
        cluster=ClusterMetrics(
            total_instances=report.total_instances,
            running_instances=report.running_instances,
            avg_cpu_percent=report.avg_cpu_percent,
            avg_memory_percent=report.avg_memory_percent,
        ),
        timeseries=Timeseries(
            timestamps=[views.show_moment(at) for at in report.timestamps],
            cpu=list(report.cpu),
            memory=list(report.memory),
        ),
    )


@router.get(
    "/metrics",
    operation_id="scrapeMetrics",
    summary="Scrape metrics, in Prometheus' text format",
    response_description="Metrics",
    response_class=Response,
    responses=refusals() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def scrape_metrics(services: ServicesDep) -> Response:
    """Give the present state of the cluster, and of this process."""
    registry = CollectorRegistry()
    registry.register(_Cluster(services))
    return Response(generate_latest(registry) + generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


class _Cluster(Collector):
    """Reads the ledger at every scrape."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        ledger = self._services.ledger
        instances = GaugeMetricFamily("machineuse_instances", "Instances by status.", labels=["status"])
        for status, count in ledger.instances.counts().items():
            instances.add_metric([status.value], count)
        yield instances
        unsettled = GaugeMetricFamily("machineuse_instances_unsettled", "Instances with an operation under way.")
        unsettled.add_metric([], len(ledger.instances.unsettled()))
        yield unsettled
        leading = GaugeMetricFamily("machineuse_leading", "1 where this service is the one that changes the nodes.")
        leading.add_metric([], float(self._services.is_leading))
        yield leading
        online = GaugeMetricFamily("machineuse_node_online", "1 while the node's engine answers.", labels=["node"])
        used = GaugeMetricFamily(
            "machineuse_node_used_percent", "Usage of a node, in percent.", labels=["node", "resource"]
        )
        for node in ledger.nodes.list():
            online.add_metric([node.id], float(node.status is NodeStatus.ONLINE))
            for resource in ("cpu", "memory", "disk"):
                percent = getattr(node, f"{resource}_percent")
                if percent is not None:
                    used.add_metric([node.id, resource], percent)
        yield online
        yield used
