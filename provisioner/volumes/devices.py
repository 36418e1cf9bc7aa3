"""An attached volume on its node: which device it is, and the file system on it.

A node needs nothing but its Docker engine: helper containers look into its /dev, read-only, and work on the one device
that they are given. A device is found by the volume's id, which is its serial number on Nitro machines, and its size
has to be the volume's too. The name that an attachment asks for proves nothing: it may be another volume's by now.

Nothing that bears any signature is ever formatted, and the kernel refuses to format or check what is mounted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from provisioner.docker_hosts.helpers import run_helper
from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import CloudConflict, CloudError

LINK = "disk/by-id/nvme-Amazon_Elastic_Block_Store_{}"
"""What udev calls a volume, below /dev; `vol-0abc` is `vol0abc` there."""

_NOT_FOUND, _FOREIGN, _EMPTY, _BROKEN = 3, 4, 5, 6
_TARGET = "/dev/machineuse-volume"
_NODE_DEV = "/node-dev"

_FIND = r"""
link=/node-dev/$1; bytes=$2; tries=$3
while :; do
    if [ -b "$link" ]; then
        device=$(basename "$(readlink -f "$link")")
        sectors=$(cat "/sys/class/block/$device/size" 2>/dev/null) && [ $((sectors * 512)) = "$bytes" ] && exit 0
    fi
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || exit 3
    sleep 0.2
done
"""
_PREPARE = r"""
for tool in blkid mkfs.ext4 e2fsck resize2fs; do
    command -v "$tool" > /dev/null || { echo "the helper image has no $tool"; exit 1; }
done
device=$1; blank=$2; check=$3
found=$(blkid -p -o export "$device"); code=$?
case "$code" in
    0) type=$(printf '%s\n' "$found" | sed -n 's/^TYPE=//p') ;;
    2) type= ;;
    *) echo "blkid can't tell what is on it (exit code $code)"; exit 4 ;;
esac
if [ "$code" = 2 ]; then
    [ "$blank" = yes ] || { echo "there is no file system on it"; exit 5; }
    mkfs.ext4 -q -F -m 0 -E root_owner=1000:1000,lazy_itable_init=1 "$device" 2>&1 || exit 1
else
    [ "$type" = ext4 ] || {
        echo "there is something else on it: ${type:-$(printf '%s' "$found" | tr '\n' ' ')}"
        exit 4
    }
    [ "$check" = yes ] || exit 0
    e2fsck -f -p "$device" 2>&1; [ $? -lt 4 ] || exit 6
    resize2fs "$device" 2>&1 || exit 6
fi
# An empty volume gets what the image has in its home, like any volume of Docker's.
[ "$blank" = no ] || debugfs -w -R 'rmdir /lost+found' "$device" > /dev/null 2>&1
exit 0
"""

_SETTLE = r"""
device=$1; tries=$2
while :; do
    said=$(e2fsck -p "$device" 2>&1); code=$?
    [ "$code" -lt 4 ] && exit 0
    case "$said" in *"in use"*) ;; *) echo "$said"; exit 6 ;; esac
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || { echo "it is still mounted"; exit 6; }
    sleep 0.2
done
"""


def link_of(volume_id: str) -> str:
    """Return what a volume is called below /dev of the node that it is attached to."""
    return LINK.format(volume_id.replace("-", ""))


class Devices(Protocol):
    """The devices of one node."""

    def find(self, volume_id: str, *, size_gib: int, timeout_s: float) -> str:
        """Wait for the volume to appear; return its path on the node. Raises CloudError when it does not in time."""

    def prepare(self, device: str, *, volume_id: str, blank: bool) -> None:
        """Make a file system on a blank volume, or check and grow the one that came from a snapshot. Idempotent.

        Raises `CloudConflict` for anything that is not ours to overwrite.
        """

    def check(self, device: str, *, volume_id: str) -> None:
        """Raise `CloudConflict` unless there is a file system on it. Works on one that is mounted, and changes none."""

    def settle(self, device: str, *, volume_id: str, timeout_s: float) -> None:
        """Wait until nothing has it mounted, so that all that was written is on it. Raises CloudError."""


class NodeDevices:
    """The devices of a Docker host."""

    def __init__(self, host: DockerHost, *, helper_image: str, name: str, labels: Mapping[str, str]) -> None:
        """Run helpers from `helper_image`, which needs e2fsprogs and blkid, one at a time under `name`."""
        self._host = host
        self._helper_image = helper_image
        self._name = name
        self._labels = dict(labels)

    def find(self, volume_id: str, *, size_gib: int, timeout_s: float) -> str:
        """Wait for the volume to appear; return its path on the node. Raises CloudError when it does not in time."""
        link = link_of(volume_id)
        tries = str(max(1, int(timeout_s / 0.2)))
        code, output = self._run(_FIND, link, str(size_gib << 30), tries, binds={_NODE_DEV: "/dev"})
        if code == _NOT_FOUND:
            raise CloudError(
                f"Volume {volume_id} is attached, but no such device of {size_gib} GiB appeared on the node"
                f" within {timeout_s:.0f} s.",
                detail=f"looked for /dev/{link}",
                resolution="Check that cloud.instance_id names the machine that this Docker host runs on, that it is of"
                " a Nitro type, and that udev runs on it.",
            )
        if code:
            raise CloudError(f"The node's devices could not be looked at: {_last(output)}", detail=output)
        return f"/dev/{link}"

    def prepare(self, device: str, *, volume_id: str, blank: bool) -> None:
        """Make a file system on a blank volume, or check and grow the one that came from a snapshot. Idempotent.

        Raises `CloudConflict` for anything that is not ours to overwrite.
        """
        self._work(device, volume_id=volume_id, blank=blank, check=True)

    def check(self, device: str, *, volume_id: str) -> None:
        """Raise `CloudConflict` unless there is a file system on it. Works on one that is mounted, and changes none."""
        self._work(device, volume_id=volume_id, blank=False, check=False)

    def settle(self, device: str, *, volume_id: str, timeout_s: float) -> None:
        """Wait until nothing has it mounted, so that all that was written is on it. Raises CloudError."""
        tries = str(max(1, int(timeout_s / 0.2)))
        code, output = self._run(_SETTLE, _TARGET, tries, devices={_TARGET: device})
        if code:
            raise CloudError(f"The file system of volume {volume_id} is not at rest: {_last(output)}", detail=output)

    def _work(self, device: str, *, volume_id: str, blank: bool, check: bool) -> None:
        flags = ("yes" if blank else "no", "yes" if check else "no")
        code, output = self._run(_PREPARE, _TARGET, *flags, devices={_TARGET: device})
        if code in (_FOREIGN, _EMPTY, _BROKEN):
            raise CloudConflict(
                f"Volume {volume_id} is not used: {_last(output)}.",
                detail=output,
                resolution="Nothing on it was changed. Look at it by hand; if it is not needed, delete the instance.",
            )
        if code:
            raise CloudError(f"The file system of volume {volume_id} could not be made: {_last(output)}", detail=output)

    def _run(self, script: str, *arguments: str, **helper: Mapping[str, str]) -> tuple[int, str]:
        return run_helper(
            self._host,
            script,
            *arguments,
            image=self._helper_image,
            volume=self._name,
            mounts={},
            labels=self._labels,
            **helper,
        )


def _last(output: str) -> str:
    return (output.strip().splitlines() or ["it said nothing"])[-1]
