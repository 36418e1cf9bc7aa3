"""Tells who waits that an instance changed: from any thread, to any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

RECHECK_S = 1.0
"""A waiter looks at the ledger at least this often, so a change made by another process is seen too."""


class Changes:
    """Waiters of all instances, and the converger's wake-up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self.work = threading.Event()
        """Set when there may be something for the converger to do."""

    def notify(self, instance_id: str) -> None:
        """Wake everybody who waits for this instance."""
        with self._lock:
            waiters = list(self._waiters.get(instance_id, ()))
        for loop, event in waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)

    def notify_all(self) -> None:
        """Wake everybody who waits for anything."""
        with self._lock:
            waited_for = list(self._waiters)
        for instance_id in waited_for:
            self.notify(instance_id)

    @contextlib.contextmanager
    def subscribe(self, instance_id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever the instance changes; its reader clears it."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiters.setdefault(instance_id, set()).add(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                waiters = self._waiters.get(instance_id, set())
                waiters.discard(entry)
                if not waiters:
                    self._waiters.pop(instance_id, None)
