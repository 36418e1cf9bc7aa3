"""Our docker plugin with the real engines on both sides: the Pulumi CLI and Docker."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker as docker_py
import pulumi
import pulumi_docker as docker
import pytest

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.plugins.docker.provider import DockerProvider
from provisioner.plugins.failures import read_code
from provisioner.plugins.host import PluginHost
from provisioner.plugins.policy import DeleteDecision
from tests.support.inline_stack import InlineStack
from tests.support.tiny_image import make_tiny_image

SOCKET = Path("/var/run/docker.sock")
UNLESS_STOPPED: Any = {"Name": "unless-stopped"}
LAUNCHERS = Path(__file__).resolve().parents[2] / "provisioner" / "plugins" / "bin"


@dataclass
class Policy:
    """Answers as the test says, and remembers what it was asked."""

    decision: DeleteDecision = field(default_factory=lambda: DeleteDecision(allowed=True, stop_timeout_s=1))
    asked: list[tuple[str, bool]] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        assert labels["machineuse.urn"] in urn
        self.asked.append((kind, replacing))
        return self.decision

    def is_away(self, node_id: str) -> bool:
        del node_id
        return False

    def note_leftover(self, *, urn: str, host: str, name: str) -> None:
        assert urn
        assert host
        self.leftovers.append(name)


class Machine:
    """A program of one network, one volume and one container, and the stack that it is run in."""

    def __init__(self, stack: InlineStack, *, image: str, host: str) -> None:
        self.id = secrets.token_hex(4)
        self.name = f"machineuse-test-{self.id}"
        self.stack = stack
        self.stack.program = self.declare
        self.host = host
        self.body = True
        self.container: dict[str, Any] = {
            "image": image,
            "memory": 64,
            "memory_swap": 64,
            "cpus": "0.5",
            "restart": "unless-stopped",
            "must_run": True,
            "capabilities": docker.ContainerCapabilitiesArgs(drops=["ALL"]),
            "security_opts": ["no-new-privileges"],
        }

    def declare(self) -> None:
        """Declare everything, or nothing."""
        if not self.body:
            return
        opts = pulumi.ResourceOptions(provider=docker.Provider("node", host=self.host))
        network = docker.Network(
            "network",
            name=self.name,
            driver="bridge",
            options={"com.docker.network.bridge.enable_icc": "false"},
            labels=[docker.NetworkLabelArgs(label=k, value=v) for k, v in self.labels("Network").items()],
            opts=opts,
        )
        volume = docker.Volume(
            "home",
            name=f"{self.name}-home",
            labels=[docker.VolumeLabelArgs(label=k, value=v) for k, v in self.labels("Volume").items()],
            opts=opts,
        )
        docker.Container(
            "browser",
            name=self.name,
            network_mode=network.name,
            mounts=[docker.ContainerMountArgs(type="volume", source=volume.name, target="/home/machine")],
            labels=[docker.ContainerLabelArgs(label=k, value=v) for k, v in self.labels("Container").items()],
            opts=opts,
            **self.container,
        )

    def labels(self, kind: str) -> dict[str, str]:
        """Return what a resource of ours is labelled with; the policy finds its URN's end in it."""
        return {
            "machineuse.urn": f"{kind}::",
            "machineuse.ledger": f"ledger-{self.id}",
            "machineuse.instance": self.id,
            "machineuse.pids": "99",
            "machineuse.test": self.id,
        }


@pytest.fixture(scope="module")
def engine() -> Iterator[docker_py.DockerClient]:
    client = docker_py.from_env()
    yield client
    client.close()


@pytest.fixture(scope="module")
def image(engine: docker_py.DockerClient) -> Iterator[str]:
    name = f"machineuse-test/{secrets.token_hex(4)}:1"
    make_tiny_image(engine, name)
    yield name
    engine.images.remove(name, force=True)


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def hosts() -> Iterator[DockerHosts]:
    hosts = DockerHosts(timeout_s=2)
    yield hosts
    hosts.close()


@pytest.fixture
def stack(tmp_path: Path, policy: Policy, hosts: DockerHosts) -> Iterator[InlineStack]:
    with PluginHost([DockerProvider(hosts=hosts, policy=policy)]) as host:
        stack = InlineStack(tmp_path, debug_providers=host.debug_providers)
        yield stack
        stack.close()


@pytest.fixture
def machine(stack: InlineStack, image: str, engine: docker_py.DockerClient, tmp_path: Path) -> Iterator[Machine]:
    way = tmp_path / "docker.sock"  # a way to the engine that a test can cut off
    way.symlink_to(SOCKET)
    machine = Machine(stack, image=image, host=f"unix://{way}")
    yield machine
    remove_all(engine, machine.id)


def remove_all(engine: docker_py.DockerClient, test: str) -> None:
    """Remove what a test left."""
    label = f"machineuse.test={test}"
    for container in engine.containers.list(all=True, filters={"label": label}):
        container.remove(force=True)
    for volume in engine.volumes.list(filters={"label": label}):
        volume.remove()
    for network in engine.networks.list(filters={"label": label}):
        network.remove()


def _outputs(state: list[dict[str, Any]]) -> dict[str, Any]:
    return {one["urn"]: one["outputs"] for one in state}


def test_an_untouched_stack_shows_no_changes(machine: Machine, engine: docker_py.DockerClient) -> None:
    created = machine.stack.up()
    assert created.ops == {"create": 3}, created.text
    live = engine.containers.get(machine.name)
    limits = live.attrs["HostConfig"]
    assert live.status == "running"
    assert (limits["Memory"], limits["NanoCpus"], limits["PidsLimit"]) == (64 * 2**20, 5 * 10**8, 99)
    assert limits["NetworkMode"] == machine.name
    preview = machine.stack.preview()
    assert (preview.status, preview.ops) == (0, {}), preview.text
    refreshed = machine.stack.up("--refresh")
    assert refreshed.ops == {"refresh": 3}, refreshed.text
    state = machine.stack.state()
    assert machine.stack.up("--refresh").ops == {"refresh": 3}
    assert _outputs(machine.stack.state()) == _outputs(state)


def test_what_changed_behind_the_stack_shows_as_drift_and_is_put_right(
    machine: Machine, engine: docker_py.DockerClient
) -> None:
    machine.stack.up()
    live = engine.containers.get(machine.name)
    live.stop()
    assert machine.stack.preview("--refresh").ops == {"refresh": 3, "update": 1}
    machine.stack.up("--refresh")
    restarted = engine.containers.get(machine.name)
    assert (restarted.id, restarted.status) == (live.id, "running")

    live.update(mem_limit="128m", memswap_limit="128m")
    assert machine.stack.up("--refresh").ops == {"refresh": 3, "update": 1}
    live.reload()
    assert live.attrs["HostConfig"]["Memory"] == 64 * 2**20

    live.remove(force=True)
    preview = machine.stack.preview("--refresh")
    assert preview.ops == {"refresh": 3, "create": 1}, preview.text
    machine.stack.up("--refresh")
    assert engine.containers.get(machine.name).id != live.id
    assert machine.stack.preview("--refresh").ops == {"refresh": 3}


def test_limits_change_in_place_and_an_image_by_replacement(
    machine: Machine, engine: docker_py.DockerClient, policy: Policy
) -> None:
    machine.stack.up()
    before = engine.containers.get(machine.name)
    machine.container |= {"memory": 96, "memory_swap": 96, "cpus": "1.5"}
    assert machine.stack.up().ops == {"update": 1}
    before.reload()
    assert before.attrs["HostConfig"]["Memory"] == 96 * 2**20
    assert before.attrs["HostConfig"]["NanoCpus"] == 1_500_000_000
    assert machine.stack.preview("--refresh").ops == {"refresh": 3}

    machine.container["envs"] = ["ANSWER=42"]
    replaced = machine.stack.up()
    assert replaced.ops == {"delete-replaced": 1, "replace": 1, "create-replacement": 1}, replaced.text
    after = engine.containers.get(machine.name)
    assert after.id != before.id
    assert "ANSWER=42" in after.attrs["Config"]["Env"]
    assert policy.asked == [("container", True)]
    assert machine.stack.preview("--refresh").ops == {"refresh": 3}


def test_a_delete_that_the_policy_refuses_touches_nothing(
    machine: Machine, engine: docker_py.DockerClient, policy: Policy
) -> None:
    machine.stack.up()
    allowed, policy.decision = policy.decision, DeleteDecision(allowed=False, reason="It is still wanted alive.")
    machine.body = False
    refused = machine.stack.up("--continue-on-error")
    assert refused.status != 0
    assert "It is still wanted alive." in refused.errors
    assert read_code(refused.errors) == "still_wanted"
    assert engine.containers.get(machine.name).status == "running"
    assert engine.volumes.get(f"{machine.name}-home")
    assert len(machine.stack.state()) == 3

    policy.decision = allowed
    assert machine.stack.up().ops == {"delete": 3}
    assert machine.stack.state() == []
    assert engine.containers.list(all=True, filters={"name": machine.name}) == []
    assert engine.volumes.list(filters={"name": machine.name}) == []
    assert engine.networks.list(names=[machine.name]) == []


def test_what_an_interrupted_create_left_behind_is_adopted(machine: Machine, engine: docker_py.DockerClient) -> None:
    machine.stack.up()
    running = engine.containers.get(machine.name)
    network = engine.networks.list(names=[machine.name])[0]
    machine.stack.forget()
    adopted = machine.stack.up()
    assert adopted.ops == {"create": 3}, adopted.text
    assert engine.containers.get(machine.name).id == running.id
    assert engine.networks.list(names=[machine.name])[0].id == network.id

    machine.stack.forget()
    running.remove(force=True)
    never_started = engine.containers.create(
        machine.container["image"],
        name=machine.name,
        labels=machine.labels("Container"),
        mem_limit="64m",
        memswap_limit="64m",
        nano_cpus=5 * 10**8,
        restart_policy=UNLESS_STOPPED,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        network=machine.name,
        mounts=[docker_py.types.Mount("/home/machine", f"{machine.name}-home")],
    )
    machine.stack.up()
    now = engine.containers.get(machine.name)
    assert (now.id, now.status) == (never_started.id, "running")

    machine.stack.forget()
    machine.container["envs"] = ["OTHER=1"]
    machine.stack.up()
    assert engine.containers.get(machine.name).id != never_started.id
    assert machine.stack.preview("--refresh").ops == {"refresh": 3}


def test_somebody_elses_container_is_never_taken(machine: Machine, engine: docker_py.DockerClient) -> None:
    foreign = engine.containers.create(
        machine.container["image"], name=machine.name, labels={"machineuse.test": machine.id}
    )
    engine.volumes.create(f"{machine.name}-home", labels={"machineuse.test": machine.id})
    failed = machine.stack.up("--continue-on-error")
    assert f"The volume {machine.name}-home" in failed.errors
    assert "was not made for this resource" in failed.errors
    engine.volumes.get(f"{machine.name}-home").remove()
    failed = machine.stack.up("--continue-on-error")
    assert f"The container {machine.name}" in failed.errors
    assert engine.containers.get(machine.name).id == foreign.id


def test_a_container_that_cannot_start_is_removed_again(machine: Machine, engine: docker_py.DockerClient) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        machine.container["ports"] = [docker.ContainerPortArgs(internal=9222, external=port, ip="127.0.0.1")]
        failed = machine.stack.up()
        assert read_code(failed.errors) == "port_taken", failed.text
        assert engine.containers.list(all=True, filters={"name": machine.name}) == []
    assert machine.stack.up().ops == {"create": 1}
    assert machine.stack.preview("--refresh").ops == {"refresh": 3}


def test_an_image_that_nobody_has_is_named_in_the_error(machine: Machine) -> None:
    machine.container["image"] = "127.0.0.1:1/machineuse-test/nothing:1"
    failed = machine.stack.up()
    assert read_code(failed.errors) == "unknown_image", failed.text
    assert "127.0.0.1:1/machineuse-test/nothing:1" in failed.errors


def test_an_input_that_is_not_supported_is_a_failure_that_names_it(machine: Machine) -> None:
    machine.container["privileged"] = True
    failed = machine.stack.preview()
    assert failed.status != 0
    assert "'privileged' is not supported" in failed.text


def test_a_node_that_does_not_answer_fails_at_once_unless_the_delete_is_forced(
    machine: Machine, policy: Policy, engine: docker_py.DockerClient, hosts: DockerHosts
) -> None:
    machine.stack.up()
    Path(machine.host.removeprefix("unix://")).unlink()
    hosts.close()  # connections that are open would still work
    machine.body = False
    failed = machine.stack.up("--continue-on-error")
    assert read_code(failed.errors) == "node_unreachable", failed.text
    policy.decision = DeleteDecision(allowed=True, force=True)
    forced = machine.stack.up()
    assert forced.status == 0, forced.text
    assert machine.stack.state() == []
    assert sorted(policy.leftovers) == [machine.name, f"{machine.name}-home"]  # a network holds nothing
    assert engine.containers.get(machine.name).status == "running"


def test_a_plain_pulumi_up_starts_the_plugin_as_a_process(
    tmp_path: Path, image: str, engine: docker_py.DockerClient
) -> None:
    stack = InlineStack(tmp_path, plugin_directory=LAUNCHERS)
    machine = Machine(stack, image=image, host=f"unix://{SOCKET}")
    try:
        created = stack.up()
        assert created.ops == {"create": 3}, created.text
        assert stack.preview("--refresh").ops == {"refresh": 3}
        machine.body = False
        refused = stack.up()
        assert read_code(refused.errors) == "still_wanted", refused.text
        assert "MACHINEUSE_DATA_DIR" in refused.errors
        assert engine.containers.get(machine.name).status == "running"
    finally:
        stack.close()
        remove_all(engine, machine.id)
