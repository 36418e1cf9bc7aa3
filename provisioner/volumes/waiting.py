"""Waiting for a cloud: always with an end, and as long as somebody wants what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from provisioner.errors import CloudError

T = TypeVar("T")


class CutOff(CloudError):
    """What was waited for is not wanted any more."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for what, in seconds."""

    poll_s: float = 1.0
    visible_s: float = 20.0
    """How long what was just made may be unknown: listings lag behind."""
    volume_s: float = 180.0
    """For a volume to be made, attached, detached or deleted, each."""
    device_s: float = 60.0
    """For an attached volume to appear on its node."""
    snapshot_s: float = 4 * 3600.0
    """For a snapshot to be whole: the first one of a large volume is gigabytes."""
    snapshot_poll_s: float = 2.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def await_that(
        self,
        look: Callable[[], T | None],
        *,
        what: str,
        limit_s: float,
        poll_s: float | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> T:
        """Return what `look` returns once that is not None.

        Raises `CutOff` as soon as it is not `wanted`, and `CloudError` after `limit_s`; `what` completes "… after N s".
        """
        give_up_at = self.clock() + limit_s
        while True:
            found = look()
            if found is not None:
                return found
            if not wanted():
                raise CutOff(f"It is not wanted any more: {what}.")
            if self.clock() >= give_up_at:
                raise CloudError(f"{what} after {limit_s:.0f} s.", resolution="It is tried again.")
            self.sleep(self.poll_s if poll_s is None else poll_s)
