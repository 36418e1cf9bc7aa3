"""Measures a snapshot and both ways back, for a home of 200 MB in 2,700 files, half of it incompressible.

    python -m bench.snapshots [--rounds 3]

The container only waits to be stopped: what is measured is the capture and the restore, not the browser.
"""

from __future__ import annotations

import argparse
import resource
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docker.types import Mount

from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.volumes import remove_volume
from provisioner.snapshots.capture import Capture, CaptureRequest
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.machine import Volumes
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import RestoreRequest, restore
from stacks.spec import BROWSER_IMAGE, HOME_PATH

FILL = """
import os
for number in range(2700):
    os.makedirs(f"profile/{number % 50}", exist_ok=True)
    with open(f"profile/{number % 50}/{number}", "wb") as file:
        file.write(os.urandom(37_000) + bytes(37_000))
print("full", flush=True)
"""


def measure(*, store: DirectoryStore) -> dict[str, float]:
    """Take one snapshot and restore it both ways; return the seconds of every part."""
    token = secrets.token_hex(4)
    host = DockerHost()
    machine = DockerMachine(host, helper_image=BROWSER_IMAGE)
    snapshot = SnapshotId(instance_id=f"mu-{token}", generation=1)
    volumes = Volumes(home=f"bench-{token}", copy=f"bench-{token}-copy", home_path=HOME_PATH)
    container = f"bench-{token}"
    restored = {method: f"bench-{token}-{method.value}" for method in Method}
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.monotonic()
        work()
        seconds[name] = time.monotonic() - started

    try:
        for volume in (volumes.home, *restored.values()):
            host.api.create_volume(volume)
        _start(host, container, volume=volumes.home)
        request = CaptureRequest(
            snapshot=snapshot,
            cluster="bench",
            node_id="local",
            container=container,
            volumes=volumes,
            image=BROWSER_IMAGE,
        )
        capture = Capture(request, machine=machine, store=store)
        for step in capture.steps:
            timed(f"capture: {step.name}", step.run)
        seconds["capture"] = sum(seconds.values())
        for method, volume in restored.items():
            target = Volumes(home=volume, copy=volumes.copy, home_path=HOME_PATH)
            wanted = RestoreRequest(snapshot=snapshot, method=method, volumes=target, image=BROWSER_IMAGE)
            timed(method.value, lambda wanted=wanted: restore(wanted, machine=machine, store=store))
    finally:
        host.slow_api.remove_container(container, force=True)
        for volume in (volumes.home, volumes.copy, *restored.values()):
            remove_volume(host, volume)
        store.delete(snapshot)
        host.close()
    return seconds


def _start(host: DockerHost, name: str, *, volume: str) -> None:
    """Run a container that fills its home and then waits to be stopped; return when the home is full."""
    host.slow_api.create_container(
        BROWSER_IMAGE,
        entrypoint=["sh", "-c"],
        command=[f"trap 'exit 0' TERM; python3 -c '{FILL}'; while :; do sleep 0.05; done"],
        working_dir=HOME_PATH,
        name=name,
        host_config=host.api.create_host_config(mounts=[Mount(HOME_PATH, volume, type="volume")]),
    )
    host.slow_api.start(name)
    while b"full" not in host.api.logs(name):
        time.sleep(0.1)


def main() -> None:
    """Print the median of every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    all_seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(rounds):
            for name, taken in measure(store=DirectoryStore(Path(directory))).items():
                all_seconds[name].append(taken)
    for name, taken_s in all_seconds.items():
        print(f"{name:20} {statistics.median(taken_s):6.2f} s")  # noqa: T201
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'peak memory':20} {peak_mib:6.0f} MiB")  # noqa: T201


if __name__ == "__main__":
    main()
