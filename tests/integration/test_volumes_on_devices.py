"""A volume that names a device: adopted, pointed to another device, and never put in the place of files."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import docker
import pytest

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import DockerError
from provisioner.plugins.docker.volumes import VolumeType
from provisioner.plugins.policy import DeleteDecision
from provisioner.plugins.resources import Call
from provisioner.plugins.sessions import Session
from stacks.names import LEDGER_LABEL, URN_LABEL

CALL = Call(urn="urn:home", name="home", config={}, session=Session(""))


class Policy:
    """Allows everything, and remembers what it was asked about."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        del urn, labels, replacing
        self.kinds.append(kind)
        return DeleteDecision(allowed=True)

    def is_away(self, node_id: str) -> bool:
        del node_id
        return False

    def note_leftover(self, *, urn: str, host: str, name: str) -> None: ...


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def volumes(policy: Policy) -> VolumeType:
    return VolumeType(DockerHosts(), policy)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"machineuse-test-{secrets.token_hex(4)}"
    yield name
    client = docker.from_env()
    for volume in client.volumes.list(filters={"name": name}):
        volume.remove(force=True)
    client.close()


def inputs(name: str, *, device: str | None) -> dict[str, Any]:
    labels = [{"label": URN_LABEL, "value": CALL.urn}, {"label": LEDGER_LABEL, "value": "ledger"}]
    options = {"driverOpts": {"type": "ext4", "device": device}} if device else {}
    return {"name": name, "labels": labels, "driver": "local", **options}


def test_it_is_adopted_for_the_same_device_and_made_anew_for_another(
    volumes: VolumeType, policy: Policy, name: str
) -> None:
    first = volumes.create(CALL, inputs=inputs(name, device="/dev/one"))
    assert volumes.create(CALL, inputs=inputs(name, device="/dev/one")) == first
    second = volumes.create(CALL, inputs=inputs(name, device="/dev/two"))
    assert second.outputs["driverOpts"]["device"] == "/dev/two"
    volumes.delete(CALL, id=name, inputs={}, outputs=second.outputs)
    assert volumes.read(CALL, id=name, inputs={}, outputs=second.outputs) is None
    assert policy.kinds == ["mount"]


def test_a_volume_with_files_of_its_own_is_not_taken_for_one_on_a_device(volumes: VolumeType, name: str) -> None:
    plain = volumes.create(CALL, inputs=inputs(name, device=None))
    with pytest.raises(DockerError, match="has files of its own"):
        volumes.create(CALL, inputs=inputs(name, device="/dev/one"))
    assert volumes.read(CALL, id=name, inputs={}, outputs=plain.outputs) is not None
