"""The tars that we write ourselves: a small file for a container, and what a restored image is built from."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence


def pack_file(name: str, content: bytes) -> bytes:
    """Return a tar of one file."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(content), 0o644
    return _entry(header, content) + bytes(1024)


def _entry(header: tarfile.TarInfo, content: bytes) -> bytes:
    return header.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def _dockerfile(base: str, *, user: str, deletes: bool) -> str:
    lines = [f"FROM {base}"]
    if deletes:
        lines += [
            "USER 0:0",
            "COPY deleted /.machineuse-deleted",
            'RUN ["/bin/sh", "-c", "xargs -0 rm -rf -- < /.machineuse-deleted && rm /.machineuse-deleted"]',
        ]
    lines.append("ADD rootfs.tar /")
    if deletes and user:
        lines.append(f"USER {user}")
    return "\n".join(lines) + "\n"


def pack_context(
    *, base: str, user: str, deleted_paths: Sequence[str], rootfs: Iterable[bytes], rootfs_bytes: int
) -> Iterator[bytes]:
    """Stream what an image is built from: `base` without `deleted_paths`, and the tar `rootfs` laid over that.

    `user` is the one that `base` runs as. `rootfs` is passed through, so its size must be known before.
    """
    dockerfile = _dockerfile(base, user=user, deletes=bool(deleted_paths))
    deleted = b"\0".join(path.encode(errors="surrogateescape") for path in deleted_paths)
    for name, content in (("Dockerfile", dockerfile.encode()), ("deleted", deleted)):
        header = tarfile.TarInfo(name)
        header.size = len(content)
        yield _entry(header, content)
    header = tarfile.TarInfo("rootfs.tar")
    header.size = rootfs_bytes
    yield header.tobuf(tarfile.PAX_FORMAT)
    yield from rootfs
    yield bytes(-rootfs_bytes % 512)
    yield bytes(1024)
