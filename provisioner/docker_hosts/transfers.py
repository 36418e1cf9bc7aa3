"""Brings images to an engine: pulled from a registry, or copied from another engine that has them.

A copy streams from engine to engine, a chunk in memory at a time and nothing on this machine's disk; however long it
takes, it is given up only for silence. Two that want the same image on the same engine make one transfer.

A name that was built in the cluster (an engine has it, and knows no registry that it came from) is never asked of a
registry: somebody else may have an image of that name there.

An image that the engine can't run, being for another architecture, is not copied, and not taken where it is already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import structlog
from docker.errors import APIError
from docker.utils import parse_repository_tag

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.images import (
    REPORT_EVERY_S,
    ImageInfo,
    can_run,
    explain_platform,
    find_image,
    pull_image,
    remove_image,
)
from provisioner.errors import DockerError, MachineuseError, UnknownImage

log = structlog.get_logger(__name__)

Report = Callable[[str], None]
"""Gets one readable line."""

_CHUNK_BYTES = 1 << 20


def bring_image(
    target: DockerHost,
    name: str,
    *,
    sources: Sequence[DockerHost] = (),
    tag: str | None = None,
    emulated: str | None = None,
    say: Report = lambda _: None,
    report: Report = lambda _: None,
) -> ImageInfo:
    """Return the image of that name or id, brought from a registry or one of the `sources` when the engine lacks it.

    `tag` is a name that an image brought by its id gets, unless the engine has another of that name; `emulated` an
    architecture that the engine runs besides its own. `say` is told of each transfer that begins, `report` how far it
    is. Idempotent. Raises UnknownImage when it is nowhere to be had, or not for the engine's platform; NodeUnreachable
    for the engine itself, and DockerError when the copying fails: that is worth another try.
    """
    what = f"image {name}"
    if target.is_locked(what):
        say(f"waiting for {name}, which is on its way already")
    with target.lock(what):
        found = find_image(target, name)
        if found is not None and not can_run(target, found, emulated=emulated):
            raise explain_platform(target, name, found)
        if found is None:
            found = _bring(target, name, sources=sources, emulated=emulated, say=say, report=report)
            if not can_run(target, found, emulated=emulated):  # a registry may have it for one platform only
                remove_image(target, name)
                raise explain_platform(target, name, found)
            if tag is not None and find_image(target, tag) is None:
                repository, label = parse_repository_tag(tag)
                target.call(f"tag {name}", target.work_api.tag, found.id, repository, tag=label or "latest")
    return found


def _bring(
    target: DockerHost,
    name: str,
    *,
    sources: Sequence[DockerHost],
    emulated: str | None,
    say: Report,
    report: Report,
) -> ImageInfo:
    known = _owners(name, sources=sources)
    owners = [(source, image) for source, image in known if can_run(target, image, emulated=emulated)]
    built_here = any(not image.pulled for _, image in known)
    failure: MachineuseError | None = None
    if not built_here and not name.startswith("sha256:"):
        say(f"pulling {name}")
        try:
            pull_image(target, name, report=report)
        except UnknownImage as error:
            failure = error
    for source, image in owners:
        if find_image(target, name) is not None:
            break
        say(f"copying {name} from {source.url}, {image.bytes / 1e6:.0f} MB")
        try:
            copy_image(source, target, name, total_bytes=image.bytes, report=report)
        except DockerError as error:
            target.ping()  # raises where it is the target that does not answer
            failure = error
    found = find_image(target, name)
    if found is not None:
        return found
    if known and not owners:
        source, image = known[0]
        detail = failure.message if failure is not None else None
        raise explain_platform(target, name, image, source=source, detail=detail) from failure
    if failure is not None:
        raise failure
    raise UnknownImage(
        f"The node does not have the image {name}, and no other node that answers has it.",
        resolution="Build or load the image on one of the nodes, or name one that a registry offers.",
    )


def _owners(name: str, *, sources: Sequence[DockerHost]) -> list[tuple[DockerHost, ImageInfo]]:
    owners = []
    for source in sources:
        try:
            source.check_alive()
            image = find_image(source, name)
        except DockerError as error:
            log.debug("not asked for an image", engine=source.url, image=name, error=error.message)
            continue
        if image is not None:
            owners.append((source, image))
    return owners


def copy_image(
    source: DockerHost, target: DockerHost, name: str, *, total_bytes: int, report: Report = lambda _: None
) -> None:
    """Stream an image from one engine into another; raise DockerError when either can't.

    A name goes along; an image that is copied by its id has none afterwards. What the target has already is read by it
    and thrown away.
    """
    what = f"copy image {name} from {source.url}"
    with source.errors(f"give image {name}"):
        chunks = source.transfer_api.get_image(name, chunk_size=_CHUNK_BYTES)
    counted = _counting(_from(source, chunks, name=name), name=name, total_bytes=total_bytes, report=report)
    with target.errors(what):
        try:
            for event in target.transfer_api.load_image(counted):  # type: ignore[no-untyped-call]
                if "error" in event:
                    raise DockerError(f"Docker on {target.url} could not {what}: {event['error']}", detail=str(event))
        except APIError as error:
            raise DockerError(f"Docker on {target.url} could not {what}.", detail=str(error)) from error


def _from(source: DockerHost, chunks: Iterator[bytes], *, name: str) -> Iterator[bytes]:
    """Give the chunks; what breaks while they are read is the source's failure, and not the target's."""
    with source.errors(f"give image {name}"):
        yield from chunks


def _counting(chunks: Iterator[bytes], *, name: str, total_bytes: int, report: Report) -> Iterator[bytes]:
    done, reported = 0, 0.0
    for chunk in chunks:
        done += len(chunk)
        if time.monotonic() - reported >= REPORT_EVERY_S:
            reported = time.monotonic()
            # How far it is comes first: whatever shows this may have room for no more.
            report(f"{min(done, total_bytes) / 1e6:.0f} of {total_bytes / 1e6:.0f} MB copied of {name}")
        yield chunk
    report(f"{done / 1e6:.0f} MB copied, unpacking {name}")
