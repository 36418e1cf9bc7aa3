"""The server's half of a WebSocket (RFC 6455), as far as a VNC stream needs it: binary both ways, no extensions."""

from __future__ import annotations

import base64
import hashlib
from asyncio import StreamReader, StreamWriter

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_MAX_FRAME_BYTES = 16 * 1024 * 1024

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


class ProtocolError(Exception):
    """The client sent what no WebSocket client sends."""


def accept_key(key: str) -> str:
    """Return the answer to a handshake's `Sec-WebSocket-Key`."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()


def handshake(key: str, *, protocol: str | None) -> bytes:
    """Return the response that switches a connection to WebSocket."""
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(key)}",
    ]
    if protocol:
        lines.append(f"Sec-WebSocket-Protocol: {protocol}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def frame(payload: bytes, *, opcode: int = _BINARY) -> bytes:
    """Return one whole, unmasked frame."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, size))
    elif size < 65536:
        head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
    return head + payload


def unmask(payload: bytes, mask: bytes) -> bytes:
    """Return the payload as it was before the client masked it (the same as masking it again)."""
    size = len(payload)
    pad = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")


async def read_payload(reader: StreamReader, writer: StreamWriter) -> bytes | None:
    """Return the next data a client sends, answering its pings; None when it closes.

    Raises `ProtocolError` for unmasked or oversized frames, `asyncio.IncompleteReadError` when the line breaks.
    """
    while True:
        head = await reader.readexactly(2)
        opcode, size = head[0] & 0x0F, head[1] & 0x7F
        if not head[1] & 0x80 or head[0] & 0x70:
            raise ProtocolError("frame without mask or with unknown extension")
        if size == 126:
            size = int.from_bytes(await reader.readexactly(2), "big")
        elif size == 127:
            size = int.from_bytes(await reader.readexactly(8), "big")
        if size > _MAX_FRAME_BYTES:
            raise ProtocolError(f"frame of {size} bytes")
        mask = await reader.readexactly(4)
        payload = unmask(await reader.readexactly(size), mask)
        if opcode in (_CONTINUATION, _TEXT, _BINARY):
            return payload
        if opcode == _PING:
            writer.write(frame(payload, opcode=_PONG))
        elif opcode == _CLOSE:
            writer.write(frame(payload[:2], opcode=_CLOSE))
            return None
        elif opcode != _PONG:
            raise ProtocolError(f"frame with opcode {opcode}")
