"""Moves files in and out of containers, volumes and images: what snapshots need of a Docker engine.

Archives go through the engine's own archive calls: a node needs nothing but its Docker engine, and no archive is ever
in memory as a whole. A home is read from a container that does not run, be it the stopped instance or a helper that
holds a copy. What has to happen inside a volume (copying it, emptying it) is done by a short script in a helper
container.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from provisioner.docker_hosts import copies
from provisioner.docker_hosts.containers import resume_container
from provisioner.docker_hosts.helpers import HELPER_LABEL, helper_container, run_helper, run_inside
from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.images import remove_image
from provisioner.docker_hosts.layers import pack_context, pack_file
from provisioner.docker_hosts.volumes import remove_volume
from provisioner.errors import DockerError, DockerNotFound
from provisioner.snapshots.machine import Change, ChangeKind, ContainerFacts, HomeFacts, Volumes
from provisioner.snapshots.manifest import ImageIdentity
from provisioner.snapshots.mark import MARK_NAME
from provisioner.snapshots.tars import TarScanner
from stacks.names import INSTANCE_LABEL

_CHUNK_BYTES = 1 << 20
_SMALL_BYTES = 64 << 10
_RECORD_BYTES = 64 << 20
_KILLED = 137
_NEVER_STARTED = "created"
MOST_PAUSED_S = 60
"""How long a container is paused at most for its home to be copied."""
_HELPER_LIFE_S = 600
"""When a helper that a crash left ends by itself."""

_EMPTY = "find /to -mindepth 1 -delete"
_UNLOCK = 'cd /to && for lock in "$@"; do rm -f -- "$lock" || true; done'


class DockerMachine:
    """One node's Docker engine, as `provisioner.snapshots.machine.Machine` describes it."""

    def __init__(self, host: DockerHost, *, helper_image: str, labels: Mapping[str, str] | None = None) -> None:
        """Run helpers from `helper_image`, which needs `sh`, `cp` and `find`; `labels` are for helpers and images."""
        self._host = host
        self._helper_image = helper_image
        self._labels = dict(labels or {})

    # -- the instance's container ------------------------------------------------------------------------------------

    def inspect_container(self, container: str) -> ContainerFacts:
        """Return what must be known of a container; raises `DockerNotFound`."""
        found = self._host.call(f"inspect {container}", self._host.api.inspect_container, container)
        state = found["State"]
        return ContainerFacts(
            id=found["Id"],
            running=state["Running"],
            started_at=_parse_time(state["StartedAt"]),
            stopped_cleanly=state["ExitCode"] != _KILLED and not state["OOMKilled"],
            image=ImageIdentity(reference=found["Config"]["Image"], id=found["Image"]),
            mounts=tuple(mount["Destination"] for mount in found["Mounts"]),
            paused=state["Paused"],
        )

    def stop_container(self, container: str, *, timeout_s: int) -> None:
        """Stop a container by its image's stop signal, and kill it after `timeout_s`. Idempotent."""
        self.resume_container(container)
        self._host.call(f"stop {container}", self._host.slow_api.stop, container, timeout=timeout_s)

    def start_container(self, container: str) -> None:
        """Start a container. Idempotent."""
        self._host.call(f"start {container}", self._host.slow_api.start, container)

    def resume_container(self, container: str) -> None:
        """Let a paused container go on. Idempotent; one that does not run is left as it is."""
        resume_container(self._host, container)

    @contextmanager
    def read_path(self, container: str, path: str) -> Iterator[Iterator[bytes]]:
        """Stream a tar of a path: entries start with its last component. Raises `DockerNotFound`."""
        what = f"read {path} of {container}"
        chunks, _ = self._host.call(what, self._host.slow_api.get_archive, container, path, chunk_size=_CHUNK_BYTES)
        with _closing(self._stream(chunks, what=what)) as stream:
            yield stream

    @contextmanager
    def export_container(self, container: str) -> Iterator[Iterator[bytes]]:
        """Stream a tar of a container's whole root file system, without its volumes."""
        what = f"export {container}"
        chunks = self._host.call(what, self._host.slow_api.export, container, chunk_size=_CHUNK_BYTES)
        with _closing(self._stream(chunks, what=what)) as stream:
            yield stream

    def read_mark(self, container: str, home_path: str) -> str | None:
        """Return the mark that a restore left in a container's home directory, or None."""
        return self._read_small(container, f"{home_path}/{MARK_NAME}")

    def list_changes(self, container: str) -> tuple[Change, ...]:
        """Return what the container changed above its image."""
        changes = self._host.call(f"list the changes of {container}", self._host.slow_api.diff, container)
        return tuple(Change(change["Path"], ChangeKind(change["Kind"])) for change in changes or ())

    # -- volumes -----------------------------------------------------------------------------------------------------

    def make_copy(self, volumes: Volumes, *, stamp: str, labels: Mapping[str, str]) -> int:
        """Copy the home volume to the copy volume, replacing what is in it, and put `stamp` there as the last act.

        Returns how many entries (sockets aside) the home volume has.
        """
        self._check_volume(volumes.home)
        self._host.call(
            f"create the volume {volumes.copy}", self._host.api.create_volume, volumes.copy, labels=dict(labels)
        )
        code, output = self._run(
            volumes,
            copies.COPY,
            mounts={"/from": volumes.home, "/to": volumes.copy},
            read_only=("/from",),
            environment={"STAMP": stamp, **_names(volumes)},
        )
        if code:
            raise DockerError(f"The volume {volumes.home} could not be copied: {_last_line(output)}", detail=output)
        return int(output.split()[0])

    def copy_running(self, container: str, volumes: Volumes, *, labels: Mapping[str, str]) -> None:
        """Copy the home volume of a running container to the copy volume, replacing what is in it; no stamp yet.

        The container is paused meanwhile, and resumed whatever happens. A copy that takes too long is broken off.
        """
        self._check_volume(volumes.home)
        self._host.call(
            f"create the volume {volumes.copy}", self._host.api.create_volume, volumes.copy, labels=dict(labels)
        )
        with helper_container(
            self._host,
            image=self._helper_image,
            volume=volumes.home,
            mounts={"/from": volumes.home, "/to": volumes.copy},
            read_only=("/from",),
            command=("sleep", str(_HELPER_LIFE_S)),
            environment={"MOST_S": str(MOST_PAUSED_S), **_names(volumes)},
            labels=self._labels,
        ) as helper:
            self._host.call(f"start {helper}", self._host.slow_api.start, helper)
            code, output = run_inside(self._host, helper, copies.CLEAR)
            if not code:
                try:
                    self._host.call(f"pause {container}", self._host.slow_api.pause, container)
                    code, output = run_inside(self._host, helper, copies.COPY_PAUSED)
                    paused = self.inspect_container(container).paused
                finally:
                    self.resume_container(container)
                if not code and not paused:  # somebody stopped or resumed it: the copy may be torn
                    raise DockerError(f"The container {container} went on while its home was copied.")
        if code == copies.OUT_OF_TIME:
            raise DockerError(
                f"The volume {volumes.home} could not be copied within {MOST_PAUSED_S} s, and the browser is not held "
                "for longer.",
                detail=output,
                resolution="Make the instance dormant for a snapshot, or remove large files from its home directory.",
            )
        if code:
            raise DockerError(f"The volume {volumes.home} could not be copied: {_last_line(output)}", detail=output)

    @contextmanager
    def read_copy(self, volumes: Volumes) -> Iterator[Iterator[bytes]]:
        """Stream a tar of the home in a copy volume, as `read_path` would stream the home it was copied from."""
        self._check_volume(volumes.copy)
        with (
            self._helper(volumes.copy, mounts={"/from": volumes.copy}) as helper,
            self.read_path(helper, f"/from/{_home_name(volumes)}") as chunks,
        ):
            yield chunks

    def stamp_copy(self, volumes: Volumes, *, stamp: str) -> int:
        """Put `stamp` on what `copy_running` has copied; return how many entries (sockets aside) that has."""
        self._check_volume(volumes.copy)
        code, output = self._run(
            volumes, copies.STAMP_COPIED, mounts={"/to": volumes.copy}, environment={"STAMP": stamp, **_names(volumes)}
        )
        if code:
            raise DockerError(f"The volume {volumes.copy} could not be stamped: {_last_line(output)}", detail=output)
        return int(output.split()[0])

    def read_stamp(self, copy: str) -> str | None:
        """Return the stamp of a copy volume, or None when there is no (complete) copy."""
        try:
            self._check_volume(copy)
        except DockerNotFound:
            return None
        with self._helper(copy, mounts={"/from": copy}) as helper:
            text = self._read_small(helper, f"/from/{copies.STAMP_NAME}")
        return text.split(" ")[0] if text else None

    def remove_copy(self, copy: str) -> None:
        """Remove a copy volume and helpers that still hold it. Idempotent."""
        remove_volume(self._host, copy)

    def inspect_home(self, volumes: Volumes) -> HomeFacts:
        """Look into a home volume; raises `DockerNotFound` when there is none."""
        self._check_volume(volumes.home)
        users = self._host.call(
            f"list the containers of {volumes.home}",
            self._host.api.containers,
            all=True,
            filters={"volume": volumes.home},
        )
        users = [user for user in users if HELPER_LABEL not in user["Labels"]]
        used_by = {user["Names"][0].lstrip("/"): user["Labels"].get(INSTANCE_LABEL) for user in users}
        ran = frozenset(user["Names"][0].lstrip("/") for user in users if user["State"] != _NEVER_STARTED)
        with self._helper(volumes.home, mounts={"/to": volumes.home}) as helper:
            return HomeFacts(mark=self._read_small(helper, f"/to/{MARK_NAME}"), used_by=used_by, ran=ran)

    def fill_home(self, volumes: Volumes, *, stamp: str, entries: int, mark: str) -> str | None:
        """Empty the home volume, fill it from the copy volume, remove Chromium's locks, and leave `mark` there last.

        Returns None, or, with the home volume untouched, why the copy can't be used: it is not there, not the one that
        bears `stamp`, older than the node's last start, or has not as many `entries` (sockets aside).
        """
        self._check_volume(volumes.home)
        try:
            self._check_volume(volumes.copy)  # Docker would make a volume that isn't there
        except DockerNotFound:
            return "The node has no copy of the snapshot."
        code, output = self._run(
            volumes,
            copies.FILL,
            mounts={"/from": volumes.copy, "/to": volumes.home},
            read_only=("/from",),
            environment={
                "STAMP": stamp,
                "ENTRIES": str(entries),
                "MARK": mark,
                "MARK_NAME": MARK_NAME,
                **_names(volumes),
            },
        )
        if code == copies.NO_COPY:
            return _last_line(output)
        if code:
            raise DockerError(f"The volume {volumes.copy} could not be copied: {_last_line(output)}", detail=output)
        return None

    def write_home(self, volumes: Volumes, chunks: Iterator[bytes], *, mark: str, locks: Sequence[str]) -> None:
        """Empty the home volume, unpack a tar made by `read_path`, remove `locks` (relative to home), leave `mark`."""
        self._check_volume(volumes.home)
        name = _home_name(volumes)
        if not self._is_empty(volumes):
            self._change(volumes, _EMPTY)
        with self._helper(volumes.home, mounts={f"/to/{name}": volumes.home}) as helper:
            self._unpack(helper, chunks, what=f"unpack an archive into {volumes.home}")
            if not locks:
                self._leave_mark(helper, name, mark)
        if locks:
            self._change(volumes, _UNLOCK, *locks)
            with self._helper(volumes.home, mounts={f"/to/{name}": volumes.home}) as helper:
                self._leave_mark(helper, name, mark)

    def _is_empty(self, volumes: Volumes) -> bool:
        with (
            self._helper(volumes.home, mounts={"/to": volumes.home}) as helper,
            self.read_path(helper, "/to") as chunks,
        ):
            scanner = TarScanner()
            for chunk in chunks:
                scanner.feed(chunk)
                if scanner.entries > 1:  # the first one is the directory itself
                    return False
        return True

    def _change(self, volumes: Volumes, script: str, *arguments: str) -> None:
        code, output = self._run(volumes, script, *arguments, mounts={"/to": volumes.home})
        if code:
            raise DockerError(f"The volume {volumes.home} could not be changed: {_last_line(output)}", detail=output)

    def _leave_mark(self, helper: str, name: str, mark: str) -> None:
        self._unpack(helper, iter([pack_file(f"{name}/{MARK_NAME}", mark.encode())]), what="mark the home volume")

    def _unpack(self, helper: str, chunks: Iterator[bytes], *, what: str) -> None:
        self._host.call(what, self._host.slow_api.put_archive, helper, "/to", chunks)

    def _check_volume(self, name: str) -> None:
        self._host.call(f"inspect the volume {name}", self._host.api.inspect_volume, name)

    def _helper(self, volume: str, *, mounts: Mapping[str, str]) -> AbstractContextManager[str]:
        return helper_container(self._host, image=self._helper_image, volume=volume, mounts=mounts, labels=self._labels)

    def _run(self, volumes: Volumes, script: str, *arguments: str, **helper: Any) -> tuple[int, str]:
        return run_helper(
            self._host,
            script,
            *arguments,
            image=self._helper_image,
            volume=volumes.home,
            labels=self._labels,
            **helper,
        )

    # -- images ------------------------------------------------------------------------------------------------------

    def read_image_file(self, image: str, path: str) -> bytes:
        """Return the content of a small file of an image; raises `DockerNotFound`."""
        what = f"look into the image {image}"
        created = self._host.call(
            what,
            self._host.slow_api.create_container,
            image,
            entrypoint=["true"],
            labels={**self._labels, HELPER_LABEL: image},
            network_disabled=True,
        )
        try:
            with self.read_path(created["Id"], path) as chunks:
                return _only_file(chunks, limit=_RECORD_BYTES)
        finally:
            self._host.call(what, self._host.slow_api.remove_container, created["Id"], force=True)

    def has_image(self, image: str) -> bool:
        """Say whether the node has an image."""
        try:
            self._host.call(f"inspect the image {image}", self._host.api.inspect_image, image)
        except DockerNotFound:
            return False
        return True

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
        what = f"build the image {tag}"
        found = self._host.call(f"inspect the image {base}", self._host.api.inspect_image, base)
        user = found["Config"].get("User") or ""
        context = pack_context(
            base=base, user=user, deleted_paths=deleted_paths, rootfs=rootfs, rootfs_bytes=rootfs_bytes
        )
        with self._host.errors(what):
            lines = self._host.slow_api.build(
                fileobj=context,  # type: ignore[arg-type]  # sent as it is: requests takes an iterator
                custom_context=True,
                tag=tag,
                rm=True,
                forcerm=True,
                network_mode="none",
                labels=self._labels,
                decode=True,
            )
            for line in lines:
                if "error" in line:
                    raise DockerError(
                        f"Docker on {self._host.url} could not {what}: {line['error']}", detail=json.dumps(line)
                    )

    def remove_image(self, tag: str) -> bool:
        """Untag an image, and remove it when nothing else needs it; False when something uses it. Idempotent."""
        return remove_image(self._host, tag)

    # -- streams -----------------------------------------------------------------------------------------------------

    def _stream(self, chunks: Iterator[bytes], *, what: str) -> Iterator[bytes]:
        with self._host.errors(what):
            yield from chunks

    def _read_small(self, container: str, path: str) -> str | None:
        """Return a small file's text, or None when there is none: what a user puts there instead must not stop us."""
        try:
            with self.read_path(container, path) as chunks:
                return _only_file(chunks, limit=_SMALL_BYTES).decode(errors="replace")
        except (DockerNotFound, tarfile.TarError):
            return None


def _home_name(volumes: Volumes) -> str:
    return PurePosixPath(volumes.home_path).name


def _names(volumes: Volumes) -> dict[str, str]:
    return {"STAMP_NAME": copies.STAMP_NAME, "HOME_NAME": _home_name(volumes)}


def _only_file(chunks: Iterable[bytes], *, limit: int) -> bytes:
    """Return the content of a tar's first entry; raises `TarError` when that is no file or there is too much."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limit:
            raise tarfile.ReadError(f"more than {limit} bytes")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.next()
        file = archive.extractfile(member) if member is not None and member.isreg() else None
        if file is None:
            raise tarfile.ReadError("not a file")
        return file.read()


def _parse_time(text: str) -> datetime | None:
    """Parse Docker's time; None for the zero time, which means never."""
    return None if text.startswith("0001-") else datetime.fromisoformat(text)


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["it said nothing"])[-1]


@contextmanager
def _closing(stream: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """Close a generator when its reader is done, early or not: that ends the engine's sending."""
    try:
        yield stream
    finally:
        if isinstance(stream, Generator):
            stream.close()
