"""What instances and nodes use is sampled, shown with them, and told for an hour, a day and a week."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.browsing import new_page
from tests.support.containers import execute
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1, "disk_gb": 1}
BUSY = "globalThis.busy = new Worker(URL.createObjectURL(new Blob(['for (;;);']))); 0"


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    return start_service(sample_s=0.5, disk_check_s=0.5)


@pytest.fixture(scope="module")
def instance(service: Service) -> dict[str, Any]:
    return service.create(config=SMALL)


def metrics_of(service: Service, **query: str) -> dict[str, Any]:
    answer = service.http.get("/v2/metrics", params=query)
    assert answer.status_code == 200, answer.text
    metrics: dict[str, Any] = answer.json()
    return metrics


@pytest.mark.parametrize("query", [{}, {"node_id": "local"}], ids=["cluster", "node"])
@pytest.mark.parametrize(("period", "length"), [("1h", "1h"), ("24h", "24h"), ("7d", "7d"), (None, "24h")])
def test_metrics_tell_the_use_over_a_period(
    service: Service, instance: dict[str, Any], query: dict[str, str], period: str | None, length: str
) -> None:
    assert instance["status"] == "running"
    if period is not None:
        query = query | {"period": period}
    metrics = wait_until(
        lambda: found if (found := metrics_of(service, **query))["timeseries"]["cpu"] else None, what="a first sample"
    )
    assert metrics["cluster"]["total_instances"] == metrics["cluster"]["running_instances"] == 1
    series = metrics["timeseries"]
    assert len(series["timestamps"]) == len(series["cpu"]) == len(series["memory"]) <= 180
    for percent in (*series["cpu"], *series["memory"]):
        assert 0 <= percent <= 100
    for name in ("cpu", "memory"):
        assert min(series[name]) <= metrics["cluster"][f"avg_{name}_percent"] <= max(series[name])
    assert metrics["cluster"]["avg_memory_percent"] > 0
    times = [datetime.fromisoformat(at) for at in series["timestamps"]]
    assert times == sorted(set(times))
    now = datetime.now(UTC)
    spans = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7)}
    steps = {"1h": timedelta(minutes=1), "24h": timedelta(minutes=10), "7d": timedelta(hours=1)}
    assert now - spans[length] - steps[length] <= times[0] <= times[-1] <= now


def test_an_hour_is_told_in_finer_steps_than_a_week(service: Service, instance: dict[str, Any]) -> None:
    assert instance["status"] == "running"

    def newest(period: str) -> datetime:
        stamps = wait_until(lambda: metrics_of(service, period=period)["timeseries"]["timestamps"], what="a sample")
        return datetime.fromisoformat(stamps[-1])

    hour, day, week = newest("1h"), newest("24h"), newest("7d")
    assert hour.second % 30 == 0
    assert (day.minute % 10, day.second) == (0, 0)
    assert (week.minute, week.second) == (0, 0)


def test_a_node_that_is_not_there_and_a_period_that_is_none_are_refused(service: Service) -> None:
    unknown = service.http.get("/v2/metrics", params={"node_id": "nowhere"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    bad = service.http.get("/v2/metrics", params={"period": "1y"})
    assert (bad.status_code, bad.json()["code"]) == (400, "invalid_request")


def test_an_instances_use_is_shown_with_it_and_a_busy_page_is_seen(service: Service, instance: dict[str, Any]) -> None:
    def use() -> dict[str, float]:
        resources: dict[str, float] = service.get(instance["id"])["resources"]
        assert all(0 <= percent <= 100 for percent in resources.values())
        return resources

    execute(service.container(instance["id"]), "sh", "-c", "head -c 20000000 /dev/urandom > /var/tmp/big")
    wait_until(lambda: 1 < use()["disk_percent"] < 20, what="the disk that it uses is seen")
    # Half a gigabyte is little for Chromium: it uses a good part of that.
    assert use()["memory_percent"] > 10
    quiet = wait_until(lambda: found if (found := use()["cpu_percent"]) < 25 else None, what="the browser is at rest")
    with new_page(instance) as page:
        page.evaluate(BUSY)
        wait_until(lambda: use()["cpu_percent"] > quiet + 20, what="the browser's work is seen")
        page.evaluate("busy.terminate()")
    wait_until(lambda: use()["cpu_percent"] < 25, what="the browser is at rest again")
