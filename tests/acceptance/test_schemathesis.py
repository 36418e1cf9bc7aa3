"""Hundreds of requests made from the service's own description: every answer is one that the description allows."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest

from tests.support.conformance import run_schemathesis
from tests.support.service import Service
from tests.support.shell_image import shell_image


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Iterator[Service]:
    """Give a service on which many creates do no harm: two places, and small containers."""
    with shell_image(docker.from_env()) as shell:
        yield start_service(
            node={"max_instances": 2}, images={"ubuntu:22.04": shell}, stop_timeout_s=1, create_attempts=1
        )


@pytest.fixture(scope="module")
def run(service: Service, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Give the one run that all tests look at."""
    return run_schemathesis(
        f"http://127.0.0.1:{service.port}",
        directory=tmp_path_factory.mktemp("schemathesis"),
        max_examples=3,
        timeout_s=240,
        arguments=("--request-timeout", "60", "--checks", "all", "--no-shrink"),
    )


@pytest.fixture(scope="module")
def entries(service: Service, run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Give what the service logged meanwhile."""
    assert run.stdout
    return [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]


def test_every_answer_keeps_the_services_own_description(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-3000:]


def test_nothing_fails_inside_the_service(entries: list[dict[str, Any]]) -> None:
    answers = Counter(entry["status"] for entry in entries if entry["event"] == "request")
    assert sum(answers.values()) > 100
    assert {status for status in answers if status >= 500} <= {503}  # no room: two places are soon taken
    assert [entry for entry in entries if entry["level"] in ("error", "critical")] == []


def test_the_operations_were_really_carried_out(entries: list[dict[str, Any]]) -> None:
    carried_out = {
        (entry["method"], re.sub(r"mu-\w{8}", "ID", entry["path"]))
        for entry in entries
        if entry["event"] == "request" and entry["status"] < 300
    }
    assert carried_out >= {
        ("POST", "/v2/instances"),
        ("GET", "/v2/instances"),
        ("GET", "/v2/instances/ID"),
        ("DELETE", "/v2/instances/ID"),
        ("GET", "/v2/nodes"),
        ("GET", "/v2/metrics"),
    }


def test_afterwards_everything_can_be_deleted(service: Service, run: subprocess.CompletedProcess[str]) -> None:
    assert run.stdout
    for instance in service.http.get("/v2/instances").json()["instances"]:
        assert service.delete(instance["id"]).status_code in (200, 404)
    assert service.http.get("/v2/instances").json()["total"] == 0
    assert service.volumes() == []
