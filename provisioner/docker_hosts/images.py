"""Images of a Docker engine: what is there, and pulling what is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from docker.errors import APIError
from docker.utils import parse_repository_tag

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.errors import DockerNotFound, UnknownImage

REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image says about itself."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: frozenset[str] = frozenset()
    """As in `9222/tcp`."""


def find_image(host: DockerHost, name: str) -> ImageInfo | None:
    """Return the image of that name or id, or None when the engine does not have it."""
    try:
        found: dict[str, Any] = host.call(f"inspect image {name}", host.api.inspect_image, name)
    except DockerNotFound:
        return None
    config = found.get("Config") or {}
    return ImageInfo(
        id=found["Id"],
        labels=config.get("Labels") or {},
        exposed_ports=frozenset(config.get("ExposedPorts") or {}),
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


def ensure_image(host: DockerHost, name: str, *, report: Callable[[str], None] = lambda _: None) -> ImageInfo:
    """Return the image, pulled first when the engine lacks it; raise `UnknownImage`, `NodeUnreachable`."""
    image = find_image(host, name)
    if image is None:
        pull_image(host, name, report=report)
        image = find_image(host, name)
    if image is None:
        raise UnknownImage(f"The image {name} was pulled, but the node does not have it.")
    return image


def _describe(name: str, *, layers: Mapping[str, tuple[int, int]], status: str) -> str:
    done, total = (sum(column) for column in zip(*layers.values(), strict=True)) if layers else (0, 0)
    if not total:
        return f"Pulling {name}: {status.lower() or 'asking the registry'}"
    return f"Pulling {name}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB"


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
