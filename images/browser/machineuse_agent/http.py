"""As much of HTTP/1.1 as the doors need: reading a request's head, and writing small answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus

_MAX_HEAD_BYTES = 32 * 1024


@dataclass(frozen=True)
class Head:
    """A request's first lines; header names are in lower case."""

    raw: bytes
    method: str
    path: str
    headers: dict[str, str]

    @property
    def wants_websocket(self) -> bool:
        """Say whether the client asks to leave HTTP for WebSocket."""
        return self.headers.get("upgrade", "").lower() == "websocket"


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Return the next request's head, or None when the client closes, breaks off, or speaks something else."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    if len(raw) > _MAX_HEAD_BYTES:
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    pairs = (line.partition(":") for line in lines if ":" in line)
    return Head(
        raw=raw,
        method=words[0],
        path=words[1].partition("?")[0],
        headers={name.strip().lower(): value.strip() for name, _, value in pairs},
    )


def answer(
    status: HTTPStatus, body: bytes = b"", *, content_type: str = "text/plain; charset=utf-8", close: bool = False
) -> bytes:
    """Return a whole response."""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-cache\r\nConnection: {'close' if close else 'keep-alive'}\r\n\r\n"
    )
    return head.encode() + body
