"""What containers use now: CPU time and memory, from cgroup v1 and v2 alike.

The engine is asked for one reading (`one-shot`), which it answers at once. CPU use is a difference of two readings, so
the caller keeps the last one; between two samples that gives the average of the whole interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import requests

from provisioner.docker_hosts.hosts import DockerHost


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One reading of a container."""

    at: float
    """Seconds since the epoch, by the node's clock."""
    cpu_s: float
    """CPU time used since the container started."""
    memory_bytes: int
    """Working set: without the page cache that the kernel can drop, as `docker stats` shows it."""


def read_container(host: DockerHost, *, container_id: str) -> Reading | None:
    """Return what the container uses; None when it does not run. Raises DockerNotFound and DockerError."""
    try:
        raw = host.call("read a container's use", host.api.stats, container_id, stream=False, one_shot=True)
    except requests.exceptions.JSONDecodeError:
        return None  # it went away meanwhile: the engine answers with nothing
    return parse_reading(raw)


def parse_reading(raw: Mapping[str, Any]) -> Reading | None:
    """Turn the engine's answer into a reading; None for a container that has no process."""
    cpu_ns = ((raw.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage")
    memory = raw.get("memory_stats") or {}
    usage = memory.get("usage")
    if not cpu_ns or usage is None:
        return None
    details = memory.get("stats") or {}
    # v1 names the hierarchy's sum "total_inactive_file", v2 has only "inactive_file".
    cache = details.get("total_inactive_file", details.get("inactive_file", 0))
    return Reading(
        at=_parse_time(raw["read"]),
        cpu_s=cpu_ns / 1e9,
        memory_bytes=int(usage - cache if cache < usage else usage),
    )


def cpu_percent(before: Reading, after: Reading, *, cores: float) -> float | None:
    """Return the use between two readings as percent of `cores`; None when no time or a restart lies between."""
    elapsed_s = after.at - before.at
    used_s = after.cpu_s - before.cpu_s
    if elapsed_s <= 0 or used_s < 0:
        return None
    return min(100.0 * used_s / (elapsed_s * cores), 100.0)


def _parse_time(text: str) -> float:
    # Nanoseconds are more than datetime takes: "2024-01-02T03:04:05.123456789Z".
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or '0'}")
