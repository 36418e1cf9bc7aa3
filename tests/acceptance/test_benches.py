"""The benchmarks run, small: what they say of the speed is for people to look at."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("bench", "--rounds", "1", "--instances", "1"), "ratio of the medians:"),
        (("bench.placement", "--nodes", "20", "--instances", "200", "--transactions", "3"), "the whole transaction"),
        (("bench.snapshots", "--rounds", "1"), "quick_start"),
    ],
)
def test_a_benchmark_runs(command: tuple[str, ...], says: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
