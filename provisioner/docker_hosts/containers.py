"""Containers of a Docker engine: made from the API's own JSON, by name or id.

Most of it takes its time under load, and may wait for minutes; a sign of life is asked for first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from docker.errors import APIError

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerError, DockerNotFound

Inspected = dict[str, Any]
"""What `docker inspect` prints, as the engine gives it."""

REMOVAL_TIMEOUT_S = 30.0
_BEING_REMOVED = "is already in progress"


def create_container(host: DockerHost, name: str, *, config: Mapping[str, Any]) -> str:
    """Create a container from the API's JSON and return its id; it is not started.

    Raises `DockerNotFound` when its image is not there and `DockerError` when its name is taken, among others.
    """
    host.check_alive()
    return str(host.post(f"create container {name}", f"/containers/create?name={quote(name)}", config)["Id"])


def start_container(host: DockerHost, container: str) -> None:
    """Start a container; one that runs already is a success. Raises `PortTaken` among others."""
    host.check_alive()
    host.call(f"start container {container}", host.work_api.start, container)


def stop_container(host: DockerHost, container: str, *, timeout_s: int) -> None:
    """Send the container its stop signal and kill it after `timeout_s`; one that is stopped or gone is a success."""
    host.check_alive()
    try:
        host.call(f"stop container {container}", host.work_api.stop, container, timeout=timeout_s)
    except DockerNotFound:
        return


def resume_container(host: DockerHost, container: str) -> None:
    """Let a paused container go on; one that is not paused is a success. Raises `DockerNotFound` among others."""
    host.check_alive()
    found = host.call(f"inspect container {container}", host.api.inspect_container, container)
    if found["State"]["Paused"]:
        host.call(f"unpause container {container}", host.work_api.unpause, container)


def kill_container(host: DockerHost, container: str) -> None:
    """Kill a container; one that is gone or stopped already is a success."""
    with host.errors(f"kill container {container}"):
        try:
            host.api.kill(container)
        except APIError as error:
            if error.status_code not in (404, 409):  # gone; not running
                raise


def remove_container(host: DockerHost, container: str, *, kill: bool, anonymous_volumes: bool = True) -> None:
    """Remove a container, by `kill` even while it runs; one that is gone is a success. Named volumes stay."""
    host.check_alive()
    try:
        host.call(
            f"remove container {container}",
            host.work_api.remove_container,
            container,
            v=anonymous_volumes,
            force=kill,
        )
    except DockerNotFound:
        return
    except DockerError as error:
        if _BEING_REMOVED not in (error.detail or ""):
            raise
        _await_removal(host, container)


def _await_removal(host: DockerHost, container: str) -> None:
    give_up_at = time.monotonic() + REMOVAL_TIMEOUT_S
    while find_container(host, container) is not None:
        if time.monotonic() > give_up_at:
            raise DockerError(f"Docker on {host.url} does not come to an end removing container {container}.")
        time.sleep(0.05)


def find_container(host: DockerHost, container: str) -> Inspected | None:
    """Return what the engine knows about a container, by name or id, or None when there is none."""
    host.check_alive()
    try:
        # As work: the engine answers only once whatever it does to the container at that moment is done.
        found: Inspected = host.call(f"inspect container {container}", host.work_api.inspect_container, container)
    except DockerNotFound:
        return None
    return found


def update_container(host: DockerHost, container: str, *, changes: Mapping[str, Any]) -> None:
    """Change limits or restart policy of a container in place; `changes` is the API's JSON, bytes and nano-CPUs."""
    host.check_alive()
    host.post(f"update container {container}", f"/containers/{container}/update", changes)
