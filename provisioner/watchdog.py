"""Ends the CLI when the lease that it runs under is over, even if the process that started it is frozen.

A process of its own, because a process that is stopped or starved can't end anything. It is told on its standard input
until when the lease lasts and which CLI runs; at the end of the lease, or of its input, it kills that CLI.

The script imports the standard library only, so that it starts in no time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time


def clock() -> float:
    """Return seconds by a clock that all processes share, that is never set, and that goes on in a machine's sleep."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Watchdog:
    """The process, seen from the one that it watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._pid: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def extend(self, until: float) -> None:
        """Say until when, by `clock`, the lease lasts."""
        with self._lock:
            self._until = until
            self._tell(f"until {until}")

    def watch(self, pid: int | None) -> None:
        """Say which CLI runs now; None when it has ended."""
        with self._lock:
            self._pid = pid
            self._tell(f"pid {pid or 0}")

    def close(self) -> None:
        """End the process, and with it the CLI, if one still runs."""
        with self._lock:
            if self._process is None:
                return
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._write(line)
                return
        # The first time, or somebody has killed it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True
        )
        self._write(f"until {self._until}\npid {self._pid or 0}")

    def _write(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()


def main() -> None:
    """Watch until the input ends."""
    until = 0.0
    watched: int | None = None  # a handle and no number, which might be another process's by then
    pending = b""
    while True:
        timeout_s = None if watched is None else max(until - clock(), 0.0)
        if select.select([0], [], [], timeout_s)[0]:
            read = os.read(0, 65536)
            if not read:
                break
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                word, value = line.split()
                if word == b"until":
                    until = float(value)
                    continue
                if watched is not None:
                    os.close(watched)
                watched = _open(int(value))
        if watched is not None and clock() >= until:
            _kill(watched)
            os.close(watched)
            watched = None
    if watched is not None:
        _kill(watched)


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid) if pid else None
    except ProcessLookupError:
        return None


def _kill(handle: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)


if __name__ == "__main__":
    main()
