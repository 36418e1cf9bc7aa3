"""Snapshots on a real Docker engine: what comes back is what was there, and nothing that fails or dies loses it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.types import Mount

from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.helpers import HELPER_LABEL, helper_container
from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerError, SnapshotCorrupt, SnapshotFailed, SnapshotMissing
from provisioner.snapshots.capture import Capture, CaptureRequest
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.machine import Volumes
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import RestoreRequest, RestoreResult, restore, restored_tag
from stacks.spec import BROWSER_IMAGE
from tests.support.watched import wait_until

HOME = "/home/machine"

FILL = r"""
mkdir -p d/deep; echo one > d/deep/one; ln d/deep/one hard; ln -s d/deep/one soft; mkfifo fifo
dd if=/dev/urandom of=random bs=1000 count=700 2>/dev/null; : > empty; echo x > "$(printf 'new\nline')"
n=$(printf '%0150d' 7); mkdir -p "$n/$n"; echo far > "$n/$n/file"
chmod 4750 d/deep/one; chmod 700 d; ln -s nowhere-1 d/SingletonLock; echo mine > SingletonNotes.txt
touch -h -d '2020-01-02 03:04:05' soft; touch -d '2021-01-02 03:04:05' d/deep
chown -hR 1000:1000 .; chown 7:8 random; chmod 750 .
"""
CHANGE = r"""
echo added > /etc/added; echo more >> /etc/passwd; mkdir -p /opt/tool/bin; echo tool > /opt/tool/bin/run
chmod 755 /opt/tool/bin/run; chown 1000:1000 /opt/tool; rm /etc/debian_version; chmod 700 /srv
rm -rf /var/cache/apt; mkdir -p /var/cache/apt; echo new > /var/cache/apt/new; echo lost > /tmp/lost
"""
LIST = r"""
import hashlib, json, os, stat, sys
found = {}
for directory, names, files in os.walk(sys.argv[1]):
    for path in [directory] + [os.path.join(directory, name) for name in files + names]:
        s = os.lstat(path)
        name = os.path.relpath(path, sys.argv[1])
        text = os.readlink(path) if stat.S_ISLNK(s.st_mode) else ""
        if stat.S_ISREG(s.st_mode):
            text = hashlib.sha256(open(path, "rb").read()).hexdigest()
        touched = stat.S_ISDIR(s.st_mode) and name in (".", "d")
        found[name] = [s.st_mode, s.st_uid, s.st_gid, 0 if touched else int(s.st_mtime), text]
        if stat.S_ISREG(s.st_mode):
            found[name].append(s.st_nlink)
print(json.dumps(found))
"""


class Node:
    """The local engine, with everything a test makes there labelled and removed."""

    def __init__(self, store: Path) -> None:
        self.token = secrets.token_hex(4)
        self.labels = {"machineuse.test": self.token}
        self.host = DockerHost()
        self.machine = DockerMachine(self.host, helper_image=BROWSER_IMAGE, labels=self.labels)
        self.store = DirectoryStore(store)
        self.store_root = store
        self.instance = f"mu-{self.token}"
        self.container = f"test-{self.token}"
        self.volumes = Volumes(home=f"test-{self.token}-home", copy=f"test-{self.token}-copy", home_path=HOME)

    def snapshot(self, generation: int = 1) -> SnapshotId:
        return SnapshotId(instance_id=self.instance, generation=generation)

    def request(self, generation: int = 1) -> CaptureRequest:
        return CaptureRequest(
            snapshot=self.snapshot(generation),
            cluster="test",
            node_id="local",
            container=self.container,
            volumes=self.volumes,
            image=BROWSER_IMAGE,
            stop_timeout_s=5,
            labels=self.labels,
        )

    def capture(self, generation: int = 1, *, machine: Any = None) -> Capture:
        return Capture(self.request(generation), machine=machine or self.machine, store=self.store)

    def restore(self, method: Method, volume: str, generation: int = 1) -> RestoreResult:
        self.add_volume(volume)
        volumes = Volumes(home=volume, copy=self.volumes.copy, home_path=HOME)
        request = RestoreRequest(
            snapshot=self.snapshot(generation), method=method, volumes=volumes, image=BROWSER_IMAGE
        )
        return restore(request, machine=self.machine, store=self.store)

    def add_volume(self, name: str) -> str:
        self.host.api.create_volume(name, labels=self.labels)
        return name

    def run_body(self, *, image: str = BROWSER_IMAGE, script: str = "") -> None:
        """Run the instance's container, and wait until its script is done and it only waits for its end."""
        self.add_volume(self.volumes.home)
        api = self.host.slow_api
        api.create_container(
            image,
            entrypoint=["sh", "-ec"],
            command=[f"trap 'echo bye > {HOME}/bye; exit 0' TERM\n{script}\n: > /tmp/up\nwhile :; do sleep 0.05; done"],
            user="0:0",
            working_dir=HOME,
            name=self.container,
            labels=self.labels | {"machineuse.instance": self.instance},
            host_config=api.create_host_config(
                mounts=[Mount(HOME, self.volumes.home, type="volume")], network_mode="none"
            ),
        )
        api.start(self.container)
        wait_until(lambda: self.is_up(), what="the container is up")

    def is_up(self) -> bool:
        state = self.host.api.inspect_container(self.container)["State"]
        if not state["Running"]:
            return False
        test = self.host.api.exec_create(self.container, ["test", "-e", "/tmp/up"])
        self.host.api.exec_start(test)
        return bool(self.host.api.exec_inspect(test)["ExitCode"] == 0)

    def run(self, image: str, *command: str, volume: str | None = None) -> str:
        """Run a command in a container of its own, and return what it says."""
        api = self.host.slow_api
        created = api.create_container(
            image,
            entrypoint=[command[0]],
            command=list(command[1:]),
            user="0:0",
            labels=self.labels,
            host_config=api.create_host_config(
                mounts=[Mount("/home-volume", volume, type="volume")] if volume else [], network_mode="none"
            ),
        )
        try:
            api.start(created["Id"])
            code = api.wait(created["Id"])["StatusCode"]
            output: str = api.logs(created["Id"]).decode()
            assert code == 0, output
            return output
        finally:
            api.remove_container(created["Id"], force=True)

    def content(self, volume: str) -> dict[str, list[Any]]:
        """Return what is in a home volume: mode, owner, time, content; the browser's locks and our mark aside."""
        found = json.loads(self.run(BROWSER_IMAGE, "python3", "-c", LIST, "/home-volume", volume=volume))
        return {
            name: facts for name, facts in found.items() if not name.endswith(("SingletonLock", ".machineuse-restored"))
        }

    def leftovers(self) -> list[str]:
        """Return what is labelled with this test, besides the instance itself."""
        filters = {"label": [f"machineuse.test={self.token}"]}
        volumes = self.host.api.volumes(filters=filters)["Volumes"] or []
        containers = self.host.api.containers(all=True, filters=filters)
        names = [volume["Name"] for volume in volumes] + [each["Names"][0].lstrip("/") for each in containers]
        return sorted(set(names) - {self.container, self.volumes.home})

    def clean_up(self) -> None:
        api = self.host.slow_api
        filters = {"label": [f"machineuse.test={self.token}"]}
        for container in api.containers(all=True, filters=filters):
            api.remove_container(container["Id"], force=True)
        for volume in api.volumes(filters=filters)["Volumes"] or []:
            api.remove_volume(volume["Name"])
        for image in api.images(filters=filters):
            api.remove_image(image["Id"], force=True)
        self.host.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "store")
    try:
        yield node
    finally:
        node.clean_up()


def test_both_methods_give_back_the_home_directory_and_what_changed_above_the_image(node: Node) -> None:
    node.run_body(script=FILL + CHANGE)

    result = node.capture().run()

    assert result.copied, result.copy_error
    assert result.manifest.stopped_cleanly
    expected = node.content(node.volumes.home)
    assert "bye" in expected, "it was stopped by its signal before it was saved"
    assert result.manifest.home.entries == len(expected) + 1  # the browser's lock
    for method in Method:
        restored = node.restore(method, f"{node.volumes.home}-{method.value}")
        assert (restored.method_used, restored.fallback_reason) == (method, None)
        assert node.content(f"{node.volumes.home}-{method.value}") == expected

    check = (
        "cat /etc/added /opt/tool/bin/run /var/cache/apt/new; tail -n 1 /etc/passwd; "
        "stat -c '%a %u' /opt/tool/bin/run /opt/tool /srv; "
        "for gone in /etc/debian_version /var/cache/apt/archives /tmp/lost; do test ! -e $gone; done"
    )
    said = node.run(restored.image, "sh", "-ec", check)
    assert said.splitlines() == ["added", "tool", "new", "more", "755 0", "755 1000", "700 0"]
    original, built = (node.host.api.inspect_image(image)["Config"] for image in (BROWSER_IMAGE, restored.image))
    for setting in ("User", "Entrypoint", "Cmd", "Env", "WorkingDir", "StopSignal", "Healthcheck", "ExposedPorts"):
        assert built.get(setting) == original.get(setting), setting


def test_an_instance_that_changed_nothing_above_its_image_runs_on_that_image_again(node: Node) -> None:
    node.run_body(script="echo kept > file; mkdir -p /run/x; echo no > /tmp/y")
    assert len(node.capture().run().manifest.parts) == 1
    assert node.restore(Method.QUICK_START, f"{node.volumes.home}-2").image == BROWSER_IMAGE


def test_changes_add_up_over_several_lives_and_stay_relative_to_the_original_image(node: Node) -> None:
    node.run_body(script="echo 1 > /etc/first; mkdir /opt/a; echo 1 > /opt/a/1; rm /etc/debian_version")
    node.capture(1).run()
    image = node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-2").image
    node.host.slow_api.remove_container(node.container, force=True)
    node.run_body(image=image, script="echo 2 > /etc/second; echo 2 > /opt/a/2; rm /opt/a/1")

    second = node.capture(2).run()

    last = node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-3", generation=2).image
    check = "cat /etc/first /etc/second /opt/a/*; test ! -e /opt/a/1; test ! -e /etc/debian_version"
    assert node.run(last, "sh", "-ec", check).split() == ["1", "2", "2"]
    original = node.host.api.inspect_image(BROWSER_IMAGE)
    assert second.manifest.image.id == original["Id"]
    layers = node.host.api.inspect_image(last)["RootFS"]["Layers"]
    assert layers[: len(original["RootFS"]["Layers"])] == original["RootFS"]["Layers"]
    first_layers = node.host.api.inspect_image(image)["RootFS"]["Layers"]
    assert len(layers) == len(first_layers), "a second life is no layer on top of the first"


def test_many_changed_paths_are_saved_in_one_pass(node: Node) -> None:
    script = "mkdir /etc/many; i=0; while [ $i -lt 200 ]; do echo $i > /etc/alternatives/f$i; i=$((i+1)); done"
    node.run_body(script=script)
    assert node.capture().run().manifest.changed_paths == 203  # 200 files, the new directory, two parents
    image = node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-2").image
    assert node.run(image, "sh", "-ec", "test -d /etc/many; cat /etc/alternatives/f199").strip() == "199"


def test_every_step_can_be_done_twice(node: Node) -> None:
    node.run_body(script=FILL)
    expected = None
    for step in node.capture().steps:
        step.run()
        step.run()
        if step.name == "stop":
            expected = node.content(node.volumes.home)
    node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-2")
    assert node.content(f"{node.volumes.home}-2") == expected


@pytest.mark.parametrize("name", ["stop", "changes", "verify", "commit"])
def test_a_step_that_fails_leaves_the_instance_running_and_nothing_behind(node: Node, name: str) -> None:
    calls = {
        "stop": "stop_container",
        "changes": "list_changes",
        "verify": "read_path",
        "commit": "make_copy",
    }

    class Failing:
        """Does what it is asked, then fails; the last two by giving what can't be kept."""

        def __getattr__(self, method: str) -> Any:
            work = getattr(node.machine, method)
            if method != calls[name]:
                return work

            def fail(*args: Any, **kwargs: Any) -> Any:
                if name == "commit":
                    return int(work(*args, **kwargs)) + 1
                work(*args, **kwargs)
                raise DockerError("The engine has hiccups.")

            return fail

    node.run_body(script="test -e file || echo kept > file")
    before = node.content(node.volumes.home)
    if name == "verify":
        _fill_disk_on_verify(node)
    machine = node.machine if name == "verify" else Failing()
    with pytest.raises(SnapshotFailed, match="the instance goes on running"):
        node.capture(machine=machine).run()
    wait_until(node.is_up, what="it runs again")
    after = node.content(node.volumes.home)
    after.pop("bye", None)
    before.pop("bye", None)
    assert after == before
    assert node.leftovers() == []
    assert not [path for path in node.store_root.rglob("*") if path.is_file()]


def _fill_disk_on_verify(node: Node) -> None:
    """Let the store's disk lose what was written, as a dying one does."""
    begin = node.store.begin

    def begin_badly(snapshot: SnapshotId) -> Any:
        writer = begin(snapshot)
        verify = writer.verify

        def verify_after_damage(manifest: Any) -> None:
            for path in node.store_root.rglob("*.tmp"):
                path.write_bytes(path.read_bytes()[:-10])
            verify(manifest)

        writer.verify = verify_after_damage  # type: ignore[method-assign]
        return writer

    node.store.begin = begin_badly  # type: ignore[method-assign]


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("name", ["stop", "home", "copy", "commit"])
def test_killed_after_any_step_the_same_snapshot_is_completed_by_running_it_again(node: Node, name: str) -> None:
    node.run_body(script="echo kept > file; echo added > /etc/added")
    dying = node.capture()
    for step in dying.steps:
        step.run()
        if step.name == name:
            break

    result = node.capture().run()

    assert result.copied, result.copy_error
    expected = node.content(node.volumes.home)
    restored = node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-2")
    assert node.content(f"{node.volumes.home}-2") == expected
    assert restored.image == restored_tag(node.snapshot())
    assert node.leftovers() == [node.volumes.copy, f"{node.volumes.home}-2"]
    assert not list(node.store_root.rglob("*.tmp"))


def test_a_helper_that_a_crash_left_is_in_nobodys_way(node: Node) -> None:
    node.run_body(script="echo kept > file")
    arguments: dict[str, Any] = {"image": BROWSER_IMAGE, "labels": node.labels}
    left = helper_container(
        node.host, volume=node.volumes.home, mounts={"/from": node.volumes.home}, command=("sleep", "60"), **arguments
    )
    name = left.__enter__()
    node.host.api.start(name)

    assert node.capture().run().copied

    left = helper_container(node.host, volume=node.volumes.home, mounts={"/x": node.volumes.copy}, **arguments)
    left.__enter__()
    node.machine.remove_copy(node.volumes.copy)
    node.machine.remove_copy(node.volumes.copy)
    assert node.leftovers() == []
    assert not node.host.api.containers(all=True, filters={"label": f"{HELPER_LABEL}={node.volumes.home}"})


@pytest.mark.parametrize("has_run", [False, True])
def test_only_a_container_that_has_run_proves_that_its_home_was_restored(node: Node, has_run: bool) -> None:
    node.run_body(script="echo kept > file")
    node.capture().run()
    node.host.slow_api.remove_container(node.container, force=True)
    home = node.add_volume(f"{node.volumes.home}-2")
    api = node.host.slow_api
    created = api.create_container(
        BROWSER_IMAGE,
        entrypoint=["true"],
        labels=node.labels | {"machineuse.instance": node.instance},
        host_config=api.create_host_config(mounts=[Mount(HOME, home, type="volume")], network_mode="none"),
    )
    if has_run:
        api.start(created["Id"])
        api.wait(created["Id"])
    node.restore(Method.FULL_RESTORE, home)
    assert ("file" in node.content(home)) is not has_run


def test_a_half_filled_copy_is_not_used(node: Node) -> None:
    node.run_body(script="echo kept > file")
    node.capture().run()
    node.run(BROWSER_IMAGE, "rm", "/home-volume/.complete", volume=node.volumes.copy)
    result = node.restore(Method.QUICK_START, f"{node.volumes.home}-2")
    assert result.method_used is Method.FULL_RESTORE
    assert result.fallback_reason == "The node has no complete copy of the snapshot."


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sed -i 's/ .*/ another-boot/' .complete", "The node was started anew after its copy was made."),
        ("rm machine/file", "The node's copy has 5 entries, the snapshot 6."),
        (": > .complete", "The node's copy is not of this snapshot."),
    ],
    ids=["a power cut may have come between", "a file is gone", "the stamp is empty"],
)
def test_a_copy_that_may_not_be_whole_any_more_is_not_used(node: Node, script: str, reason: str) -> None:
    node.run_body(script="echo kept > file")
    node.capture().run()
    node.run(BROWSER_IMAGE, "sh", "-c", f"cd /home-volume && {script}", volume=node.volumes.copy)
    result = node.restore(Method.QUICK_START, f"{node.volumes.home}-2")
    assert (result.method_used, result.fallback_reason) == (Method.FULL_RESTORE, reason)
    assert node.content(f"{node.volumes.home}-2") == node.content(node.volumes.home)


def test_without_a_copy_none_is_made_up(node: Node) -> None:
    node.run_body(script="echo kept > file")
    node.capture().run()
    node.machine.remove_copy(node.volumes.copy)
    result = node.restore(Method.QUICK_START, f"{node.volumes.home}-2")
    assert result.fallback_reason == "The node has no copy of the snapshot."
    assert node.leftovers() == [f"{node.volumes.home}-2"]


@pytest.mark.parametrize("part", ["home.tar.zst", "rootfs.tar.zst"])
def test_a_flipped_byte_is_told_and_nothing_is_restored(node: Node, part: str) -> None:
    node.run_body(script="echo kept > file; echo added > /etc/added")
    manifest = node.capture().run().manifest
    (path,) = node.store_root.rglob(part)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(SnapshotCorrupt):
        node.restore(Method.FULL_RESTORE, f"{node.volumes.home}-2")

    assert list(node.content(f"{node.volumes.home}-2")) == ["."]
    assert not node.machine.has_image(restored_tag(node.snapshot()))
    assert node.store.read_manifest(manifest.id) == manifest


def test_a_volume_with_something_in_it_is_emptied_before_it_is_filled(node: Node) -> None:
    node.run_body(script="echo kept > file; ln -s x SingletonLock")
    node.capture().run()
    expected = node.content(node.volumes.home)
    volume = node.add_volume(f"{node.volumes.home}-2")
    for method in Method:
        node.run(BROWSER_IMAGE, "sh", "-c", "rm -f /home-volume/.mach*; echo half > /home-volume/half", volume=volume)
        assert node.restore(method, volume).method_used is method
        assert node.content(volume) == expected
        listed = node.run(BROWSER_IMAGE, "ls", "-A", "/home-volume", volume=volume)
        assert "SingletonLock" not in listed


def test_a_browser_that_ignores_its_signal_is_killed_and_the_manifest_says_so(node: Node) -> None:
    node.run_body(script="trap '' TERM")
    request = node.request()
    capture = Capture(CaptureRequest(**{**vars(request), "stop_timeout_s": 0}), machine=node.machine, store=node.store)
    assert not capture.run().manifest.stopped_cleanly


def test_a_container_that_is_gone_can_not_be_captured(node: Node) -> None:
    with pytest.raises(SnapshotFailed, match="No snapshot was taken"):
        node.capture().run()
    with pytest.raises(SnapshotMissing):
        node.store.read_manifest(node.snapshot())
