"""Measures the machine that this process runs on, for nodes whose Docker engine is on the same one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FIRST_WINDOW_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUse:
    """How full the file system of a Docker engine's data is."""

    total_bytes: int
    percent: float


def is_same_machine(host_url: str, info: Mapping[str, Any]) -> bool:
    """Say whether the engine that answered `docker info` shares this machine: its memory, its disk.

    An engine behind a Unix socket may still live in a virtual machine (Docker Desktop) or outside of our container.
    """
    memory_bytes = int(info.get("MemTotal") or 0)
    total_bytes = psutil.virtual_memory().total
    return (
        host_url.startswith("unix://")
        and abs(memory_bytes - total_bytes) < total_bytes / 100
        and Path(info.get("DockerRootDir") or "/nonexistent").is_dir()
    )


def measure_disk(path: str) -> DiskUse | None:
    """Return how full the file system of `path` is; None when this user can't see it."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return DiskUse(total_bytes=usage.total, percent=round(100.0 * usage.used / usage.total, 2))


def memory_percent() -> float:
    """Return the part of the machine's memory that is in use."""
    return float(psutil.virtual_memory().percent)


class CpuMeter:
    """Tells how busy the machine's cores were since the meter was read last; one meter a reader."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def read(self) -> float:
        """Return percent of all cores; the first reading takes `FIRST_WINDOW_S` to have something to compare."""
        if self._last is None:
            self._last = _read_times()
            time.sleep(FIRST_WINDOW_S)
        busy, total = _read_times()
        elapsed = total - self._last[1]
        used = busy - self._last[0]
        self._last = (busy, total)
        return round(min(max(100.0 * used / elapsed, 0.0), 100.0), 2) if elapsed > 0 else 0.0


def _read_times() -> tuple[float, float]:
    times = psutil.cpu_times()
    # guest time is part of user time already
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total
