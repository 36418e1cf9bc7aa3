"""A viewer of the live screen, as noVNC is one: VNC messages over a WebSocket."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

_VERSION = b"RFB 003.008\n"
_NO_PASSWORD = b"\x01"
_SHARED = b"\x01"


class Viewer:
    """One open live view."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._read = b""
        self._expect(12)
        self._connection.send(_VERSION)
        self._expect(self._expect(1)[0])  # the kinds of security on offer
        self._connection.send(_NO_PASSWORD)
        assert self._expect(4) == bytes(4), "the screen refuses"
        self._connection.send(_SHARED)
        size_and_format = self._expect(24)
        self.width, self.height = struct.unpack(">HH", size_and_format[:4])
        self._expect(struct.unpack(">I", size_and_format[20:])[0])  # the screen's name

    def ask_for_picture(self) -> None:
        """Ask for what changed on a corner of the screen, as every open view does all the time."""
        self._connection.send(struct.pack(">BBHHHH", 3, 1, 0, 0, 8, 8))

    def move_pointer(self, x: int, y: int) -> None:
        """Move the pointer."""
        self._connection.send(struct.pack(">BBHH", 5, 0, x, y))

    def press(self, key: str) -> None:
        """Press and release a key with a letter on it."""
        for down in (1, 0):
            self._connection.send(struct.pack(">BBHI", 4, down, 0, ord(key)))

    def _expect(self, size: int) -> bytes:
        while len(self._read) < size:
            self._read += cast(bytes, self._connection.recv(timeout=60))
        taken, self._read = self._read[:size], self._read[size:]
        return taken


@contextmanager
def open_view(instance: Mapping[str, Any]) -> Iterator[Viewer]:
    """Open the live view of an instance."""
    url = f"ws://127.0.0.1:{instance['stream_port']}/websockify"
    with connect(url, subprotocols=[Subprotocol("binary")], proxy=None) as connection:
        yield Viewer(connection)
