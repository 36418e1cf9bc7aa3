"""The two doors: CDP on 9222, the live view on 6080.

Both pass bytes on and do little else. CDP is handed through to Chromium as it comes; the live view is a small page
and a WebSocket that carries VNC. Both answer `GET /machineuse/status` themselves: that is the one request that never
counts as activity, however often it is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mimetypes
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from machineuse_agent import websocket
from machineuse_agent.activity import Activity, Door
from machineuse_agent.http import Head, answer, read_head
from machineuse_agent.rfb import InputReader

STATUS_PATH = "/machineuse/status"
_STATUS_START = f"GET {STATUS_PATH} ".encode()
_CHUNK_BYTES = 256 * 1024
_BROWSER_WAIT_S = 15.0
"""A client that comes while the browser starts, or starts again, is let in as soon as it is up."""

Status = Callable[[], Awaitable[dict[str, object]]]
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def _status_answer(status: Status, *, close: bool = False) -> bytes:
    body = json.dumps(await status()).encode()
    return answer(HTTPStatus.OK, body, content_type="application/json", close=close)


async def _close(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        writer.close()
    for writer in writers:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 5)


async def _either(*works: Awaitable[None]) -> None:
    """Run several until the first ends, then end the rest; a broken connection is an end like any other."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(
                result, (OSError, asyncio.IncompleteReadError, websocket.ProtocolError)
            ):
                raise result


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass everything on, as fast as the slower side takes it."""
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()


class CdpDoor:
    """Hands each client through to Chromium's debug port."""

    def __init__(self, *, activity: Activity, status: Status, browser_up: asyncio.Event, connect: Connect) -> None:
        self._activity = activity
        self._status = status
        self._browser_up = browser_up
        self._connect = connect

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client until either side closes."""
        try:
            while head := await read_head(reader):
                if not head.raw.startswith(_STATUS_START):
                    with self._activity.connection(Door.CDP):
                        await self._pass_through(head, reader, writer)
                    return
                writer.write(await _status_answer(self._status))
                await writer.drain()
        except OSError:
            return
        finally:
            await _close(writer)

    async def _pass_through(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.wait_for(self._browser_up.wait(), _BROWSER_WAIT_S)
            up_reader, up_writer = await self._connect()
        except (OSError, asyncio.TimeoutError):  # noqa: UP041 - two classes in Python 3.10
            writer.write(answer(HTTPStatus.BAD_GATEWAY, b"The browser is not up.\n", close=True))
            return
        try:
            up_writer.write(head.raw)
            self._activity.count(Door.CDP, len(head.raw))
            await _either(
                self._client_to_browser(reader, up_writer, writer, http=not head.wants_websocket),
                _pump(up_reader, writer),
            )
        finally:
            await _close(up_writer)

    async def _client_to_browser(
        self, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter, writer: asyncio.StreamWriter, *, http: bool
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if http:
                if data.startswith(_STATUS_START):  # on a connection that a client keeps for all its requests
                    writer.write(await _status_answer(self._status, close=True))
                    await writer.drain()
                    return
                http = b"\r\nupgrade: websocket" not in data.lower()
            self._activity.touch()
            self._activity.count(Door.CDP, len(data))
            up_writer.write(data)
            await up_writer.drain()
        with contextlib.suppress(OSError):
            up_writer.write_eof()
        await asyncio.sleep(_BROWSER_WAIT_S)  # the browser closes its side, which ends us; if not, this does


class LiveDoor:
    """Serves the live view: a page, its scripts, and the VNC stream by WebSocket."""

    def __init__(self, *, activity: Activity, status: Status, www: Path, connect: Connect) -> None:
        self._activity = activity
        self._status = status
        self._www = www.resolve()
        self._connect = connect

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client, request by request, until it closes or turns to VNC."""
        try:
            while head := await read_head(reader):
                if head.wants_websocket:
                    await self._serve_vnc(head, reader, writer)
                    return
                status = head.path == STATUS_PATH
                writer.write(await _status_answer(self._status) if status else self._file(head))
                await writer.drain()
                if head.headers.get("connection", "").lower() == "close":
                    return
        except OSError:
            return
        finally:
            await _close(writer)

    def _file(self, head: Head) -> bytes:
        if head.method not in ("GET", "HEAD"):
            return answer(HTTPStatus.METHOD_NOT_ALLOWED, b"Only GET here.\n", close=True)
        name = unquote(head.path).lstrip("/") or "index.html"
        path = (self._www / name).resolve()
        if not path.is_relative_to(self._www) or not path.is_file():
            return answer(HTTPStatus.NOT_FOUND, b"Nothing here. The live view is at /.\n")
        kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(name)[0]
        response = answer(HTTPStatus.OK, path.read_bytes(), content_type=kind or "application/octet-stream")
        return response if head.method == "GET" else response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    async def _serve_vnc(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Browsers let any page open a WebSocket to any address, and send the page's origin along: only our own page
        # may steer this browser, not one that somebody, or the browser itself, happens to look at.
        origin = head.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != head.headers.get("host"):
            writer.write(answer(HTTPStatus.FORBIDDEN, b"This live view is for its own page only.\n", close=True))
            return
        key = head.headers.get("sec-websocket-key")
        if key is None:
            writer.write(answer(HTTPStatus.BAD_REQUEST, b"Not a WebSocket handshake.\n", close=True))
            return
        try:
            vnc_reader, vnc_writer = await self._connect()
        except OSError:
            writer.write(answer(HTTPStatus.BAD_GATEWAY, b"The screen is not up.\n", close=True))
            return
        offered = [name.strip() for name in head.headers.get("sec-websocket-protocol", "").split(",")]
        writer.write(websocket.handshake(key, protocol="binary" if "binary" in offered else None))
        try:
            with self._activity.connection(Door.LIVE):
                await _either(
                    self._viewer_to_screen(reader, writer, vnc_writer), self._screen_to_viewer(vnc_reader, writer)
                )
        finally:
            await _close(vnc_writer)

    async def _viewer_to_screen(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, vnc_writer: asyncio.StreamWriter
    ) -> None:
        person = InputReader()
        while (data := await websocket.read_payload(reader, writer)) is not None:
            self._activity.count(Door.LIVE, len(data))
            if person.feed(data):
                self._activity.touch()
            vnc_writer.write(data)
            await vnc_writer.drain()

    async def _screen_to_viewer(self, vnc_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await vnc_reader.read(_CHUNK_BYTES):
            writer.write(websocket.frame(data))
            await writer.drain()
