"""Networks of a Docker engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerError, DockerNotFound

IN_USE_TIMEOUT_S = 5.0
"""How long a removal waits for the last container to leave the network."""
_IN_USE = "has active endpoints"
_EXISTS = "already exists"


def create_network(
    host: DockerHost,
    name: str,
    *,
    labels: Mapping[str, str],
    driver: str,
    options: Mapping[str, str],
    internal: bool,
) -> str | None:
    """Create a network and return its id, or None when there is one of that name."""
    host.check_alive()
    try:
        created = host.call(
            f"create network {name}",
            host.work_api.create_network,
            name,
            driver=driver,
            options=dict(options),
            internal=internal,
            labels=dict(labels),
            check_duplicate=True,
        )
    except DockerError as error:
        if _EXISTS in (error.detail or ""):
            return None
        raise
    return str(created["Id"])


def find_network(host: DockerHost, network: str) -> dict[str, Any] | None:
    """Return what the engine knows about a network, by name or id, or None when there is none."""
    try:
        found: dict[str, Any] = host.call(f"inspect network {network}", host.api.inspect_network, network)
    except DockerNotFound:
        return None
    return found


def remove_network(host: DockerHost, network: str) -> None:
    """Remove a network; one that is gone is a success. Waits a moment for a container that still uses it."""
    host.check_alive()
    give_up_at = time.monotonic() + IN_USE_TIMEOUT_S
    while True:
        try:
            host.call(f"remove network {network}", host.work_api.remove_network, network)
        except DockerNotFound:
            return
        except DockerError as error:
            if _IN_USE not in (error.detail or "") or time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)
        else:
            return
