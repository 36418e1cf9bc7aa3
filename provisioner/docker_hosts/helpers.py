"""Short-lived helper containers: the way to do something inside a volume on a node that has only its Docker engine.

A helper is root without a network, with the few capabilities that `cp -a` needs. It is named after the volume that it
works for, so there is one a volume at a time, and what a crash left is replaced by the next one. A left helper keeps
its volumes from being removed: `volumes.remove_volume` removes the helpers first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from docker.types import LogConfig, Mount

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerError, DockerNotFound

log = structlog.get_logger(__name__)

HELPER_LABEL = "machineuse.helper"
"""On helper containers: the volume that they work for."""

_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP"]


@contextmanager
def helper_container(
    host: DockerHost,
    *,
    image: str,
    volume: str,
    mounts: Mapping[str, str],
    read_only: Sequence[str] = (),
    binds: Mapping[str, str] | None = None,
    devices: Mapping[str, str] | None = None,
    command: Sequence[str] = ("true",),
    environment: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Create a helper for `volume`, which is not started, and remove it afterwards; gives its name.

    `mounts` maps paths to volumes. Nothing of the image is copied into an empty volume. `binds` maps paths to
    directories of the node, read-only; `devices` maps paths to devices of the node.
    """
    name = f"{volume}-helper"
    configuration: dict[str, Any] = {
        "name": name,
        "image": image,
        "entrypoint": [command[0]],
        "command": list(command[1:]),
        "user": "0:0",
        "environment": dict(environment or {}),
        "labels": {**(labels or {}), HELPER_LABEL: volume},
        "healthcheck": {"test": ["NONE"]},
        "host_config": host.api.create_host_config(
            mounts=[
                Mount(path, source, type="volume", read_only=path in read_only, no_copy=True)
                for path, source in mounts.items()
            ]
            + [Mount(path, source, type="bind", read_only=True) for path, source in (binds or {}).items()],
            devices=[f"{source}:{path}:rw" for path, source in (devices or {}).items()],
            network_mode="none",
            cap_drop=["ALL"],
            cap_add=_CAPABILITIES,
            security_opt=["no-new-privileges"],
            log_config=LogConfig(type=LogConfig.types.JSON),
        ),
    }
    what = f"create a helper container for {volume}"
    try:
        host.call(what, host.slow_api.create_container, **configuration)
    except DockerNotFound:
        raise
    except DockerError:
        if not _exists(host, name):
            raise
        log.info("left helper container removed", container=name)
        _remove(host, name)
        host.call(what, host.slow_api.create_container, **configuration)
    try:
        yield name
    finally:
        with contextlib.suppress(DockerError):  # what matters has been done, or raises already
            _remove(host, name)


def run_helper(host: DockerHost, script: str, *arguments: str, **helper: Any) -> tuple[int, str]:
    """Run a shell script in a helper (see `helper_container`) to its end; return its exit code and its output."""
    with helper_container(host, command=("/bin/sh", "-c", script, "sh", *arguments), **helper) as name:
        host.call(f"start {name}", host.slow_api.start, name)
        code = host.call(f"wait for {name}", host.slow_api.wait, name)["StatusCode"]
        output = host.call(f"read what {name} says", host.slow_api.logs, name)
        return code, output.decode(errors="replace")


def run_inside(host: DockerHost, container: str, script: str) -> tuple[int, str]:
    """Run a shell script in a helper that runs already; return its exit code and its output."""
    what = f"run a script in {container}"
    created = host.call(what, host.slow_api.exec_create, container, ["/bin/sh", "-c", script])
    output = host.call(what, host.slow_api.exec_start, created["Id"])
    code = host.call(what, host.slow_api.exec_inspect, created["Id"])["ExitCode"]
    return -1 if code is None else code, output.decode(errors="replace")


def remove_helpers(host: DockerHost, volume: str) -> None:
    """Remove the helper containers that hold a volume. Idempotent."""
    found = host.call(
        f"list the helper containers of {volume}",
        host.api.containers,
        all=True,
        filters={"volume": volume, "label": HELPER_LABEL},
    )
    for container in found:
        _remove(host, container["Id"])


def _exists(host: DockerHost, name: str) -> bool:
    try:
        host.call(f"inspect {name}", host.api.inspect_container, name)
    except DockerNotFound:
        return False
    return True


def _remove(host: DockerHost, name: str) -> None:
    with contextlib.suppress(DockerNotFound):
        host.call(f"remove {name}", host.slow_api.remove_container, name, force=True)
