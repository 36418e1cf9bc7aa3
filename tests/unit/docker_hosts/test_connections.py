"""Connections are broken while others are opened."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from provisioner.docker_hosts.connections import Connections


class Connection:
    """One that is not open."""


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_a_connection_may_be_opened_while_all_are_hung_up() -> None:
    connections, stopping = Connections(), threading.Event()
    pool = SimpleNamespace(_new_conn=Connection)
    connections._watch_pool(pool)

    def open_many() -> None:
        while not stopping.is_set():
            [pool._new_conn() for _ in range(60)]

    threads = [threading.Thread(target=open_many) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            connections.hang_up()
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
