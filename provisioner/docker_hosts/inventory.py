"""What of ours is on a Docker host: found by labels, and described.

Short-lived helper containers are told where they bear the cluster's labels: one that a crash left is found by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.networks import find_network
from provisioner.errors import DockerNotFound
from stacks.names import CLUSTER_LABEL, INSTANCE_LABEL, LEDGER_LABEL, URN_LABEL, Names, network_name

_LOG_BYTES = 4096
_LOG_LINES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedContainer:
    """A container, as the engine's list shows it."""

    id: str
    name: str
    instance_id: str | None
    state: str
    """Docker's word: created, running, paused, restarting, removing, exited or dead."""
    status: str
    """Docker's sentence, such as `Exited (137) 5 seconds ago`."""
    layer_bytes: int | None = None
    """What the container wrote above its image; only when the list was asked for sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedVolume:
    """A volume, as the engine's list shows it."""

    name: str
    instance_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerState:
    """How a container is doing."""

    state: str
    exit_code: int
    oom_killed: bool
    restart_count: int
    error: str

    @property
    def running(self) -> bool:
        """Say whether its process runs now."""
        return self.state in ("running", "paused")


def list_containers(
    host: DockerHost, *, cluster: str, ledger_id: str, with_sizes: bool = False
) -> list[ListedContainer]:
    """Return every container of this cluster and ledger, stopped ones too. Sizes cost the engine a walk through files.

    Raises DockerError.
    """
    api = host.slow_api if with_sizes else host.api
    rows = host.call("list containers", api.containers, all=True, size=with_sizes, filters=_filters(cluster, ledger_id))
    return [
        ListedContainer(
            id=row["Id"],
            name=(row.get("Names") or ["/"])[0].lstrip("/"),
            instance_id=(row.get("Labels") or {}).get(INSTANCE_LABEL),
            state=row.get("State", ""),
            status=row.get("Status", ""),
            layer_bytes=int(row.get("SizeRw", 0)) if with_sizes else None,
        )
        for row in rows
    ]


def list_volumes(host: DockerHost, *, cluster: str, ledger_id: str) -> list[ListedVolume]:
    """Return every volume of this cluster and ledger. Raises DockerError."""
    answer = host.call("list volumes", host.api.volumes, filters=_filters(cluster, ledger_id))
    return [
        ListedVolume(name=row["Name"], instance_id=(row.get("Labels") or {}).get(INSTANCE_LABEL))
        for row in answer.get("Volumes") or ()
    ]


def find_owner(host: DockerHost, *, cluster: str, ledger_id: str) -> str | None:
    """Return the id of the node that this engine is, or was, in the cluster; None where it never was one.

    The cluster's network there says so. Raises DockerError.
    """
    network = find_network(host, Names(cluster).docker_network(ledger_id))
    urn = str(((network or {}).get("Labels") or {}).get(URN_LABEL, ""))
    return urn.rpartition("::")[2].removesuffix(network_name("")) or None


def describe_container(host: DockerHost, *, name: str) -> ContainerState | None:
    """Return how the container is doing, or None when there is none of that name. Raises DockerError."""
    try:
        found: Mapping[str, Any] = host.call("inspect a container", host.api.inspect_container, name)
    except DockerNotFound:
        return None
    state = found.get("State") or {}
    return ContainerState(
        state=state.get("Status", ""),
        exit_code=int(state.get("ExitCode", 0)),
        oom_killed=bool(state.get("OOMKilled", False)),
        restart_count=int(found.get("RestartCount", 0)),
        error=state.get("Error", ""),
    )


def read_last_log(host: DockerHost, *, name: str) -> str:
    """Return the last non-empty lines that the container wrote, joined and shortened; "" when there is nothing.

    Raises DockerError.
    """
    try:
        raw: bytes = host.call("read a container's log", host.api.logs, name, tail=_LOG_LINES)
    except DockerNotFound:
        return ""
    text = raw[-_LOG_BYTES:].decode("utf-8", errors="replace")
    kept = [" ".join("".join(c if c.isprintable() else " " for c in line).split()) for line in text.splitlines()]
    joined = " | ".join(line for line in kept if line)
    return joined if len(joined) <= 300 else f"…{joined[-300:]}"


def _filters(cluster: str, ledger_id: str) -> dict[str, list[str]]:
    return {"label": [f"{CLUSTER_LABEL}={cluster}", f"{LEDGER_LABEL}={ledger_id}"]}
