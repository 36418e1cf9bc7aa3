"""The command `machineuse`: what it prints and leaves on disk, and what it refuses in one clear line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.service import COMMAND, Service, free_port

CHECKOUT = Path(__file__).resolve().parent.parent.parent
SMALL = {"memory_gb": 0.5, "cpu_cores": 1}


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    """Give a service that chooses the form of its log by itself."""
    return start_service(log_format="auto")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- on disk


def test_everything_on_disk_is_in_one_directory_that_nobody_else_can_read(service: Service) -> None:
    instance = service.create(config=SMALL)
    assert service.post(f"{instance['id']}/dormant").json()["status"] == "dormant"
    data = service.project / ".machineuse"
    assert mode_of(data) == 0o700
    assert mode_of(data / "passphrase") == 0o600
    for kept in ("ledger.db", "state/.pulumi", "logs/machineuse.log", f"snapshots/{instance['id']}", "pulumi-home"):
        assert (data / kept).exists(), kept
    assert mode_of(data / "snapshots") == 0o700  # which a setting may put elsewhere
    service.delete(instance["id"])


def test_beside_that_directory_the_project_gets_nothing(service: Service) -> None:
    made = {path.name for path in service.project.iterdir() if not path.is_symlink()}
    assert made == {".machineuse", f"Pulumi.{service.cluster}.yaml", service.log_path.name}


def test_the_data_directory_is_ignored_by_git() -> None:
    done = subprocess.run(
        ["git", "check-ignore", "--quiet", ".machineuse/passphrase"], cwd=CHECKOUT, timeout=30, check=False
    )
    assert done.returncode == 0


# ---- the log


def test_off_a_terminal_the_log_is_json_lines(service: Service) -> None:
    service.http.get("/v2/instances")
    lines = [line for line in service.log().splitlines() if line.startswith("{")]
    entries = [json.loads(line) for line in lines]
    request = [entry for entry in entries if entry["event"] == "request"][-1]
    assert (request["method"], request["path"], request["status"]) == ("GET", "/v2/instances", 200)
    assert all({"event", "level", "timestamp", "logger"} <= entry.keys() for entry in entries)
    # What is not JSON is the greeting for a person.
    others = [line for line in service.log().splitlines() if line and not line.startswith("{")]
    assert len(others) == 2
    assert f"Serving http://localhost:{service.port}" in others[0]


def test_on_a_terminal_the_log_is_one_readable_line_per_event(service: Service) -> None:
    service.stop()
    shown = show_on_terminal(service, until="request")
    service.start()
    assert f"Serving http://localhost:{service.port}" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not [line for line in plain.splitlines() if line.startswith("{")]
    events = [line for line in plain.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert any("control plane started" in line for line in events)
    request = next(line for line in events if "/v2/nodes" in line)
    assert "request" in request
    assert "status=200" in request
    assert any("stopped" in line for line in events)


def show_on_terminal(service: Service, *, until: str) -> str:
    """Serve on a terminal of its own, call it once, stop it with Ctrl-C; return what the terminal showed."""
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        [str(COMMAND), "serve"],
        env=service.environment,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    shown = ""
    deadline = time.monotonic() + 60
    asked = ended = False
    try:
        while time.monotonic() < deadline:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the other end is closed: it has ended
                break
            shown += part.decode(errors="replace")
            if not asked and "Serving http" in shown:
                asked = service.http.get("/v2/nodes").status_code == 200
            if asked and not ended and until in shown:
                process.send_signal(signal.SIGINT)
                ended = True
        assert process.wait(timeout=60) == 0, shown
    finally:
        if process.poll() is None:
            process.kill()
        os.close(terminal)
    return shown


# ---- refusals


def test_a_busy_port_is_one_clear_line(service: Service, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = service.machineuse("serve", "--port", str(port), "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"Port {port} on 127.0.0.1 is taken" in done.stderr
    assert f"process {os.getpid()}" in done.stderr
    assert "--port" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_a_second_service_on_the_same_data_directory_refuses(service: Service) -> None:
    done = service.machineuse("serve", "--port", str(free_port()))
    assert done.returncode == 1
    assert "Another service" in done.stderr
    assert str(service.settings.data_dir) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert service.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [("MACHINEUSE_PORT", "eighty"), ("MACHINEUSE_IDLE_AFTER_S", "-1"), ("MACHINEUSE_TOKENS", "not json")],
)
def test_a_setting_that_does_not_fit_is_named(service: Service, name: str, value: str) -> None:
    done = service.machineuse("serve", **{name: value})
    assert done.returncode == 1
    assert name.removeprefix("MACHINEUSE_").lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_a_mistake_in_the_clusters_file_is_named(service: Service, tmp_path: Path) -> None:
    cluster = "mistaken"
    path = service.project / f"Pulumi.{cluster}.yaml"
    path.write_text("config:\n  cluster:nodes:\n    - {id: local, max_instances: none}\n")
    try:
        done = service.machineuse("serve", "--cluster", cluster, "--port", "0", "--data-dir", str(tmp_path / "data"))
    finally:
        path.unlink()
    assert done.returncode == 1
    assert "Pulumi.mistaken.yaml" in done.stderr
    assert "line 3: node 'local': max_instances: " in done.stderr
    assert "Traceback" not in done.stderr


# ---- beside the service


def test_env_makes_a_plain_pulumi_work_on_the_cluster(service: Service) -> None:
    instance = service.create(config=SMALL)
    script = f'eval "$({COMMAND} env)" && cd {service.project} && pulumi stack --show-urns --non-interactive'
    bare = {name: value for name, value in service.environment.items() if not name.startswith("PULUMI_")}
    done = subprocess.run(["sh", "-c", script], env=bare, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"machineuse:index:Instance::{instance['id']}" in done.stdout
    assert f"::{instance['id']}-browser" in done.stdout
    service.delete(instance["id"])


@pytest.mark.parametrize("arguments", [["pulumi", "stack", "--show-urns"], ["pulumi", "--", "stack", "--show-urns"]])
def test_pulumi_runs_on_the_cluster_from_anywhere(service: Service, arguments: list[str]) -> None:
    done = service.machineuse(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"urn:pulumi:{service.cluster}::machineuse::" in done.stdout
    assert "docker:index/network:Network" in done.stdout


def test_pulumis_exit_code_is_passed_on(service: Service) -> None:
    assert service.machineuse("pulumi", "stack", "output", "no-such-output").returncode != 0


def test_instances_lists_what_the_ledger_knows(service: Service) -> None:
    instance = service.create(config=SMALL)
    done = service.machineuse("instances", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if instance["id"] in line)
    assert "running" in row
    assert str(instance["debug_port"]) in row
    service.delete(instance["id"])


def test_help_names_every_command(service: Service) -> None:
    done = service.machineuse("--help")
    assert done.returncode == 0
    for command in ("serve", "setup", "env", "pulumi", "instances", "node"):
        assert command in done.stdout
