"""Volumes of a Docker engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from provisioner.docker_hosts.helpers import remove_helpers
from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerError, DockerNotFound

IN_USE_TIMEOUT_S = 5.0
"""How long a removal waits for the last container that uses the volume to be gone."""
_IN_USE = "volume is in use"


def ensure_volume(
    host: DockerHost,
    name: str,
    *,
    labels: Mapping[str, str],
    driver: str | None = None,
    driver_opts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Create a volume, or find the one of that name, and return what the engine knows about it.

    The engine answers with an existing volume as it is: compare the labels to know whose it is.
    """
    host.check_alive()
    found: dict[str, Any] = host.call(
        f"create volume {name}",
        host.work_api.create_volume,
        name=name,
        driver=driver,
        driver_opts=dict(driver_opts) if driver_opts else None,
        labels=dict(labels),
    )
    return found


def find_volume(host: DockerHost, name: str) -> dict[str, Any] | None:
    """Return what the engine knows about a volume, or None when there is none."""
    try:
        found: dict[str, Any] = host.call(f"inspect volume {name}", host.api.inspect_volume, name)
    except DockerNotFound:
        return None
    return found


def remove_volume(host: DockerHost, name: str) -> None:
    """Remove a volume; one that is gone is a success. Waits a moment for a container that still uses it."""
    host.check_alive()
    give_up_at = time.monotonic() + IN_USE_TIMEOUT_S
    while True:
        try:
            host.call(f"remove volume {name}", host.work_api.remove_volume, name)
        except DockerNotFound:
            return
        except DockerError as error:
            if _IN_USE not in (error.detail or "") or time.monotonic() > give_up_at:
                raise
            remove_helpers(host, name)
            time.sleep(0.1)
        else:
            return
