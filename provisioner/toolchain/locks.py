"""A lock between processes, for work that two checkouts must not do at once."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provisioner.toolchain.progress import Step


@contextmanager
def locked(path: Path, *, step: Step, waiting_for: str) -> Iterator[None]:
    """Hold the lock file for the block, telling the user when that means waiting for somebody else.

    The kernel lets go of the lock when its holder dies, so a killed set-up never blocks the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            step.say(f"waiting for another process that is {waiting_for}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
