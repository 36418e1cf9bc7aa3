"""When something that did not work is tried again: later each time."""

from __future__ import annotations

import time


class Retry:
    """The next try of one thing; used by one thread."""

    def __init__(self, *, first_s: float, longest_s: float) -> None:
        """Wait `first_s` after the first failure, twice as long after each that follows, never above `longest_s`."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._at = 0.0
        self._pause_s = first_s

    def is_due(self) -> bool:
        """Say whether it may be tried now."""
        return time.monotonic() >= self._at

    def put_off(self) -> None:
        """Take it for failed."""
        self._at = time.monotonic() + self._pause_s
        self._pause_s = min(self._pause_s * 2, self._longest_s)

    def forget(self) -> None:
        """Take it for done: the next try may be made at once."""
        self._at, self._pause_s = 0.0, self._first_s
