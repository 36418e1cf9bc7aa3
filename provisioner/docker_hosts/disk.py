"""Disk on a Docker host: how full it is, what volumes hold, and whether their size can be limited."""

from __future__ import annotations

import secrets

from provisioner.docker_hosts.helpers import run_helper
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
    name, labels = _probe("quota", cluster=cluster, ledger_id=ledger_id)
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


def measure_data_disk(host: DockerHost, *, helper_image: str, cluster: str, ledger_id: str) -> tuple[int, int]:
    """Return the size of the file system that has the engine's data, and how much of it is used, in bytes.

    A helper container says so: its root is on it. Raises DockerError.
    """
    name, labels = _probe("disk", cluster=cluster, ledger_id=ledger_id)
    code, output = run_helper(host, "df -Pk /", image=helper_image, volume=name, mounts={}, labels=labels)
    try:
        total_kib, used_kib = (int(word) for word in output.splitlines()[-1].split()[1:3])
    except (IndexError, ValueError) as error:
        raise DockerError("The node's disk could not be measured.", detail=f"df, exit {code}: {output}") from error
    return total_kib * 1024, used_kib * 1024


def _probe(what: str, *, cluster: str, ledger_id: str) -> tuple[str, dict[str, str]]:
    """Return a new name and the labels for something that is only there to find out `what`.

    By them it is known for an orphan where a crash leaves it.
    """
    labels = {CLUSTER_LABEL: cluster, LEDGER_LABEL: ledger_id, PROBE_LABEL: what}
    return f"machineuse-{cluster}-probe-{secrets.token_hex(4)}", labels
