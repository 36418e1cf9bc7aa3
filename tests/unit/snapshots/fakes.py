# ruff: noqa: ARG002 - the signatures are the protocol's
"""A Docker engine made of directories, and a way to let anything fail or die at any call."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from provisioner.errors import DockerNotFound
from provisioner.snapshots.machine import Change, ContainerFacts, HomeFacts, Volumes
from provisioner.snapshots.manifest import ImageIdentity
from provisioner.snapshots.mark import MARK_NAME

START = datetime(2026, 1, 1, tzinfo=UTC)
IMAGE_ID = "sha256:original"


@dataclass
class FakeContainer:
    """A container: the directory that is its root, and the volume that is its home."""

    root: Path
    volume: str
    instance: str
    image: ImageIdentity
    id: str = "container-1"
    running: bool = True
    paused: bool = False
    pauses: int = 0
    starts: int = 1
    changes: list[Change] = field(default_factory=list)


class FakeMachine:
    """What `Machine` asks for, done with directories below `base`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.containers: dict[str, FakeContainer] = {}
        self.images: dict[str, dict[str, Any]] = {IMAGE_ID: {}, "browser": {}}
        self.exports = 0
        self.while_paused: Callable[[], None] = lambda: None
        """Happens when a container has just been paused: may raise, as a process that dies."""

    # set-up for tests

    def volume(self, name: str) -> Path:
        return self.base / "volumes" / name

    def add_volume(self, name: str) -> Path:
        self.volume(name).mkdir(parents=True, exist_ok=True)
        return self.volume(name)

    def add_container(self, name: str, *, volume: str, instance: str) -> FakeContainer:
        root = self.base / "containers" / name
        root.mkdir(parents=True)
        container = FakeContainer(root, volume, instance, ImageIdentity(reference="browser", id=IMAGE_ID))
        self.containers[name] = container
        return container

    # the protocol

    def inspect_container(self, container: str) -> ContainerFacts:
        found = self._container(container)
        return ContainerFacts(
            id=found.id,
            running=found.running,
            started_at=START + timedelta(minutes=found.starts),
            stopped_cleanly=True,
            image=found.image,
            mounts=("/home/machine",),
            paused=found.paused,
        )

    def stop_container(self, container: str, *, timeout_s: int) -> None:
        found = self._container(container)
        found.running = found.paused = False

    def start_container(self, container: str) -> None:
        found = self._container(container)
        if not found.running:
            found.running = True
            found.starts += 1

    def resume_container(self, container: str) -> None:
        self._container(container).paused = False

    @contextmanager
    def read_path(self, container: str, path: str) -> Iterator[Iterator[bytes]]:
        found = self._container(container)
        home = path == "/home/machine"
        assert not (home and found.running), "the home is read while it changes"
        source = self.volume(found.volume) if home else found.root / path.lstrip("/")
        if not source.exists():
            raise DockerNotFound(f"no {path}")
        yield iter(_pack(source, Path(path).name))

    @contextmanager
    def export_container(self, container: str) -> Iterator[Iterator[bytes]]:
        self.exports += 1
        yield iter(_pack(self._container(container).root, "."))

    def read_mark(self, container: str, home_path: str) -> str | None:
        mark = self.volume(self._container(container).volume) / MARK_NAME
        return mark.read_text() if mark.exists() else None

    def list_changes(self, container: str) -> tuple[Change, ...]:
        return tuple(self._container(container).changes)

    def read_image_file(self, image: str, path: str) -> bytes:
        return self.images[image]["files"][path]

    def make_copy(self, volumes: Volumes, *, stamp: str, labels: Mapping[str, str]) -> int:
        self._fill_copy(volumes)
        return self.stamp_copy(volumes, stamp=stamp)

    def copy_running(self, container: str, volumes: Volumes, *, labels: Mapping[str, str]) -> None:
        found = self._container(container)
        assert found.running, "only what runs can be paused"
        found.pauses += 1
        found.paused = True
        self.while_paused()
        self._fill_copy(volumes)
        found.paused = False

    @contextmanager
    def read_copy(self, volumes: Volumes) -> Iterator[Iterator[bytes]]:
        yield iter(_pack(self.volume(volumes.copy) / "home", Path(volumes.home_path).name))

    def stamp_copy(self, volumes: Volumes, *, stamp: str) -> int:
        (self.volume(volumes.copy) / ".complete").write_text(stamp)
        return self._count_entries(volumes)

    def _count_entries(self, volumes: Volumes) -> int:
        return sum(1 for _ in (self.volume(volumes.copy) / "home").rglob("*")) + 1

    def _fill_copy(self, volumes: Volumes) -> None:
        target = self.add_volume(volumes.copy)
        (target / ".complete").unlink(missing_ok=True)
        shutil.rmtree(target / "home", ignore_errors=True)
        shutil.copytree(self.volume(volumes.home), target / "home", symlinks=True)

    def read_stamp(self, copy: str) -> str | None:
        stamp = self.volume(copy) / ".complete"
        return stamp.read_text() if stamp.exists() else None

    def remove_copy(self, copy: str) -> None:
        shutil.rmtree(self.volume(copy), ignore_errors=True)

    def inspect_home(self, volumes: Volumes) -> HomeFacts:
        if not self.volume(volumes.home).exists():
            raise DockerNotFound(f"no volume {volumes.home}")
        mark = self.volume(volumes.home) / MARK_NAME
        users = {name: each for name, each in self.containers.items() if each.volume == volumes.home}
        return HomeFacts(
            mark=mark.read_text() if mark.exists() else None,
            used_by={name: each.instance for name, each in users.items()},
            ran=frozenset(name for name, each in users.items() if each.starts),
        )

    def fill_home(self, volumes: Volumes, *, stamp: str, entries: int, mark: str) -> str | None:
        found = self.read_stamp(volumes.copy)
        if found != stamp:
            return (
                "The node has no copy of the snapshot." if found is None else "The node's copy is not of this snapshot."
            )
        if (there := self._count_entries(volumes)) != entries:
            return f"The node's copy has {there} entries, the snapshot {entries}."
        home = self._emptied(volumes.home)
        shutil.copytree(self.volume(volumes.copy) / "home", home, symlinks=True, dirs_exist_ok=True)
        for path in home.rglob("*"):
            if path.name == "SingletonLock":
                path.unlink()
        (home / MARK_NAME).write_text(mark)
        return None

    def write_home(self, volumes: Volumes, chunks: Iterator[bytes], *, mark: str, locks: Sequence[str]) -> None:
        home = self._emptied(volumes.home)
        self._unpack(chunks, home)
        for lock in locks:
            (home / lock).unlink()
        (home / MARK_NAME).write_text(mark)

    def has_image(self, image: str) -> bool:
        return image in self.images

    def build_image(
        self, tag: str, *, base: str, rootfs: Iterator[bytes], rootfs_bytes: int, deleted_paths: Sequence[str]
    ) -> None:
        data = b"".join(rootfs)
        assert len(data) == rootfs_bytes
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = {
                "/" + member.name: file.read()
                for member in archive
                if (file := archive.extractfile(member)) is not None
            }
        self.images[tag] = {"base": base, "files": files, "deleted": tuple(deleted_paths)}

    def remove_image(self, tag: str) -> bool:
        self.images.pop(tag, None)
        return True

    def _container(self, name: str) -> FakeContainer:
        if name not in self.containers:
            raise DockerNotFound(f"no container {name}")
        return self.containers[name]

    def _emptied(self, volume: str) -> Path:
        shutil.rmtree(self.volume(volume))
        return self.add_volume(volume)

    def _unpack(self, chunks: Iterator[bytes], home: Path) -> None:
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            for member in archive:
                member.name = member.name.partition("/")[2] or "."
                archive.extract(member, home, filter="fully_trusted")


def _pack(source: Path, name: str) -> Iterator[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(source, arcname=name)
    data = buffer.getvalue()
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test may catch it."""


class Trouble:
    """Counts calls of wrapped objects and makes one of them fail, before or after it did its work."""

    def __init__(self) -> None:
        self.calls = 0
        self.names: list[str] = []
        self.at: int | None = None
        self.after = False
        self.error: Callable[[], BaseException] = Killed

    def plan(self, at: int, *, after: bool, error: Callable[[], BaseException]) -> None:
        """Let call number `at`, counted from 0, fail."""
        self.calls, self.names = 0, []
        self.at, self.after, self.error = at, after, error

    def calm(self) -> None:
        """Let nothing fail any more."""
        self.at = None

    def wrap(self, target: Any, *, returns: tuple[str, ...] = ()) -> Any:
        """Return a stand-in for `target`; what the methods in `returns` return is wrapped too."""
        return _Troubled(self, target, returns)

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        number, self.calls = self.calls, self.calls + 1
        self.names.append(name)
        if number == self.at and not self.after:
            raise self.error()
        try:
            return call()
        finally:
            if number == self.at:
                raise self.error()


class Frozen(Trouble):
    """Something else happens before one of the calls, as if whoever makes it had been frozen meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._meanwhile: Callable[[], None] = lambda: None

    def plan_freeze(self, at: int, meanwhile: Callable[[], None]) -> None:
        """Let `meanwhile` happen before call number `at`, counted from 0."""
        self.calls, self.names = 0, []
        self.freeze_at, self._meanwhile = at, meanwhile

    def around(self, name: str, call: Callable[[], Any]) -> Any:
        number, self.calls = self.calls, self.calls + 1
        self.names.append(name)
        if number == self.freeze_at:
            self._meanwhile()
        return call()


class _Troubled:
    def __init__(self, trouble: Trouble, target: Any, returns: tuple[str, ...]) -> None:
        self._trouble = trouble
        self._target = target
        self._returns = returns

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if not callable(method):
            return method

        def called(*args: Any, **kwargs: Any) -> Any:
            result = self._trouble.around(name, lambda: method(*args, **kwargs))
            return self._trouble.wrap(result) if name in self._returns else result

        return called


def content(directory: Path) -> dict[str, str]:
    """Return what is in a directory, the mark of a restore aside."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.name != MARK_NAME:
            name = str(path.relative_to(directory))
            found[name] = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else "/"
    return found
