"""How much the home directory holds: walked in a thread, and not more often than every few seconds."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path


def disk_bytes(root: str) -> int:
    """Return the bytes that a directory's files take on disk; what goes away meanwhile counts nothing."""
    total = 0
    pending = [root]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except OSError:
            continue
        with entries:
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                except OSError:
                    continue
    return total


class HomeSize:
    """The home's size as of at most `max_age_s` ago, once the first walk is done."""

    def __init__(self, home: Path, *, max_age_s: float = 15, clock: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self._max_age_s = max_age_s
        self._clock = clock
        self._bytes = 0
        self._walked: float | None = None
        self._walk: asyncio.Task[None] | None = None

    async def read(self) -> int:
        """Return the size in bytes: at once, but for the first call, which waits for the first walk."""
        stale = self._walked is None or self._clock() - self._walked >= self._max_age_s
        if stale and (self._walk is None or self._walk.done()):
            self._walk = asyncio.create_task(self._measure())
        if self._walked is None and self._walk is not None:
            await asyncio.shield(self._walk)
        return self._bytes

    async def _measure(self) -> None:
        self._bytes = await asyncio.to_thread(disk_bytes, str(self._home))
        self._walked = self._clock()
