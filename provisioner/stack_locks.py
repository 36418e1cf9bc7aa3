"""The locks that a CLI takes on a stack's state: which there are, and whose may be removed.

The CLI's own words are read, because they are the same wherever the state is kept.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

CLOCK_SLACK_S = 5.0
"""How exactly the time of a lock and that of a process's start can be compared."""

_LINE = re.compile(r"^\s+(?P<url>\S+): created by .*@(?P<host>\S+) \(pid (?P<pid>\d+)\) at (?P<at>\S+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class StackLock:
    """One lock."""

    url: str
    host: str
    pid: int
    taken_at: float

    @property
    def path(self) -> Path:
        """Return the lock's file, where the state is kept in files."""
        return Path(unquote(urlsplit(self.url).path))


def read_locks(said: str) -> list[StackLock]:
    """Return the locks that the CLI names when it says that the stack is locked."""
    return [
        StackLock(
            url=found["url"],
            host=found["host"],
            pid=int(found["pid"]),
            taken_at=datetime.fromisoformat(found["at"]).timestamp(),
        )
        for found in _LINE.finditer(said)
    ]


def is_abandoned(lock: StackLock) -> bool:
    """Say whether a lock was taken by a process of this machine that is gone."""
    if lock.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(lock.pid)
        # Numbers are given again, soon after a reboot above all: whoever began later did not take the lock.
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > lock.taken_at + CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return True
