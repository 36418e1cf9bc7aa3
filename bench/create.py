"""Measures a create, from the request to an answering debug port, against bare `docker run` of the same image.

    python -m bench [--rounds 10] [--instances 10]

Both are interleaved in one run, so the machine's noise hits both alike; what counts is the ratio of the medians. Both
give their browser the same volume, limits, network settings and seccomp profile.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from stacks.spec import BROWSER_IMAGE, HOME_PATH, SECCOMP_PROFILE
from tests.support.service import Service, free_port

POLL_S = 0.005


def wait_for_cdp(port: int, *, timeout_s: float = 60) -> None:
    """Return as soon as a debug port answers."""
    deadline = time.monotonic() + timeout_s
    with httpx.Client(timeout=2) as http:
        while time.monotonic() < deadline:
            try:
                if http.get(f"http://127.0.0.1:{port}/json/version").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(POLL_S)
    raise SystemExit(f"port {port} does not answer")


def time_service(service: Service) -> float:
    """Create one instance through the API; return the seconds until its debug port answers."""
    started = time.monotonic()
    instance = service.create(wait_s=0, config={"memory_gb": 1, "cpu_cores": 2})
    wait_for_cdp(instance["debug_port"])
    took_s = time.monotonic() - started
    service.wait_for(instance["id"], "running")
    service.delete(instance["id"])
    return took_s


def time_docker(network: str) -> float:
    """Run one browser with the Docker client; return the seconds until its debug port answers."""
    name, port, stream_port = f"machineuse-bench-{secrets.token_hex(4)}", free_port(), free_port()
    command = ["docker", "run", "-d", "--name", name, "--memory", "1g", "--memory-swap", "1g", "--cpus", "2"]
    command += ["--shm-size", "512m", "--network", network, "--mount", f"type=volume,source={name},target={HOME_PATH}"]
    command += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    command += ["--security-opt", f"seccomp={SECCOMP_PROFILE}", "--restart", "unless-stopped"]
    command += ["-p", f"127.0.0.1:{port}:9222", "-p", f"127.0.0.1:{stream_port}:6080", BROWSER_IMAGE]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wait_for_cdp(port)
    took_s = time.monotonic() - started
    subprocess.run(["docker", "rm", "-f", name], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["docker", "volume", "rm", "-f", name], check=True, stdout=subprocess.DEVNULL)
    return took_s


def show(name: str, times: list[float]) -> None:
    """Print one row."""
    print(f"{name:<22} median {statistics.median(times):5.2f} s   min {min(times):5.2f}   max {max(times):5.2f}")  # noqa: T201


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--instances", type=int, default=10, help="instances that are in the stack all the time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        project = Path(directory)
        for name in ("Pulumi.yaml", "stacks", "provisioner", "images", ".venv"):
            (project / name).symlink_to(Path.cwd() / name)
        service = Service(project, settings={"memory_overcommit": "8"})
        try:
            service.start()
            for _ in range(options.instances):
                service.create(config={"memory_gb": 1, "cpu_cores": 1})
            network = service.network()
            time_docker(network), time_service(service)  # the first of each warms caches
            bare, ours = [], []
            for _ in range(options.rounds):
                bare.append(time_docker(network))
                ours.append(time_service(service))
        finally:
            service.clean_up()
    show("docker run", bare)
    show("POST /v2/instances", ours)
    print(f"ratio of the medians: {statistics.median(ours) / statistics.median(bare):.2f}")  # noqa: T201
