"""The browser image's agent, piece by piece, without a browser."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioner.browser_image import RECIPE, hash_recipe, read_recipe
from stacks.spec import SECCOMP_PROFILE

sys.path.insert(0, str(RECIPE))  # in the image the agent is an installed package

from machineuse_agent import websocket  # type: ignore[import-not-found,unused-ignore]
from machineuse_agent.activity import Activity, Door
from machineuse_agent.doors import CdpDoor, LiveDoor
from machineuse_agent.home import HomeSize, disk_bytes
from machineuse_agent.rfb import InputReader
from machineuse_agent.supervisor import chromium_command, pause_s, prepare_profile

GREETING = b"RFB 003.008\n" + b"\x01" + b"\x01"
SET_PIXEL_FORMAT = bytes([0]) + bytes(19)
SET_ENCODINGS = bytes([2, 0, 0, 3]) + bytes(12)
UPDATE_REQUEST = bytes([3, 1]) + bytes(8)
FENCE = bytes([248, 0, 0, 0]) + bytes(4) + bytes([4]) + b"\x04\x05\x06\x03"
CONTINUOUS_UPDATES = bytes([150, 1]) + bytes(8)
CLIPBOARD_CAPABILITIES = bytes([6, 0, 0, 0]) + (-8).to_bytes(4, "big", signed=True) + bytes([0x01, 0, 0, 1]) + bytes(4)
CHATTER = [SET_PIXEL_FORMAT, SET_ENCODINGS, UPDATE_REQUEST, FENCE, CONTINUOUS_UPDATES, CLIPBOARD_CAPABILITIES]

KEY = bytes([4, 1, 0, 0]) + b"\x00\x00\x00\x61"
POINTER = bytes([5, 1, 0, 100, 0, 100])
CUT_TEXT = bytes([6, 0, 0, 0]) + (3).to_bytes(4, "big") + b"abc"
CLIPBOARD_NOTIFY = bytes([6, 0, 0, 0]) + (-4).to_bytes(4, "big", signed=True) + bytes([0x08, 0, 0, 1])
QEMU_KEY = bytes([255, 0]) + bytes(10)
INPUT = [KEY, POINTER, CUT_TEXT, CLIPBOARD_NOTIFY, QEMU_KEY]


def in_pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


class TestInputReader:
    @given(st.lists(st.sampled_from(CHATTER)), st.lists(st.integers(1, 9)))
    def test_a_viewers_chatter_is_no_input_however_it_is_cut(self, messages: list[bytes], sizes: list[int]) -> None:
        reader = InputReader()
        assert not any(reader.feed(piece) for piece in in_pieces(GREETING + b"".join(messages), sizes))

    @given(st.lists(st.sampled_from(CHATTER)), st.sampled_from(INPUT), st.lists(st.integers(1, 9)))
    def test_a_persons_input_is_seen_however_it_is_cut(
        self, messages: list[bytes], touch: bytes, sizes: list[int]
    ) -> None:
        reader = InputReader()
        pieces = in_pieces(GREETING + b"".join(messages) + touch, sizes)
        assert [reader.feed(piece) for piece in pieces].count(True) == 1

    def test_chatter_after_input_is_chatter(self) -> None:
        reader = InputReader()
        assert reader.feed(GREETING + KEY + UPDATE_REQUEST)
        assert not reader.feed(UPDATE_REQUEST + FENCE)

    def test_after_an_unknown_message_everything_counts(self) -> None:
        reader = InputReader()
        assert reader.feed(GREETING + bytes([99]))
        assert reader.feed(UPDATE_REQUEST)


class TestWebSocket:
    def test_accept_key_is_the_standards_example(self) -> None:
        assert websocket.accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

    @given(st.binary(max_size=200), st.binary(min_size=4, max_size=4))
    def test_masking_twice_changes_nothing(self, payload: bytes, mask: bytes) -> None:
        assert websocket.unmask(websocket.unmask(payload, mask), mask) == payload

    @pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
    def test_frames_of_all_lengths_are_read_back(self, size: int) -> None:
        payload = os.urandom(size)
        assert run_reader(masked(payload)) == payload

    def test_a_ping_is_answered_and_is_no_data(self) -> None:
        sent: list[bytes] = []
        assert run_reader(masked(b"hi", opcode=0x9) + masked(b"data"), sent=sent) == b"data"
        assert sent == [websocket.frame(b"hi", opcode=0xA)]

    def test_a_close_ends_it(self) -> None:
        assert run_reader(masked(b"\x03\xe8", opcode=0x8)) is None

    def test_an_unmasked_frame_is_refused(self) -> None:
        with pytest.raises(websocket.ProtocolError):
            run_reader(websocket.frame(b"x"))


def masked(payload: bytes, *, opcode: int = 0x2) -> bytes:
    frame = bytearray(websocket.frame(payload, opcode=opcode))
    frame[1] |= 0x80
    head = len(frame) - len(payload)
    mask = b"\x01\x02\x03\x04"
    return bytes(frame[:head]) + mask + websocket.unmask(payload, mask)


class Sink:
    def __init__(self, sent: list[bytes]) -> None:
        self.sent = sent

    def write(self, data: bytes) -> None:
        self.sent.append(data)


def run_reader(data: bytes, *, sent: list[bytes] | None = None) -> bytes | None:
    async def read() -> bytes | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        payload: bytes | None = await websocket.read_payload(reader, Sink(sent if sent is not None else []))
        return payload

    return asyncio.run(read())


class TestActivity:
    def test_idleness_counts_from_the_start_until_somebody_comes(self) -> None:
        now = 100.0
        activity = Activity(clock=lambda: now)
        now = 130.0
        assert activity.idle_s == 30
        with activity.connection(Door.CDP):
            assert activity.idle_s == 0
            now = 140.0
        assert activity.idle_s == 10, "leaving is not activity"
        assert activity.connections[Door.CDP] == 0


async def answer_status() -> dict[str, object]:
    return {"ready": True}


class Upstream:
    """Stands in for Chromium or for Xvnc: notes what it gets, answers each piece with `reply`."""

    def __init__(self, reply: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") -> None:
        self.reply = reply
        self.got = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.got += data
            writer.write(self.reply)
        writer.close()


@asynccontextmanager
async def served(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port)

    async with server:
        yield connect


STATUS_REQUEST = b"GET /machineuse/status HTTP/1.1\r\nHost: x\r\n\r\n"
VERSION_REQUEST = b"GET /json/version HTTP/1.1\r\nHost: x\r\n\r\n"


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    return head, await asyncio.wait_for(reader.readexactly(length), 5)


class TestCdpDoor:
    def serve(
        self, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> tuple[Activity, Upstream]:
        now = iter(range(1_000_000))
        activity = Activity(clock=lambda: float(next(now)))
        upstream = Upstream()

        async def run() -> None:
            up = asyncio.Event()
            up.set()
            async with served(upstream.serve) as connect:
                door = CdpDoor(activity=activity, status=answer_status, browser_up=up, connect=connect)
                async with served(door.serve) as to_door:
                    reader, writer = await to_door()
                    await talk(reader, writer)
                    writer.close()

        asyncio.run(run())
        return activity, upstream

    def test_status_is_answered_again_and_again_and_is_no_activity(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(3):
                writer.write(STATUS_REQUEST)
                _, body = await read_answer(reader)
                assert json.loads(body) == {"ready": True}

        activity, upstream = self.serve(talk)
        assert activity.last == activity.started
        assert upstream.got == b""

    def test_everything_else_goes_to_the_browser_and_counts(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(VERSION_REQUEST)
            assert (await read_answer(reader))[1] == b"ok"

        activity, upstream = self.serve(talk)
        assert upstream.got == VERSION_REQUEST
        assert activity.last > activity.started
        assert activity.client_bytes[Door.CDP] == len(VERSION_REQUEST)

    def test_status_on_a_connection_that_was_handed_through_is_still_ours(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(VERSION_REQUEST)
            await read_answer(reader)
            writer.write(STATUS_REQUEST)
            head, body = await read_answer(reader)
            assert json.loads(body) == {"ready": True}
            assert b"Connection: close" in head

        _, upstream = self.serve(talk)
        assert upstream.got == VERSION_REQUEST

    def test_a_connection_that_says_nothing_is_no_activity(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write_eof()
            assert await reader.read() == b""

        activity, _ = self.serve(talk)
        assert activity.last == activity.started

    def test_all_is_closed_behind_a_client_that_leaves(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(VERSION_REQUEST)
            await read_answer(reader)
            writer.close()
            await writer.wait_closed()

        activity, _ = self.serve(talk)
        assert activity.connections[Door.CDP] == 0


class TestLiveDoor:
    def request(self, head: bytes, *, www: Path) -> tuple[bytes, Activity]:
        activity = Activity()

        async def run() -> bytes:
            async with served(Upstream(b"RFB 003.008\n").serve) as connect:
                door = LiveDoor(activity=activity, status=answer_status, www=www, connect=connect)
                async with served(door.serve) as to_door:
                    reader, writer = await to_door()
                    writer.write(head)
                    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                    writer.close()
                    return answer

        return asyncio.run(run()), activity

    def upgrade(self, *, origin: str, host: str = "localhost:6080") -> bytes:
        lines = [
            "GET /websockify HTTP/1.1",
            f"Host: {host}",
            f"Origin: {origin}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Protocol: binary",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def test_the_page_is_at_the_root(self, tmp_path: Path) -> None:
        (tmp_path / "index.html").write_text("live")
        answer, activity = self.request(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", www=tmp_path)
        assert b"200 OK" in answer
        assert b"text/html" in answer
        assert activity.last == activity.started, "looking at the page's files is not use"

    @pytest.mark.parametrize("path", ["/../secret", "/%2e%2e/secret", "//etc/passwd", "/missing", "/folder"])
    def test_nothing_but_the_pages_files_is_served(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "secret").write_text("no")
        (tmp_path / "www" / "folder").mkdir(parents=True)
        answer, _ = self.request(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), www=tmp_path / "www")
        assert b"404" in answer

    def test_our_own_page_may_steer(self, tmp_path: Path) -> None:
        answer, activity = self.request(self.upgrade(origin="http://localhost:6080"), www=tmp_path)
        assert b"101 Switching Protocols" in answer
        assert activity.last > activity.started

    def test_another_page_may_not_steer(self, tmp_path: Path) -> None:
        answer, activity = self.request(self.upgrade(origin="http://elsewhere.example"), www=tmp_path)
        assert b"403" in answer
        assert activity.last == activity.started


class TestSupervision:
    def test_the_sandbox_is_never_switched_off(self) -> None:
        command = chromium_command(home=Path("/home/machine"), restore_tabs=True)
        assert not [flag for flag in command if "sandbox" in flag]

    def test_the_first_death_costs_no_pause_and_a_crash_loop_slows_down(self) -> None:
        assert pause_s(3600, 1) == 0
        assert pause_s(0.1, 1) == 0
        pauses = [pause_s(0.1, deaths) for deaths in range(2, 20)]
        assert pauses == sorted(pauses)
        assert pauses[0] < 1
        assert pauses[-1] == 10

    def test_stale_locks_go_and_settings_stay(self, tmp_path: Path) -> None:
        (tmp_path / "SingletonLock").symlink_to("another-host-123")
        prepare_profile(tmp_path)
        assert not (tmp_path / "SingletonLock").is_symlink()
        preferences = tmp_path / "Default" / "Preferences"
        preferences.write_text("{}")
        prepare_profile(tmp_path)
        assert preferences.read_text() == "{}"


class TestHomeSize:
    def test_counts_what_files_take_on_disk(self, tmp_path: Path) -> None:
        before = disk_bytes(str(tmp_path))
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_bytes(b"x" * 100_000)
        assert disk_bytes(str(tmp_path)) - before >= 100_000

    def test_is_not_walked_more_often_than_it_may(self, tmp_path: Path) -> None:
        now = 0.0
        size = HomeSize(tmp_path, max_age_s=15, clock=lambda: now)

        async def run() -> None:
            nonlocal now
            first = await size.read()
            (tmp_path / "file").write_bytes(b"x" * 100_000)
            assert await size.read() == first
            now = 15.0
            await size.read()  # begins the walk, doesn't wait for it
            while await size.read() == first:
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(run(), 10))


class TestRecipe:
    def test_the_hash_depends_on_names_and_contents_only(self) -> None:
        assert hash_recipe({"a": b"1", "b": b"2"}) == hash_recipe({"b": b"2", "a": b"1"})
        assert hash_recipe({"a": b"1"}) != hash_recipe({"a": b"2"})
        assert hash_recipe({"a": b"1"}) != hash_recipe({"b": b"1"})

    def test_what_is_no_part_of_the_image_does_not_rebuild_it(self) -> None:
        files = read_recipe()
        assert "Dockerfile" in files
        assert "seccomp.json" not in files
        assert not [name for name in files if "__pycache__" in name]

    def test_the_seccomp_profile_is_small_because_every_instance_carries_it(self) -> None:
        assert SECCOMP_PROFILE.stat().st_size < 5 * 1024
        profile = json.loads(SECCOMP_PROFILE.read_text())
        allowed = {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
        assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
        assert {"clone", "unshare", "setns", "chroot"} <= allowed
        assert not {"mount", "bpf", "reboot", "init_module", "keyctl", "io_uring_setup"} & allowed
