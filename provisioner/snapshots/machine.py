"""What taking and restoring snapshots needs of a node's Docker engine; `provisioner.docker_hosts.archives` has it.

Every method may be called again after a crash at any point, and raises `DockerError` (`DockerNotFound`,
`NodeUnreachable`) when the engine can't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Protocol

from provisioner.snapshots.manifest import ImageIdentity

RESTORED_REPOSITORY = "machineuse/restored"
"""Images that carry what instances changed above their original image."""

Progress = Callable[[str], None]
"""Gets one readable line about what is being done."""


class ChangeKind(IntEnum):
    """How a path differs from the image; the numbers are Docker's."""

    MODIFIED = 0
    ADDED = 1
    DELETED = 2


@dataclass(frozen=True)
class Change:
    """One line of `docker diff`."""

    path: str
    kind: ChangeKind


@dataclass(frozen=True)
class ContainerFacts:
    """What must be known of a container before it is captured."""

    id: str
    running: bool
    started_at: datetime | None
    stopped_cleanly: bool
    """False when its last end was a kill; meaningless while it runs."""
    image: ImageIdentity
    """The image it was created from, as it was named then."""
    mounts: tuple[str, ...]
    paused: bool = False
    """Frozen; it counts as running all the same."""


@dataclass(frozen=True)
class HomeFacts:
    """What is in, and who has, a home volume."""

    mark: str | None
    """What `write_home` or `fill_home` left as its last act."""
    used_by: Mapping[str, str | None]
    """Containers that mount it: name → the instance that their label names."""
    ran: frozenset[str]
    """Those of them that have been started at least once."""


@dataclass(frozen=True)
class Volumes:
    """The Docker volumes of one instance that a snapshot works with."""

    home: str
    copy: str
    home_path: str
    """Where the instance's container mounts its home volume."""


class Machine(Protocol):
    """One node's Docker engine."""

    def inspect_container(self, container: str) -> ContainerFacts:
        """Return what must be known of a container; raises `DockerNotFound`."""
        ...

    def stop_container(self, container: str, *, timeout_s: int) -> None:
        """Stop a container by its image's stop signal, and kill it after `timeout_s`. Idempotent."""
        ...

    def start_container(self, container: str) -> None:
        """Start a container. Idempotent."""
        ...

    def resume_container(self, container: str) -> None:
        """Let a paused container go on. Idempotent; one that does not run is left as it is."""
        ...

    def read_path(self, container: str, path: str) -> AbstractContextManager[Iterator[bytes]]:
        """Stream a tar of a path: entries start with its last component. Raises `DockerNotFound`."""
        ...

    def export_container(self, container: str) -> AbstractContextManager[Iterator[bytes]]:
        """Stream a tar of a container's whole root file system, without its volumes."""
        ...

    def read_mark(self, container: str, home_path: str) -> str | None:
        """Return the mark that a restore left in a container's home directory, or None."""
        ...

    def list_changes(self, container: str) -> tuple[Change, ...]:
        """Return what the container changed above its image."""
        ...

    def read_image_file(self, image: str, path: str) -> bytes:
        """Return the content of a small file of an image; raises `DockerNotFound`."""
        ...

    def make_copy(self, volumes: Volumes, *, stamp: str, labels: Mapping[str, str]) -> int:
        """Copy the home volume to the copy volume, replacing what is in it, and put `stamp` there as the last act.

        Returns how many entries (sockets aside) the home volume has.
        """
        ...

    def copy_running(self, container: str, volumes: Volumes, *, labels: Mapping[str, str]) -> None:
        """Copy the home volume of a running container to the copy volume, replacing what is in it; no stamp yet.

        The container is paused meanwhile, and resumed whatever happens. A copy that takes too long is broken off.
        """
        ...

    def read_copy(self, volumes: Volumes) -> AbstractContextManager[Iterator[bytes]]:
        """Stream a tar of the home in a copy volume, as `read_path` would stream the home it was copied from."""
        ...

    def stamp_copy(self, volumes: Volumes, *, stamp: str) -> int:
        """Put `stamp` on what `copy_running` has copied; return how many entries (sockets aside) that has."""
        ...

    def read_stamp(self, copy: str) -> str | None:
        """Return the stamp of a copy volume, or None when there is no (complete) copy."""
        ...

    def remove_copy(self, copy: str) -> None:
        """Remove a copy volume and helpers that still hold it. Idempotent."""
        ...

    def inspect_home(self, volumes: Volumes) -> HomeFacts:
        """Look into a home volume; raises `DockerNotFound` when there is none."""
        ...

    def fill_home(self, volumes: Volumes, *, stamp: str, entries: int, mark: str) -> str | None:
        """Empty the home volume, fill it from the copy volume, remove Chromium's locks, and leave `mark` there last.

        Returns None, or, with the home volume untouched, why the copy can't be used: it is not there, not the one that
        bears `stamp`, older than the node's last start, or has not as many `entries` (sockets aside).
        """
        ...

    def write_home(self, volumes: Volumes, chunks: Iterator[bytes], *, mark: str, locks: Sequence[str]) -> None:
        """Empty the home volume, unpack a tar made by `read_path`, remove `locks` (relative to home), leave `mark`."""
        ...

    def has_image(self, image: str) -> bool:
        """Say whether the node has an image."""
        ...

    def build_image(
        self,
        tag: str,
        *,
        base: str,
        rootfs: Iterator[bytes],
        rootfs_bytes: int,
        deleted_paths: Sequence[str],
    ) -> None:
        """Build an image from `base`: first without `deleted_paths`, then with the tar `rootfs` laid over it."""
        ...

    def remove_image(self, tag: str) -> bool:
        """Untag an image, and remove it when nothing else needs it; False when something uses it. Idempotent."""
        ...
