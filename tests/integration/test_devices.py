"""Finding, formatting, checking and growing a device on a node: a real Docker engine and loop devices."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import CloudConflict, CloudError
from provisioner.volumes.devices import NodeDevices
from stacks.names import CLUSTER_LABEL
from stacks.spec import BROWSER_IMAGE
from tests.support.ebs import LINKS, can_attach, link_to

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not can_attach(), reason="needs root and loop devices")

MIB = 1 << 20


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Disk:
    """A volume on this machine: a file, a loop device, and udev's link to it."""

    def __init__(self, file: Path) -> None:
        self.volume_id = f"vol-{secrets.token_hex(8)}"
        self.file = file
        self.device = ""
        self.link = link_to(self.volume_id)
        self.resize(1 << 30)

    def resize(self, size: int) -> None:
        """Give it another size; it is detached and attached again."""
        self.close()
        with self.file.open("ab") as disk:
            disk.truncate(size)
        self.device = run("losetup", "--find", "--show", str(self.file))
        LINKS.mkdir(parents=True, exist_ok=True)
        self.link.symlink_to(f"../../{Path(self.device).name}")

    def write(self, data: bytes, *, at: int) -> None:
        with Path(self.device).open("r+b") as disk:
            disk.seek(at)
            disk.write(data)

    def read(self) -> bytes:
        """Return its first two MiB."""
        with Path(self.device).open("rb") as disk:
            return disk.read(2 * MIB)

    def close(self) -> None:
        self.link.unlink(missing_ok=True)
        if self.device:
            run("losetup", "--detach", self.device)
            self.device = ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture
def devices(disk: Disk) -> NodeDevices:
    labels = {CLUSTER_LABEL: f"t{secrets.token_hex(4)}"}
    return NodeDevices(DockerHost(), helper_image=BROWSER_IMAGE, name=f"machineuse-{disk.volume_id}", labels=labels)


def test_a_device_is_found_by_its_volumes_id_and_size(disk: Disk, devices: NodeDevices) -> None:
    assert devices.find(disk.volume_id, size_gib=1, timeout_s=5) == str(disk.link)
    with pytest.raises(CloudError, match="no such device of 2 GiB"):
        devices.find(disk.volume_id, size_gib=2, timeout_s=0.2)
    disk.link.unlink()
    with pytest.raises(CloudError, match="no such device of 1 GiB"):
        devices.find(disk.volume_id, size_gib=1, timeout_s=0.2)


def test_a_device_of_the_right_size_under_the_name_that_was_asked_for_is_not_taken(
    disk: Disk, devices: NodeDevices
) -> None:
    """On a machine that is not the volume's, that name and size are another volume's."""
    named = [Path("/dev/xvdf"), Path("/dev/sdf")]
    for path in named:
        if path.is_symlink() and path.readlink().name.startswith("loop"):
            path.unlink()  # a run of this test was cut off
        elif path.exists():
            pytest.skip("this machine has such a disk")
    disk.link.unlink()
    for path in named:
        path.symlink_to(disk.device)
    try:
        with pytest.raises(CloudError, match="no such device"):
            devices.find(disk.volume_id, size_gib=1, timeout_s=0.2)
    finally:
        for path in named:
            path.unlink()


def test_an_empty_volume_is_formatted_once_and_mounted_by_docker(disk: Disk, devices: NodeDevices) -> None:
    devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=True)
    assert run("blkid", "-p", "-o", "value", "-s", "TYPE", disk.device) == "ext4"
    uuid = run("blkid", "-p", "-o", "value", "-s", "UUID", disk.device)
    client = docker.from_env()
    volume = client.volumes.create(
        f"machineuse-test-{secrets.token_hex(4)}",
        driver="local",
        driver_opts={"type": "ext4", "device": str(disk.link), "o": "noatime,nodev"},
    )
    try:
        mounts = {volume.name: {"bind": "/home/machine"}}
        command = ["-c", "stat -c '%u %a' /home/machine; echo kept > /home/machine/notes; ls -A /home/machine"]
        said = client.containers.run(BROWSER_IMAGE, command, entrypoint="sh", volumes=mounts, remove=True).decode()
        assert said.splitlines()[0] == "1000 700"  # what the image has
        assert "lost+found" not in said
        holder = client.containers.run(BROWSER_IMAGE, ["60"], entrypoint="sleep", volumes=mounts, detach=True)
        try:
            devices.check(str(disk.link), volume_id=disk.volume_id)  # in use
            with pytest.raises(CloudError, match="not at rest"):
                devices.settle(str(disk.link), volume_id=disk.volume_id, timeout_s=0.2)
            with pytest.raises(CloudConflict, match=disk.volume_id):
                devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=True)
        finally:
            holder.remove(force=True)
        devices.settle(str(disk.link), volume_id=disk.volume_id, timeout_s=5)
        devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=True)
        assert run("blkid", "-p", "-o", "value", "-s", "UUID", disk.device) == uuid
        command = ["-c", "cat /home/machine/notes"]
        said = client.containers.run(BROWSER_IMAGE, command, entrypoint="sh", volumes=mounts, remove=True).decode()
        assert said == "kept\n"
    finally:
        volume.remove(force=True)
        client.close()


def test_a_format_that_was_cut_off_leaves_a_volume_as_empty_as_any(disk: Disk, devices: NodeDevices) -> None:
    run("mkfs.ext4", "-q", "-E", "root_owner=1000:1000", disk.device)
    devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=True)
    assert "lost+found" not in run("debugfs", "-R", "ls -p /", disk.device)


def test_a_file_system_grows_to_its_volume(disk: Disk, devices: NodeDevices) -> None:
    devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=True)
    disk.resize(2 << 30)
    devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=False)
    said = run("dumpe2fs", "-h", disk.device)
    assert f"Block count:              {(2 << 30) // 4096}" in said


@pytest.mark.parametrize("signature", ["swap", "partitions", "ext2"])
def test_nothing_that_bears_a_signature_is_formatted(disk: Disk, devices: NodeDevices, signature: str) -> None:
    if signature == "swap":
        run("mkswap", disk.device)
    elif signature == "partitions":
        disk.write(bytes.fromhex("80000101830f0f0f0100000000080000") + bytes(48) + b"\x55\xaa", at=446)
    else:
        run("mkfs.ext2", "-q", disk.device)
    before = disk.read()
    with pytest.raises(CloudConflict, match=f"Volume {disk.volume_id} is not used"):
        devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=True)
    assert disk.read() == before


def test_a_volume_from_a_snapshot_without_a_file_system_is_not_formatted(disk: Disk, devices: NodeDevices) -> None:
    for look in (
        lambda: devices.prepare(str(disk.link), volume_id=disk.volume_id, blank=False),
        lambda: devices.check(str(disk.link), volume_id=disk.volume_id),
    ):
        with pytest.raises(CloudConflict, match="no file system"):
            look()
    assert disk.read() == bytes(2 * MIB)
