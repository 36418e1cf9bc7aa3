"""Asking agents: ours, others', and none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from provisioner.browser_status import BrowserStatus, BrowserStatusClient, agent_url, ask_all
from stacks.spec import NodeSpec
from tests.support.service import free_port

OURS = json.dumps({"ready": True, "last_activity_s": 1.5, "home_bytes": 7, "uptime_s": 3}).encode()


@contextmanager
def serve(pages: dict[str, bytes]) -> Iterator[str]:
    """Serve these pages on loopback; anything else is 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_our_agent_tells_everything() -> None:
    with serve({"/machineuse/status": OURS}) as url:
        answer = ask_all({"it": url})["it"]
    assert answer == BrowserStatus(ready=True, last_activity_s=1.5, counts_activity=True, home_bytes=7)


def test_another_image_tells_only_whether_its_browser_answers() -> None:
    with serve({"/json/version": b"{}"}) as url:
        assert ask_all({"it": url}) == {"it": BrowserStatus(ready=True)}
    with serve({}) as url:
        assert ask_all({"it": url}) == {"it": BrowserStatus(ready=False)}


@pytest.mark.parametrize(
    "body",
    [b"hello", b"[]", b'{"ready": true, "last_activity_s": NaN}', b'{"ready": true, "home_bytes": -1}', b"x" * 200_000],
)
def test_an_answer_that_makes_no_sense_is_not_our_agent_s(body: bytes) -> None:
    with serve({"/machineuse/status": body, "/json/version": b"{}"}) as url:
        assert ask_all({"it": url}) == {"it": BrowserStatus(ready=True)}


def test_who_does_not_answer_is_left_out() -> None:
    with serve({"/machineuse/status": OURS}) as url:
        answers = ask_all({"up": url, "down": f"http://127.0.0.1:{free_port()}"})
    assert answers.keys() == {"up"}
    assert ask_all({}) == {}


def test_an_agent_that_hangs_costs_a_bounded_time() -> None:
    async def ask() -> BrowserStatus | None:
        hanging = asyncio.Event()

        async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await hanging.wait()
            writer.close()

        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, BrowserStatusClient(timeout_s=0.1) as client:
            answer = await client.ask(f"http://127.0.0.1:{port}")
            hanging.set()
        return answer

    assert asyncio.run(ask()) is None


@pytest.mark.parametrize(
    ("node", "url"),
    [
        (NodeSpec(id="n"), "http://127.0.0.1:21000"),
        (NodeSpec(id="n", bind_ip="127.0.0.2"), "http://127.0.0.2:21000"),
        (NodeSpec(id="n", bind_ip="0.0.0.0"), "http://127.0.0.1:21000"),
        (NodeSpec(id="n", bind_ip="::"), "http://[::1]:21000"),
        (NodeSpec(id="n", host="ssh://root@far", address="far.example"), "http://far.example:21000"),
    ],
)
def test_a_browser_is_asked_where_its_node_binds_it_or_is_reached(node: NodeSpec, url: str) -> None:
    assert agent_url(node, debug_port=21000) == url
