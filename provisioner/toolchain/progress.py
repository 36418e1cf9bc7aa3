"""Tells a person what set-up is doing: one line a step with its time, and a sign of life from a step that takes long.

On a terminal a step that lasts shows a spinner, the seconds so far and the last line of what runs (by rich, which is
not there yet while the very first step installs it; then the line is drawn plainly). Elsewhere, in CI or a log, there
is a line every ten seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from provisioner.errors import SetupError

_SHOW_AFTER_S = 1.0
_REDRAW_S = 0.1
_LINE_EVERY_S = 10.0
_TAIL_LINES = 40
_WIDTH = 100
_TURNS = "|/-\\"


@dataclass(frozen=True)
class StepResult:
    """One finished step of the set-up."""

    title: str
    outcome: str
    duration_s: float


class Step:
    """A step under way; what a step's function talks to."""

    def __init__(self, title: str, *, write: Callable[[str], None]) -> None:
        self.title = title
        self.outcome = "ready"
        self.last_line = ""
        """What the thing that runs said last."""
        self._write = write

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.last_line = ""
        self._write(f"  · {text}")

    def on_progress(self, text: str) -> None:
        """Take the latest sign of life; it is shown for as long as it is the latest."""
        lines = text.split("\n")
        self.last_line = next((line.strip()[:_WIDTH] for line in reversed(lines) if line.strip()), "")

    def run(
        self,
        command: Sequence[str],
        *,
        what: str,
        timeout_s: float,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        count: str | None = None,
    ) -> None:
        """Run a command and show its last line, or how many lines of `count` it has printed.

        Raises SetupError, with the end of what it printed as detail, when it fails or takes longer than `timeout_s`
        seconds. The command and everything it started are ended then, and when we are interrupted.
        """
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise SetupError(f"{what} could not be started.", detail=str(error)) from error
        timed_out = threading.Event()

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def time_out() -> None:
            timed_out.set()
            end()

        timer = threading.Timer(timeout_s, time_out)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            for number, line in enumerate(process.stdout, start=1):
                tail.append(line.rstrip())
                self.on_progress(f"{what}: {number} {count}, {line.strip()}" if count else line)
            code = process.wait()
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
        printed = "\n".join(tail)
        if timed_out.is_set():
            raise SetupError(f"{what} took longer than {timeout_s:.0f} seconds.", detail=printed)
        if code != 0:
            raise SetupError(f"{what} failed with exit code {code}.", detail=printed)


class Reporter:
    """Runs steps one after another and prints what becomes of each."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._lock = threading.Lock()
        self._drawing: _Spinner | None = None
        self.results: list[StepResult] = []

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Time the block, keep its reader posted, and print how it ended."""
        step = Step(title, write=self._write)
        started = time.monotonic()
        stopped = threading.Event()
        ticker = threading.Thread(target=self._keep_posted, args=(step, started, stopped), daemon=True)
        ticker.start()
        mark = "✗"
        try:
            yield step
            mark = "✓"
        except BaseException:
            step.outcome = "failed"
            raise
        finally:
            stopped.set()
            ticker.join()
            duration_s = time.monotonic() - started
            self._write(f"{mark} {title}: {step.outcome} ({duration_s:.1f} s)")
        self.results.append(StepResult(title, step.outcome, duration_s))

    def _keep_posted(self, step: Step, started: float, stopped: threading.Event) -> None:
        on_terminal = self._stream.isatty()
        if stopped.wait(_SHOW_AFTER_S if on_terminal else _LINE_EVERY_S):
            return
        if not on_terminal:
            while not stopped.is_set():
                self._write(f"  … {_describe(step, started)}")
                stopped.wait(_LINE_EVERY_S)
            return
        with self._lock:
            self._drawing = _new_spinner(self._stream)
        while not stopped.wait(_REDRAW_S):
            with self._lock:
                self._drawing.draw(_describe(step, started))
        with self._lock:
            self._drawing.erase()
            self._drawing = None

    def _write(self, line: str) -> None:
        with self._lock:
            if self._drawing is not None:
                self._drawing.erase()
            self._stream.write(line + "\n")
            self._stream.flush()


def _describe(step: Step, started: float) -> str:
    elapsed_s = int(time.monotonic() - started)
    elapsed = f"{elapsed_s // 60}:{elapsed_s % 60:02}"
    return f"{step.title} {elapsed}{'  ' if step.last_line else ''}{step.last_line}"


class _Spinner:
    """One line at the bottom of a terminal, drawn with nothing but the standard library."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._turn = 0

    def draw(self, text: str) -> None:
        width = max(20, _terminal_width(self._stream) - 3)
        self._stream.write(f"\r\x1b[2K{_TURNS[self._turn % 4]} {text[:width]}")
        self._stream.flush()
        self._turn += 1

    def erase(self) -> None:
        self._stream.write("\r\x1b[2K")
        self._stream.flush()


class _RichSpinner(_Spinner):
    """The same line, drawn by rich."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.status import Status

        self._console = Console(file=stream, highlight=False)
        self._status = Status("", console=self._console)

    def draw(self, text: str) -> None:
        from rich.markup import escape

        self._status.start()  # does nothing when it is drawn already
        self._status.update(escape(text[: max(20, self._console.width - 3)]))

    def erase(self) -> None:
        self._status.stop()


def _new_spinner(stream: TextIO) -> _Spinner:
    try:
        return _RichSpinner(stream)
    except ImportError:
        return _Spinner(stream)


def _terminal_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80
