"""What becomes of an engine's words, and of its silence."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from provisioner.docker_hosts.containers import remove_container, stop_container
from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.docker_hosts.images import pull_image
from provisioner.errors import (
    DockerError,
    DockerNotFound,
    InvalidRequest,
    NodeUnreachable,
    PortTaken,
    UnknownImage,
)

Answers = dict[str, tuple[int, str]]
"""Path's end → status and message."""


@contextmanager
def engine(answers: Answers) -> Iterator[DockerHost]:
    """Serve an engine that answers so, and 200 to everything else."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, body = next(
                (answers[end] for end in answers if path.endswith(end)), (200, '{"ApiVersion": "1.41"}')
            )
            content = body.encode() if status == 200 else f'{{"message": "{body}"}}'.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(BrokenPipeError):  # whoever asked may have given up
                self.wfile.write(content)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = DockerHost(f"tcp://127.0.0.1:{server.server_port}", timeout_s=2)
    try:
        yield host
    finally:
        host.close()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "words", "expected"),
    [
        (404, "No such container: x", DockerNotFound),
        (500, "driver failed: Bind for 127.0.0.1:21500 failed: port is already allocated", PortTaken),
        (500, "listen tcp4 127.0.0.1:21500: bind: address already in use", PortTaken),
        (500, "no space left on device", DockerError),
        (409, "The name is taken", DockerError),
    ],
)
def test_an_engines_refusal_becomes_our_error_with_its_words_in_the_detail(
    status: int, words: str, expected: type[DockerError]
) -> None:
    with engine({"/containers/x/start": (status, words)}) as host, pytest.raises(DockerError) as caught:
        host.call("start container x", host.api.start, "x")
    assert type(caught.value) is expected
    assert caught.value.detail == words
    assert "start container x" in caught.value.message


def test_our_own_errors_pass_unchanged() -> None:
    error = InvalidRequest("no")
    with pytest.raises(InvalidRequest) as caught, DockerHost("unix:///nowhere").errors("try"):
        raise error
    assert caught.value is error


def test_a_bug_is_not_taken_for_a_silent_engine() -> None:
    with pytest.raises(ZeroDivisionError), DockerHost("unix:///nowhere").errors("try"):
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), DockerHost("unix:///nowhere").errors("read a local file"):
        Path("/nowhere").read_text()


@pytest.mark.parametrize("url", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:1"])
def test_an_engine_that_is_not_there_is_an_unreachable_node(url: str) -> None:
    host = DockerHost(url, timeout_s=0.2)
    with pytest.raises(NodeUnreachable, match="does not answer"):
        host.ping()
    with pytest.raises(NodeUnreachable):
        stop_container(host, "x", timeout_s=10)


def test_an_engine_that_accepts_and_says_nothing_is_unreachable_after_the_quick_timeout(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(NodeUnreachable):
            stop_container(DockerHost(f"unix://{path}", timeout_s=0.2, slow_timeout_s=600), "x", timeout_s=10)


def test_an_engine_that_freezes_in_the_middle_of_a_piece_of_work_costs_the_limit_for_work_not_for_data() -> None:
    frozen = threading.Event()

    class Freezing(dict[str, tuple[int, str]]):
        def __iter__(self) -> Iterator[str]:
            if frozen.is_set():
                threading.Event().wait(5)  # longer than the limit for work, and bounded
            return super().__iter__()

    with engine(Freezing()) as answering:
        host = DockerHost(answering.url, timeout_s=2, work_timeout_s=0.2, slow_timeout_s=600)
        host.ping()
        host.check_alive()
        api = host.work_api
        frozen.set()
        with pytest.raises(NodeUnreachable):
            host.call("start x", api.start, "x")


def test_work_in_several_parts_waits_for_a_silent_engine_only_once(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        host = DockerHost(f"unix://{path}", timeout_s=0.2, slow_timeout_s=600)
        with pytest.raises(NodeUnreachable):
            host.slow_api.start("x")
    path.unlink()
    with engine({}) as other:
        host.url = other.url  # it is back, but was not asked for a sign of life yet
        with pytest.raises(NodeUnreachable) as caught:
            host.slow_api.start("x")
        assert "a moment ago" in (caught.value.detail or "")
        host.ping()
        host.slow_api.start("x")


def test_a_host_comes_back_without_being_made_anew() -> None:
    answers: Answers = {"/_ping": (500, "starting")}
    with engine(answers) as host:
        with pytest.raises(DockerError):
            host.ping()
        answers["/_ping"] = (200, "OK")
        host.ping()
        host.check_alive()
        assert host.api is host.api
        assert host.slow_api is not host.api
        assert host.slow_api.timeout > host.api.timeout


def test_removing_what_is_gone_is_a_success() -> None:
    with engine({"/containers/x": (404, "No such container: x")}) as host:
        remove_container(host, "x", kill=True)


def test_removing_what_is_being_removed_waits_for_it() -> None:
    answers: Answers = {
        "/containers/x": (409, "removal of container x is already in progress"),
        "/containers/x/json": (200, "{}"),
    }
    with engine(answers) as host, ThreadPoolExecutor() as pool:
        removal = pool.submit(remove_container, host, "x", kill=True)
        assert not wait([removal], timeout=0.5).done
        answers["/containers/x/json"] = (404, "No such container: x")
        removal.result(timeout=10)


def test_a_registrys_refusal_is_an_unknown_image() -> None:
    refusal = '{"error": "manifest unknown", "errorDetail": {"message": "manifest unknown"}}'
    with engine({"/images/create": (200, refusal)}) as host, pytest.raises(UnknownImage, match="manifest unknown"):
        pull_image(host, "x:1")
    with engine({"/images/create": (404, "pull access denied")}) as host, pytest.raises(UnknownImage):
        pull_image(host, "x:1")


def test_hosts_are_shared_by_url() -> None:
    hosts = DockerHosts(timeout_s=3)
    assert hosts.get("unix:///a") is hosts.get("unix:///a")
    assert hosts.get("unix:///a") is not hosts.get("unix:///b")
    assert hosts.get("unix:///a").timeout_s == 3
