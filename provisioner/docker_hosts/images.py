"""Images of a Docker engine: what is there, and pulling what is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from docker.errors import APIError
from docker.utils import parse_repository_tag

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerNotFound, UnknownImage

REPORT_EVERY_S = 0.5
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""What engines and machines call an architecture → what image platforms do."""
_RUNS_TOO = {"amd64": ("386",), "arm64": ("arm",)}
"""Architecture → what it runs besides, without any emulation."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image says about itself."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: frozenset[str] = frozenset()
    """As in `9222/tcp`."""
    bytes: int = 0
    """Size, layers that it shares with others included."""
    pulled: bool = True
    """Whether it came from a registry; False for one that was built, loaded or imported."""
    platform: str = ""
    """As in `linux/arm64`; empty where the image does not say. Without a variant: engines don't tell theirs."""


def find_image(host: DockerHost, name: str) -> ImageInfo | None:
    """Return the image of that name or id, or None when the engine does not have it."""
    host.check_alive()  # of an engine that has gone silent, many ask in a row: it costs the time limit once
    try:
        found: dict[str, Any] = host.call(f"inspect image {name}", host.api.inspect_image, name)
    except DockerNotFound:
        return None
    config = found.get("Config") or {}
    return ImageInfo(
        id=found["Id"],
        labels=config.get("Labels") or {},
        exposed_ports=frozenset(config.get("ExposedPorts") or {}),
        bytes=int(found.get("Size") or 0),
        pulled=bool(found.get("RepoDigests")),
        platform=_platform(found.get("Os"), found.get("Architecture")),
    )


def find_usable_image(host: DockerHost, name: str, *, emulated: str | None = None) -> ImageInfo | None:
    """Return the image of that name or id, or None when the engine does not have it, or can't run it."""
    found = find_image(host, name)
    return found if found is not None and can_run(host, found, emulated=emulated) else None


def find_platform(host: DockerHost) -> str:
    """Return what the engine runs, as in `linux/arm64`; empty where it does not say. Raises DockerError."""
    version = host.version()
    return _platform(version.get("Os"), version.get("Arch"))


def _platform(system: str | None, architecture: str | None) -> str:
    return f"{system}/{ARCHITECTURES.get(architecture, architecture)}" if system and architecture else ""


def can_run(host: DockerHost, image: ImageInfo, *, emulated: str | None = None) -> bool:
    """Say whether the engine runs such images, as far as anybody says; `emulated` is an architecture that it adds."""
    own = find_platform(host) if image.platform else ""
    if not own:
        return True
    (system, architecture), (own_system, own_architecture) = image.platform.split("/", 1), own.split("/", 1)
    runs = (own_architecture, emulated, *_RUNS_TOO.get(own_architecture, ()))
    return system == own_system and architecture in runs


def explain_platform(
    host: DockerHost, name: str, image: ImageInfo, *, source: DockerHost | None = None, detail: str | None = None
) -> UnknownImage:
    """Return the error for an image that the engine can't run: its own, or one that it could get from `source`."""
    own, where = find_platform(host), f"on {host.url}" if source is None else f"that {source.url} has"
    return UnknownImage(
        f"The image {name} {where} is for {image.platform}, and the engine at {host.url} runs {own}.",
        detail=detail,
        resolution=f"Build or load the image for {own} there. If the engine emulates the other (binfmt), say so in the"
        f" cluster's file: `labels: {{arch: {image.platform.partition('/')[2]}}}` at its node.",
    )


def pull_image(host: DockerHost, name: str, *, report: Callable[[str], None] = lambda _: None) -> None:
    """Pull an image and report the progress a few times a second.

    Raises `UnknownImage` when no registry gives it, whatever the reason; `NodeUnreachable`.
    """
    if name.startswith("sha256:"):
        raise UnknownImage(f"The node does not have the image {name}, and an image can't be pulled by its id.")
    repository, tag = parse_repository_tag(name)
    layers: dict[str, tuple[int, int]] = {}
    reported = 0.0
    with host.errors(f"pull image {name}"):
        try:
            for event in host.slow_api.pull(repository, tag=tag or "latest", stream=True, decode=True):
                if "error" in event:
                    raise _unknown(name, words=str(event["error"]))
                progress = event.get("progressDetail") or {}
                if event.get("id") and progress.get("total"):
                    layers[event["id"]] = (progress.get("current", 0), progress["total"])
                if time.monotonic() - reported >= REPORT_EVERY_S:
                    reported = time.monotonic()
                    report(_describe(name, layers=layers, status=str(event.get("status", ""))))
        except APIError as error:
            raise _unknown(name, words=str(error.explanation or error)) from error


def _describe(name: str, *, layers: Mapping[str, tuple[int, int]], status: str) -> str:
    done, total = (sum(column) for column in zip(*layers.values(), strict=True)) if layers else (0, 0)
    if not total:
        return f"{status.lower() or 'asking the registry'}: pulling {name}"
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB pulled of {name}"


def _unknown(name: str, *, words: str) -> UnknownImage:
    words = " ".join(words.split())
    return UnknownImage(
        f"The node does not have the image {name}, and it could not be pulled: {words}.",
        detail=words,
        resolution="Check the image's name, or load the image on the node.",
    )


def check_offered(host: DockerHost, name: str) -> None:
    """Ask the image's registry, through the engine, whether it offers the image; raise DockerError when it does not."""
    host.call(f"find image {name} in a registry", host.slow_api.inspect_distribution, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedImage:
    """An image that the engine has, with all its names."""

    id: str
    names: tuple[str, ...]
    """With their tags; none for an image that another one of its name took the place of."""
    labels: Mapping[str, str]
    bytes: int
    """Size, layers that it shares with others included."""
    created_at: float
    """Seconds since the epoch."""
    in_use: bool
    """Whether a container, running or not, was made from it."""


def list_images(host: DockerHost) -> list[ListedImage]:
    """Return the engine's images, but for those that are only steps towards others. Raises DockerError."""
    rows = host.call("list images", host.api.images)
    containers = host.call("list containers", host.api.containers, all=True)  # after: none of a listed image is missed
    used = {container["ImageID"] for container in containers}
    return [
        ListedImage(
            id=row["Id"],
            names=tuple(tag for tag in row.get("RepoTags") or () if tag != "<none>:<none>"),
            labels=row.get("Labels") or {},
            bytes=int(row.get("Size") or 0),
            created_at=float(row.get("Created") or 0),
            in_use=row["Id"] in used,
        )
        for row in rows
    ]


def remove_image(host: DockerHost, name: str) -> bool:
    """Take a name from an image, and remove the image with its last one; False when something uses it. Idempotent."""
    with host.errors(f"remove the image {name}"):
        try:
            host.work_api.remove_image(name)
        except APIError as error:
            if error.status_code == HTTPStatus.CONFLICT:
                return False
            if error.status_code != HTTPStatus.NOT_FOUND:
                raise
    return True
