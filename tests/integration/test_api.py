"""`machineuse serve` as a process: how it starts, refuses to start, guards itself and stops."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import StartService
from tests.support.service import Service, free_port

TOKEN = "a-long-secret-for-this-test"


def run_machineuse(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "machineuse"), *arguments],
        env={**os.environ, **{f"MACHINEUSE_{name.upper()}": value for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_busy_port_is_one_line_and_nothing_is_started(service: Service, tmp_path: Path) -> None:
    done = run_machineuse("serve", "--port", str(service.port), "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert f"Port {service.port} on 127.0.0.1 is taken by process" in line
    assert not (tmp_path / "data").exists()


def test_a_second_service_on_the_same_data_is_refused(service: Service) -> None:
    data_dir = str(service.settings.data_dir)
    done = run_machineuse("serve", "--port", str(free_port()), "--data-dir", data_dir, "--cluster", service.cluster)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "already uses" in line
    assert service.http.get("/health").status_code == 200


def test_serving_other_machines_without_a_token_is_refused(tmp_path: Path) -> None:
    done = run_machineuse("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "MACHINEUSE_TOKENS" in line


def test_everything_is_kept_in_one_private_directory(service: Service) -> None:
    data_dir = service.settings.data_dir
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    logged = [json.loads(line) for line in (data_dir / "logs" / "machineuse.log").read_text().splitlines()]
    assert "serving" in [entry["event"] for entry in logged]


def test_it_says_where_it_serves_and_what_to_do_next(service: Service) -> None:
    assert f"Serving http://localhost:{service.port}" in service.log()
    assert f"curl -X POST http://localhost:{service.port}/v2/instances" in service.log()


def test_the_instances_are_listed_for_an_operator(service: Service) -> None:
    instance = service.create()
    settings = {"project_dir": str(service.project), "cluster": service.cluster, "columns": "200"}
    done = run_machineuse("instances", **settings)
    assert instance["id"] in done.stdout, done.stderr
    stack = run_machineuse("pulumi", "--", "stack", "--show-urns", **settings)
    assert f"::{instance['id']}-browser" in stack.stdout, stack.stderr


def test_with_tokens_only_their_bearers_may_call(start_service: StartService) -> None:
    service = start_service(tokens=json.dumps([TOKEN]))
    assert service.http.get("/health").status_code == 200
    refused = service.http.get("/v2/instances")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert service.http.get("/v2/instances", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert TOKEN not in service.log()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_the_calls_that_wait(start_service: StartService, how: signal.Signals) -> None:
    service = start_service()
    url = f"http://127.0.0.1:{service.port}/v2/instances"
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(httpx.post, url, json={}, headers={"Prefer": "wait=300"}, timeout=120)
        for _ in range(1000):
            if service.http.get("/health").json()["instances_count"]:
                break
            threading.Event().wait(0.01)
        assert service.end(how) == 0
        assert answer.result().status_code == 201
        assert answer.result().json()["status"] in ("creating", "running")
    service.start()
    assert service.wait_for(answer.result().json()["id"], "running", timeout_s=90)
