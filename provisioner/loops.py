"""Runs a step again and again in a thread of its own, until it is stopped.

The one place where a background failure ends: whatever a step raises is logged, and the next step runs as if nothing
had happened. Steps must therefore be level-triggered: each looks at the world anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from provisioner.errors import MachineuseError

log = structlog.get_logger(__name__)


class Loop:
    """A named thread that calls `step()` every `every_s` seconds; a step that takes longer delays the next one."""

    def __init__(self, name: str, step: Callable[[], object], *, every_s: float) -> None:
        self.name = name
        self._step = step
        self._every_s = every_s
        self._may_run: Callable[[], bool] = lambda: True
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def only_while(self, may_run: Callable[[], bool]) -> None:
        """Pass over every step for which `may_run` says no."""
        self._may_run = may_run

    def start(self) -> None:
        """Start the thread; the first step runs at once."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name=f"machineuse-{self.name}", daemon=True)
        self._thread.start()

    def end_soon(self) -> None:
        """Ask the thread to end, without waiting: so that several loops end side by side."""
        self._stopping.set()

    def stop(self, *, timeout_s: float = 5.0) -> bool:
        """Ask the thread to end and wait for it; return whether it ended in time. A step under way is not cut off."""
        self.end_soon()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                if self._may_run():
                    self._step()
                failures = 0
            except MachineuseError as error:
                failures += 1
                log.warning("step failed", loop=self.name, failures=failures, error=error.message, detail=error.detail)
            except Exception as error:  # the outermost frame of the thread: it must survive anything
                failures += 1
                log.error("step failed", loop=self.name, failures=failures, error=str(error), exc_info=error)
            self._stopping.wait(max(self._every_s - (time.monotonic() - began), 0.0))
