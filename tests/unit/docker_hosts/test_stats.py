"""Reading the engine's answers, of cgroup v1 and v2."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from provisioner.docker_hosts.stats import Reading, cpu_percent, parse_reading, read_container


def answer(**memory: Any) -> dict[str, Any]:
    return {
        "read": "2024-01-02T03:04:05.250000001Z",
        "cpu_stats": {"cpu_usage": {"total_usage": 3_000_000_000}},
        "memory_stats": memory,
    }


@pytest.mark.parametrize("name", ["total_inactive_file", "inactive_file"])
def test_the_page_cache_that_can_be_dropped_is_not_use(name: str) -> None:
    reading = parse_reading(answer(usage=1000, stats={name: 400}))
    assert reading == Reading(at=1704164645.250000001, cpu_s=3.0, memory_bytes=600)


def test_on_cgroup_v1_the_sum_of_the_hierarchy_counts() -> None:
    reading = parse_reading(answer(usage=1000, stats={"inactive_file": 100, "total_inactive_file": 400}))
    assert reading is not None
    assert reading.memory_bytes == 600


def test_a_cache_larger_than_the_use_is_not_subtracted() -> None:
    reading = parse_reading(answer(usage=1000, stats={"inactive_file": 2000}))
    assert reading is not None
    assert reading.memory_bytes == 1000


def test_a_stopped_container_has_no_reading() -> None:
    assert parse_reading({"read": "0001-01-01T00:00:00Z", "cpu_stats": {}, "memory_stats": {}}) is None


def reading(*, at: float, cpu_s: float) -> Reading:
    return Reading(at=at, cpu_s=cpu_s, memory_bytes=1)


def test_cpu_use_is_of_the_cores_that_were_given() -> None:
    assert cpu_percent(reading(at=10, cpu_s=1), reading(at=12, cpu_s=3), cores=2) == 50


def test_cpu_use_is_never_more_than_all_of_it() -> None:
    assert cpu_percent(reading(at=10, cpu_s=1), reading(at=11, cpu_s=3), cores=1) == 100


@pytest.mark.parametrize("after", [reading(at=10, cpu_s=1), reading(at=12, cpu_s=0.5)])
def test_a_restart_or_no_time_in_between_says_nothing(after: Reading) -> None:
    assert cpu_percent(reading(at=10, cpu_s=1), after, cores=1) is None


class DyingContainer:
    """A host whose engine answers a question about a container that goes away with an empty body."""

    class api:
        @staticmethod
        def stats(*_: object, **__: object) -> None:
            raise requests.exceptions.JSONDecodeError("Expecting value", "", 0)

    @staticmethod
    def call(_what: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def test_a_container_that_goes_away_meanwhile_has_no_reading() -> None:
    assert read_container(DyingContainer(), container_id="x") is None  # type: ignore[arg-type]
