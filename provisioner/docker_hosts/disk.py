"""Disk on a Docker host: what volumes hold, and whether their size can be limited."""

from __future__ import annotations

import secrets

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.volumes import remove_volume
from provisioner.errors import DockerError, NodeUnreachable
from stacks.names import CLUSTER_LABEL, LEDGER_LABEL
from stacks.spec import LABEL_PREFIX

PROBE_LABEL = f"{LABEL_PREFIX}probe"


def measure_volumes(host: DockerHost) -> dict[str, int]:
    """Return the bytes in every volume, by name; the engine walks through all of them. Raises DockerError."""
    answer = host.call("measure volumes", host.slow_api.df)
    sizes = {row["Name"]: int((row.get("UsageData") or {}).get("Size", -1)) for row in answer.get("Volumes") or ()}
    return {name: size for name, size in sizes.items() if size >= 0}


def can_limit_volumes(host: DockerHost, *, cluster: str, ledger_id: str) -> bool:
    """Say whether the engine can enforce a volume's size: try it on a tiny volume, and remove that.

    An engine whose storage can't (anything but XFS with project quotas) refuses at once. Raises NodeUnreachable.
    """
    name = f"machineuse-{cluster}-probe-{secrets.token_hex(4)}"
    labels = {CLUSTER_LABEL: cluster, LEDGER_LABEL: ledger_id, PROBE_LABEL: "quota"}
    try:
        host.call(
            "make a volume of limited size",
            host.api.create_volume,
            name,
            driver="local",
            driver_opts={"size": "1m"},
            labels=labels,
        )
    except NodeUnreachable:
        raise
    except DockerError:
        return False
    remove_volume(host, name)
    return True
