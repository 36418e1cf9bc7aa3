"""EC2 for tests: moto's server on loopback, and loop devices as what it attaches.

moto keeps the books and has no disks. A thread watches what is attached, and makes of it what a machine of AWS's would
see: a block device with udev's link to it. A volume is a sparse file; a snapshot is a copy of one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    from types_boto3_ec2 import EC2Client

REGION = "us-east-1"
LINKS = Path("/dev/disk/by-id")
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
_POLL_S = 0.05
_ROOT_DISK = "/dev/sda1"


class Emulator:
    """One region of AWS, as far as volumes go."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it tells of every request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        _, port = self._server.get_host_and_port()
        self.endpoint = f"http://127.0.0.1:{port}"

    def client(self, region: str = REGION) -> EC2Client:
        """Return a client of the emulator."""
        return boto3.client(
            "ec2",
            region_name=region,
            endpoint_url=self.endpoint,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def run_machine(self, zone: str) -> str:
        """Start a machine; return its id."""
        client = self.client(zone[:-1])
        answer = client.run_instances(
            ImageId="ami-12c6146b", MinCount=1, MaxCount=1, Placement={"AvailabilityZone": zone}
        )
        return answer["Instances"][0]["InstanceId"]

    def stop(self) -> None:
        """End it; everything in it is gone."""
        self._server.stop()


class LoopDisks:
    """The disks behind an emulator's volumes; start it before the first volume is attached."""

    def __init__(self, emulator: Emulator, root: Path) -> None:
        del emulator  # its books are in this process: reading them there costs nothing
        self._books = ec2_backends[DEFAULT_ACCOUNT_ID][REGION]
        self._root = root
        self._devices: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.failures: list[BaseException] = []
        self._made: list[Path] = []

    def start(self) -> None:
        """Begin to watch."""
        for directory in (LINKS, LINKS.parent):
            if not directory.exists():
                self._made.append(directory)
        LINKS.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Take away every device and link that was made."""
        self._stopping.set()
        self._thread.join()
        for volume_id in list(self._devices):
            self._detach(volume_id)
        for directory in self._made:
            with contextlib.suppress(OSError):
                directory.rmdir()

    @property
    def devices(self) -> dict[str, str]:
        """Return the devices that there are now, by volume."""
        return dict(self._devices)

    def held(self) -> list[str]:
        """Return the files of ours that a loop device still has: one that is mounted stays after it is detached."""
        files = _run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").splitlines()
        return sorted(file for file in files if file.startswith(f"{self._root}/"))

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_S):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - the test looks at them
                self.failures.append(error)

    def _look(self) -> None:
        volumes = {
            volume_id: volume
            for volume_id, volume in list(self._books.volumes.items())
            if volume.attachment is None or volume.attachment.device != _ROOT_DISK
        }
        # A snapshot is of what was there when it was made: before anything else may happen to the volume.
        for snapshot in list(self._books.snapshots.values()):
            source, copy = self._file(snapshot.volume.id), self._file(snapshot.id)
            if source.exists() and not copy.exists():
                _copy(source, copy)
        for volume_id, volume in volumes.items():
            if volume.attachment and volume_id not in self._devices:
                self._attach(volume_id, volume)
        for volume_id in list(self._devices):
            if volume_id not in volumes or not volumes[volume_id].attachment:
                self._detach(volume_id)

    def _attach(self, volume_id: str, volume: Any) -> None:
        file = self._file(volume_id)
        if not file.exists():
            if volume.snapshot_id:
                _copy(self._file(volume.snapshot_id), file)
            with file.open("ab") as disk:
                disk.truncate(volume.size << 30)
        device = _run("losetup", "--find", "--show", str(file))
        self._devices[volume_id] = device
        link_to(volume_id).symlink_to(f"../../{Path(device).name}")

    def _detach(self, volume_id: str) -> None:
        link_to(volume_id).unlink(missing_ok=True)
        _run("losetup", "--detach", self._devices.pop(volume_id))

    def _file(self, name: str) -> Path:
        return self._root / name


def link_to(volume_id: str) -> Path:
    """Return where udev would link to a volume's device."""
    return LINKS / f"nvme-Amazon_Elastic_Block_Store_{volume_id.replace('-', '')}"


def _copy(source: Path, target: Path) -> None:
    partial = target.with_suffix(f".{secrets.token_hex(4)}")
    _run("cp", "--sparse=always", str(source), str(partial))
    partial.rename(target)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def can_attach() -> bool:
    """Say whether this machine lets us make loop devices."""
    return shutil.which("losetup") is not None and Path("/dev/loop-control").exists()
