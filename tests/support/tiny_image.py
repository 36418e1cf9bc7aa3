"""A Docker image of one file that does nothing for ever: real containers without a download or a compiler."""

from __future__ import annotations

import io
import platform
import struct
import tarfile

import docker

_CODE = {
    # again: pause(); goto again
    "x86_64": (62, bytes.fromhex("b8220000000f05ebf7")),
    # again: ppoll(NULL, 0, NULL, NULL, 0); goto again
    "aarch64": (183, bytes.fromhex("000080d2 010080d2 020080d2 030080d2 280980d2 010000d4 faffff17".replace(" ", ""))),
}
_LOAD_AT = 0x400000
_HEADERS = 64 + 56


def idle_program() -> bytes:
    """Return a static ELF program for this machine that waits until it is killed."""
    machine, code = _CODE[platform.machine()]
    size = _HEADERS + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, _LOAD_AT + _HEADERS, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD_AT, _LOAD_AT, size, size, 0x1000)
    return header + segment + code


def make_tiny_image(engine: docker.DockerClient, name: str) -> None:
    """Build the image under `repository:tag`; it stops at once when it is told to."""
    dockerfile = b'FROM scratch\nCOPY idle /idle\nENTRYPOINT ["/idle"]\nSTOPSIGNAL SIGKILL\n'
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for path, content, mode in (("Dockerfile", dockerfile, 0o644), ("idle", idle_program(), 0o755)):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    context.seek(0)
    engine.images.build(fileobj=context, custom_context=True, tag=name, rm=True)
