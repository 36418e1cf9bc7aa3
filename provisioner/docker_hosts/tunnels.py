"""Engines behind SSH: one `ssh` process a node, that makes the engine's socket a private socket of this machine.

Docker's own way runs `docker system dial-stdio` on the node for every connection: slow, and deaf to time limits. A
tunnel instead is opened once, at first use, and opened again when it has died; over it, docker-py talks to a plain Unix
socket. `ssh` asks nobody anything: it takes a host whose key it knows and a key without a password, or fails.

A thread waits for each process, for as long as that lives. It also starts it: a process may only be told to end with
the thread that started it, and so none outlives ours.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import structlog

from provisioner.docker_hosts.endpoints import Endpoint, explain_silence
from provisioner.errors import NodeUnreachable

log = structlog.get_logger(__name__)

POLL_S = 0.01
SILENT_FOR_S = 2.0
"""How long a tunnel that could not be opened is not tried again."""
SAID_S = 0.3
"""How long to wait for what `ssh` says of a connection that it has closed."""
LINES_KEPT = 20


class Tunnel:
    """The tunnel to one engine; used by many threads."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float, directory: Path) -> None:
        """Open nothing yet; relative paths in `ssh_opts` are relative to `directory`."""
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._cwd = directory
        self._directory = tempfile.TemporaryDirectory(prefix="machineuse-ssh-", ignore_cleanup_errors=True)
        self._socket = Path(self._directory.name) / "docker.sock"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._said: deque[str] = deque(maxlen=LINES_KEPT)
        self._failure: tuple[float, NodeUnreachable] | None = None

    @property
    def url(self) -> str:
        """Return where the engine can be talked to while the tunnel is open."""
        return f"unix://{self._socket}"

    def open(self) -> None:
        """Return once the tunnel is open; raise NodeUnreachable, within the time limit, when it can't be."""
        if self._is_open():
            return
        with self._lock:
            if self._is_open():
                return
            if self._failure is not None and time.monotonic() - self._failure[0] < SILENT_FOR_S:
                raise self._failure[1]
            try:
                self._start()
            except NodeUnreachable as error:
                self._failure = (time.monotonic(), error)
                raise
            self._failure = None

    def explain(self) -> str:
        """Return what `ssh` says of a connection that has just broken; "" when it says nothing."""
        deadline = time.monotonic() + SAID_S
        while time.monotonic() < deadline:
            if self._said:
                return self._words()
            time.sleep(POLL_S)
        return ""

    def close(self) -> None:
        """End the process; the next `open` starts another. Idempotent."""
        with self._lock:
            self._end()

    def _is_open(self) -> bool:
        process = self._process
        return process is not None and process.poll() is None and self._socket.exists()

    def _start(self) -> None:
        self._end()
        self._said.clear()
        started = threading.Event()
        threading.Thread(
            target=self._run, args=(self._command(), started), name="machineuse-tunnel", daemon=True
        ).start()
        started.wait()
        deadline = time.monotonic() + self._timeout_s
        while not self._is_open():
            process = self._process
            if process is None or process.poll() is not None:
                time.sleep(POLL_S)  # its last words
                raise self._error(self._words() or "ssh ended")
            if time.monotonic() > deadline:
                self._end()
                raise self._error(self._words() or f"ssh did not get through within {self._timeout_s:g} s")
            time.sleep(POLL_S)
        log.debug("tunnel opened", engine=self._endpoint.url)

    def _run(self, command: list[str], started: threading.Event) -> None:
        """Start the process, read what it says, and wait for its end."""
        try:
            process = subprocess.Popen(
                command,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            self._said.append(f"{command[0]} could not be started: {error}")
            started.set()
            return
        self._process = process
        started.set()
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._said.append(line.strip())
        process.wait()

    def _command(self) -> list[str]:
        seconds = max(1, math.ceil(self._timeout_s))
        endpoint = self._endpoint
        end_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": seconds,
            "ConnectionAttempts": 1,
            "ControlMaster": "no",
            "ControlPath": "none",
            "ExitOnForwardFailure": "yes",
            "LogLevel": "INFO",  # tells of connections that the other side refuses
            "ServerAliveCountMax": 3,
            "ServerAliveInterval": seconds,
            "StreamLocalBindUnlink": "yes",
        }
        return [
            *end_with_us,
            *("ssh", "-N", "-T"),
            *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
            *endpoint.ssh_opts,
            *("-o", "StrictHostKeyChecking=yes"),  # ssh takes what it is told first: the node's options go before
            *("-L", f"{self._socket}:{endpoint.remote_socket}"),
            *(("-p", str(endpoint.ssh_port)) if endpoint.ssh_port else ()),
            *("--", endpoint.login),
        ]

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        self._socket.unlink(missing_ok=True)

    def _words(self) -> str:
        return " ".join(" ".join(list(self._said)).split())

    def _error(self, words: str) -> NodeUnreachable:
        return explain_silence(self._endpoint.url, detail=words, what="open a tunnel")
