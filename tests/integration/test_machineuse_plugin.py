"""Snapshot, Restore and Claim with the real Pulumi CLI and Docker engine, through the whole life of an instance."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker as docker_py
import pulumi
import pulumi_docker as docker
import pytest

from provisioner.docker_hosts.hosts import LOCAL_ENGINE, DockerHosts
from provisioner.plugins.docker.provider import DockerProvider
from provisioner.plugins.failures import read_code
from provisioner.plugins.host import PluginHost
from provisioner.plugins.machineuse import MachineusePlugin
from provisioner.plugins.policy import DeleteDecision
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.manifest import SnapshotId
from provisioner.volumes.ec2 import Ec2Options, Ec2Regions
from stacks.claim import Claim
from stacks.snapshots import Restore, Snapshot
from stacks.spec import BROWSER_IMAGE
from tests.support.inline_stack import InlineStack, Run

HOME = "/home/machine"


@dataclass
class Policy:
    """Answers as the test says, and remembers what it was asked."""

    allowed: bool = True
    asked: list[str] = field(default_factory=list)

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        del urn, replacing
        assert labels["machineuse.instance"].startswith("mu-")
        self.asked.append(kind)
        return DeleteDecision(allowed=self.allowed, reason="The ledger keeps it.", stop_timeout_s=1)

    def is_away(self, node_id: str) -> bool:
        del node_id
        return False

    def note_leftover(self, *, urn: str, host: str, name: str) -> None:
        raise AssertionError(f"{urn} on {host} left {name}")


class Life:
    """A program of one instance, of which a test says what exists."""

    def __init__(self, stack: InlineStack, *, store_root: Path, policy: Policy) -> None:
        self.stack = stack
        self.stack.program = self.declare
        self.store_root = store_root
        self.store = DirectoryStore(store_root)
        self.policy = policy
        self.token = secrets.token_hex(4)
        self.instance = f"mu-{self.token}"
        self.ledger = f"ledger-{self.token}"
        self.name = f"machineuse-test-{self.token}"
        self.body = True
        self.snapshots: tuple[int, ...] = ()
        self.live = False
        self.restore: tuple[int, str] | None = None
        self.helper_image = BROWSER_IMAGE
        self.snapshots_host = LOCAL_ENGINE
        self.docker = docker_py.from_env()
        self.outputs: dict[str, Any] = {}

    def declare(self) -> None:
        """Declare what exists."""
        self.outputs = {}
        Claim("claim", ledger_id=self.ledger)
        opts = pulumi.ResourceOptions(provider=docker.Provider("node", host=LOCAL_ENGINE))
        for generation in self.snapshots:
            snapshot = Snapshot(
                f"snapshot-{generation}",
                cluster=self.token,
                ledger_id=self.ledger,
                instance=self.instance,
                generation=generation,
                node_id="local",
                docker_host=self.snapshots_host,
                container=self.name,
                volume=f"{self.name}-home",
                image=BROWSER_IMAGE,
                home_path=HOME,
                copy_volume=f"{self.name}-copy-{generation}",
                helper_image=self.helper_image,
                stop_timeout_s=5,
                live=self.live,
            )
            self._keep(f"snapshot-{generation}", snapshot.quick_copy, snapshot.manifest_sha256, snapshot.bytes)
        if not self.body:
            return
        volume = docker.Volume("home", name=f"{self.name}-home", labels=self._labels(docker.VolumeLabelArgs), opts=opts)
        image: pulumi.Input[str] = BROWSER_IMAGE
        if self.restore is not None:
            restore = Restore(
                "restore",
                cluster=self.token,
                ledger_id=self.ledger,
                instance=self.instance,
                snapshot_generation=self.restore[0],
                method=self.restore[1],
                node_id="local",
                docker_host=LOCAL_ENGINE,
                volume=volume.name,
                image=BROWSER_IMAGE,
                helper_image=self.helper_image,
                copy_volume=f"{self.name}-copy-{self.restore[0]}",
            )
            self._keep("restore", restore.method_used, restore.fallback_reason, restore.image)
            image = restore.image
        docker.Container(
            "browser",
            name=self.name,
            image=image,
            memory=256,
            memory_swap=256,
            entrypoints=["sh", "-c"],
            command=["trap 'exit 0' TERM; while :; do sleep 0.05; done"],
            must_run=True,
            network_mode="none",
            mounts=[docker.ContainerMountArgs(type="volume", source=volume.name, target=HOME)],
            labels=self._labels(docker.ContainerLabelArgs),
            opts=opts,
        )

    def _keep(self, name: str, *values: pulumi.Output[Any]) -> None:
        pulumi.Output.all(*values).apply(lambda known: self.outputs.__setitem__(name, known))

    def _labels(self, kind: Any) -> list[Any]:
        labels = {
            "machineuse.cluster": self.token,
            "machineuse.ledger": self.ledger,
            "machineuse.instance": self.instance,
            "machineuse.urn": self.name,
        }
        return [kind(label=label, value=value) for label, value in labels.items()]

    def up(self, *arguments: str) -> Run:
        run = self.stack.up(*arguments)
        assert run.status == 0, run.text
        return run

    def execute(self, script: str) -> str:
        code, output = self.docker.containers.get(self.name).exec_run(["sh", "-ec", script], user="0:0")
        assert code == 0, output
        text: str = output.decode()
        return text.strip()

    @property
    def running(self) -> bool:
        return bool(self.docker.containers.get(self.name).status == "running")

    def volumes(self) -> list[str]:
        found = self.docker.volumes.list(filters={"label": f"machineuse.cluster={self.token}"})
        return sorted(volume.name.removeprefix(self.name) for volume in found)

    def clean_up(self) -> None:
        mine = {"label": f"machineuse.cluster={self.token}"}
        for container in self.docker.containers.list(all=True, filters=mine):
            container.remove(force=True)
        for volume in self.docker.volumes.list(filters=mine):
            volume.remove()
        for image in self.docker.images.list(filters=mine):
            self.docker.images.remove(image.id, force=True)
        self.docker.close()


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    policy = Policy()
    store_root = tmp_path / "store"
    hosts = DockerHosts(timeout_s=5)
    plugins = [
        DockerProvider(hosts=hosts, policy=policy),
        MachineusePlugin(
            store=DirectoryStore(store_root), hosts=hosts, policy=policy, regions=Ec2Regions(Ec2Options())
        ),
    ]
    with PluginHost(plugins) as host:
        stack = InlineStack(tmp_path, debug_providers=host.debug_providers)
        life = Life(stack, store_root=store_root, policy=policy)
        try:
            yield life
        finally:
            life.clean_up()
            stack.close()


def ops(run: Run) -> dict[str, int]:
    """Return how many of our and docker's resources got which operation, without the ones left as they are."""
    steps = [event["resourcePreEvent"]["metadata"] for event in run.events if "resourcePreEvent" in event]
    mine, idle = ("docker:", "machineuse:"), ("same", "refresh")
    return dict(Counter(step["op"] for step in steps if step["type"].startswith(mine) and step["op"] not in idle))


def sleep(life: Life, generation: int) -> None:
    """Take a snapshot, and remove volume and container in a second update."""
    life.snapshots = (generation,)
    life.up()
    assert not life.running
    life.body, life.restore = False, None
    life.up()


@pytest.mark.parametrize("method", ["quick_start", "full_restore"])
def test_an_instance_sleeps_as_a_snapshot_and_comes_back_as_it_was(life: Life, method: str) -> None:
    life.up()
    life.execute(f"echo kept > {HOME}/file; echo added > /etc/added")

    sleep(life, 1)
    assert life.volumes() == ["-copy-1"]
    copied, digest, size = life.outputs["snapshot-1"]
    assert (copied, len(digest)) == (True, 64)
    assert size > 0

    life.body, life.restore = True, (1, method)
    run = life.up()
    assert life.outputs["restore"] == [method, None, f"machineuse/restored:{life.instance}-1"]
    assert life.execute(f"cat {HOME}/file /etc/added").split() == ["kept", "added"]
    assert "snapshot" not in run.errors

    assert ops(life.up()) == {}
    assert ops(life.stack.preview("--refresh")) == {}, "nothing is taken for drift"


def test_a_live_snapshot_leaves_the_instance_running_and_is_there_when_that_is_gone(life: Life) -> None:
    life.up()
    life.execute(f"echo kept > {HOME}/file")
    started = life.docker.containers.get(life.name).attrs["State"]["StartedAt"]
    life.live, life.snapshots = True, (1,)
    assert "had to be killed" not in life.up().text
    assert life.running
    assert life.docker.containers.get(life.name).attrs["State"]["StartedAt"] == started
    assert life.outputs["snapshot-1"][0] is True
    life.execute(f"echo lost > {HOME}/file")
    assert ops(life.stack.preview("--refresh")) == {}

    life.docker.containers.get(life.name).remove(force=True)
    life.body = False
    life.up()
    life.body, life.restore = True, (1, "full_restore")
    life.up()
    assert life.execute(f"cat {HOME}/file") == "kept"


def test_a_snapshot_is_not_replaced_because_the_world_around_it_changed(life: Life) -> None:
    life.up()
    sleep(life, 1)
    life.helper_image = "some/other:image"
    assert ops(life.up()) == {}


def test_a_node_that_leaves_the_cluster_keeps_nothing_of_a_snapshot(life: Life) -> None:
    life.up()
    life.execute(f"echo kept > {HOME}/file; echo added > /etc/added")
    sleep(life, 1)
    life.body, life.restore = True, (1, "quick_start")
    life.up()
    life.body, life.restore, life.snapshots_host = False, None, ""
    assert ops(life.stack.preview())["update"] == 1
    life.up()
    assert life.volumes() == []
    assert not life.docker.images.list(filters={"label": f"machineuse.cluster={life.token}"})
    assert life.outputs["snapshot-1"][0] is False
    assert ops(life.up()) == {}

    life.body, life.restore = True, (1, "quick_start")
    life.up()
    method, reason, _ = life.outputs["restore"]
    assert method == "full_restore"
    assert "no copy" in reason
    assert life.execute(f"cat {HOME}/file /etc/added").split() == ["kept", "added"]


def test_a_copy_stays_on_a_node_that_leaves_where_the_store_lacks_the_snapshot(life: Life) -> None:
    life.up()
    sleep(life, 1)
    life.store.delete(SnapshotId(instance_id=life.instance, generation=1))
    life.snapshots_host = ""
    assert "is left on node local" in life.up().text
    assert life.volumes() == ["-copy-1"]


def test_a_snapshot_that_is_gone_from_the_store_shows_as_drift(life: Life) -> None:
    life.up()
    sleep(life, 1)
    life.store.delete(SnapshotId(instance_id=life.instance, generation=1))
    assert ops(life.stack.preview("--refresh"))["create"] == 1


def test_deleting_a_snapshot_removes_copy_image_and_archive_but_only_if_the_policy_lets_it(life: Life) -> None:
    life.up()
    life.execute("echo added > /etc/added")
    sleep(life, 1)
    life.body, life.restore = True, (1, "quick_start")
    life.up()
    life.body, life.snapshots, life.restore = False, (), None

    life.policy.allowed = False
    refused = life.stack.up("--continue-on-error")
    assert refused.status != 0
    assert read_code(refused.errors) == "still_wanted"
    assert len(life.store.list(life.instance)) == 1

    life.policy.allowed = True
    life.up()
    assert "snapshot" in life.policy.asked
    assert life.volumes() == []
    assert life.store.list(life.instance) == ()
    assert not life.docker.images.list(filters={"label": f"machineuse.cluster={life.token}"})


def test_what_an_update_made_before_it_was_killed_is_found_again(life: Life) -> None:
    life.up()
    life.execute(f"echo kept > {HOME}/file; echo added > /etc/added")
    life.snapshots = (1,)
    life.up()
    (before,) = life.store.list(life.instance)
    life.stack.forget()
    life.up("--target", "urn:pulumi:test::plugintest::machineuse:index:Snapshot::snapshot-1")
    assert life.store.list(life.instance) == (before,)

    life.up()
    life.body = False
    life.up()
    life.body, life.restore = True, (1, "full_restore")
    life.up()
    life.execute(f"echo since > {HOME}/file")
    life.stack.forget()
    life.up()
    assert life.running
    assert life.outputs["restore"] == ["full_restore", None, f"machineuse/restored:{life.instance}-1"]
    assert life.execute(f"cat {HOME}/file") == "since", "a volume in use is not restored again"


def test_a_snapshot_that_fails_leaves_the_instance_running_and_says_why(life: Life) -> None:
    life.up()
    life.store_root.write_text("in the way")
    life.snapshots = (1,)
    run = life.stack.up()
    assert run.status != 0
    assert "No snapshot was taken, the instance goes on running: The snapshot store" in run.errors
    assert read_code(run.errors) == "snapshot_failed"
    assert life.running


def test_a_flipped_byte_is_told_and_nothing_is_started(life: Life) -> None:
    life.up()
    life.execute(f"echo kept > {HOME}/file")
    sleep(life, 1)
    (path,) = life.store_root.rglob("home.tar.zst")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    life.body, life.restore = True, (1, "full_restore")
    run = life.stack.up()
    assert run.status != 0
    assert read_code(run.errors) == "snapshot_corrupt"
    assert not life.docker.containers.list(all=True, filters={"name": life.name})


def test_a_stack_refuses_another_ledger(life: Life) -> None:
    life.body = False
    life.up()
    life.ledger = "ledger-of-somebody-else"
    for run in (life.stack.preview(), life.stack.up()):
        assert run.status != 0
        assert "This stack belongs to the ledger" in run.errors
        assert read_code(run.errors) == "ledger_mismatch"


def test_inputs_that_make_no_sense_are_refused_before_anything_is_done(life: Life) -> None:
    life.up()
    sleep(life, 1)
    life.body, life.restore = True, (1, "magic")
    run = life.stack.preview()
    assert run.status != 0
    assert "method" in run.text
