"""Free ports."""

from __future__ import annotations

import contextlib
import secrets
import socket

_FIRST, _COUNT = 10_000, 11_000
"""Below the ports of instances, and below those that the kernel gives to whoever connects somewhere."""


def free_port() -> int:
    """Return a port that nobody listens on now; who listens there may stop, and finds it free when it starts again."""
    while True:
        port = _FIRST + secrets.randbelow(_COUNT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
