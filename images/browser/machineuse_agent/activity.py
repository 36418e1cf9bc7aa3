"""Who uses the browser, and when somebody last did: what the status answer and idleness rest on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum


class Door(Enum):
    """The two ways in; the values are the status answer's words."""

    CDP = "cdp"
    LIVE = "live"


class Activity:
    """Counts open connections by door and remembers when a client last did something."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.started = clock()
        self.last = self.started
        self.connections = dict.fromkeys(Door, 0)
        self.client_bytes = dict.fromkeys(Door, 0)

    def touch(self) -> None:
        """Note that a client did something just now."""
        self.last = self._clock()

    def count(self, door: Door, n_bytes: int) -> None:
        """Note bytes that a client sent, whether or not they mean that somebody is there."""
        self.client_bytes[door] += n_bytes

    @contextmanager
    def connection(self, door: Door) -> Iterator[None]:
        """Count one open connection; opening it is activity, closing it isn't."""
        self.touch()
        self.connections[door] += 1
        try:
            yield
        finally:
            self.connections[door] -= 1

    @property
    def idle_s(self) -> float:
        """Return the seconds since a client last did something, or since the start if none ever did."""
        return self._clock() - self.last

    @property
    def uptime_s(self) -> float:
        """Return the seconds since this agent started."""
        return self._clock() - self.started
