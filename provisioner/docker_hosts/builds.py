"""Images that are made here: imported from a root file system, or built from a Dockerfile.

Builds go through the engine's own (classic) builder, by API: no Docker client of a certain version has to be there.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docker.utils import parse_repository_tag

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.images import find_image
from provisioner.errors import DockerError

_LAST_LINES = 30


def pack_context(files: Mapping[str, bytes]) -> bytes:
    """Return a build context with these files; equal files give equal bytes, so that the engine's cache holds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def build_image(
    host: DockerHost,
    context: bytes,
    *,
    tag: str | None = None,
    build_args: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> str:
    """Build an image from a context that has a Dockerfile, reporting each line of the build; return its id.

    Steps that the engine has built before are taken from its cache. Raises `DockerError`, with the build's last lines
    as detail, or `NodeUnreachable`.
    """
    lines: list[str] = []
    built = ""
    with host.errors("build an image"):
        events: Iterator[dict[str, Any]] = host.slow_api.build(
            fileobj=io.BytesIO(context),
            custom_context=True,
            tag=tag,
            buildargs=dict(build_args or {}),
            rm=True,
            forcerm=True,
            decode=True,
        )
        for event in events:
            if "error" in event:
                raise DockerError(
                    f"Docker on {host.url} could not build an image: {' '.join(str(event['error']).split())}",
                    detail="\n".join(lines[-_LAST_LINES:]),
                )
            built = (event.get("aux") or {}).get("ID", built)
            if line := str(event.get("stream", "")).strip():
                lines.append(line)
                report(line)
    if not built:
        raise DockerError(
            f"Docker on {host.url} built an image, but named none.", detail="\n".join(lines[-_LAST_LINES:])
        )
    return built


def import_root(host: DockerHost, archive: Path, *, tag: str) -> None:
    """Make an image of one layer out of a root file system's tar file; raise `DockerError` when the engine won't."""
    repository, label = parse_repository_tag(tag)
    before = find_image(host, tag)
    with host.errors(f"import {tag}"):
        answer = str(host.slow_api.import_image(src=str(archive), repository=repository, tag=label))
    after = find_image(host, tag)
    if after is None or (before is not None and after.id == before.id):
        raise DockerError(f"Docker on {host.url} could not import {tag}.", detail=answer)


def read_json(host: DockerHost, image: str, *, path: str) -> dict[str, Any]:
    """Return a small JSON file out of an image, without running anything in it."""
    with host.errors(f"read {path} of {image}"):
        container = host.slow_api.create_container(image, command=["true"])["Id"]
        try:
            chunks, _ = host.slow_api.get_archive(container, path)
            with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
                member = tar.extractfile(tar.getmembers()[0])
                content: dict[str, Any] = json.loads(member.read()) if member else {}
        finally:
            host.slow_api.remove_container(container, v=True, force=True)
    return content


def image_bytes(host: DockerHost, image: str) -> int:
    """Return an image's size in bytes, layers that it shares with others included."""
    return int(host.call(f"inspect image {image}", host.api.inspect_image, image)["Size"])
