"""Knows the connections of an engine's clients, to break them all at once when the engine has gone silent.

A call that waits for an engine's answer has a time limit, but one that fits the work: minutes for gigabytes. Once the
heartbeats say that the engine is gone, nobody needs to wait that long. Neither requests nor urllib3 can end a call from
outside, but a call whose socket is shut down ends by itself, as if the engine had hung up.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from typing import Any

_WATCHED = "_machineuse_watched"


class Connections:
    """The connections of several clients to one engine; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # nobody may open one while they are gone through
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self, adapter: Any) -> None:
        """Take note of every connection that this transport adapter opens from now on. Idempotent."""
        if hasattr(adapter, _WATCHED):
            return
        find_pool = adapter.get_connection_with_tls_context

        def find_watched_pool(*args: Any, **kwargs: Any) -> Any:
            pool = find_pool(*args, **kwargs)
            self._watch_pool(pool)
            return pool

        adapter.get_connection_with_tls_context = find_watched_pool
        setattr(adapter, _WATCHED, True)

    def _watch_pool(self, pool: Any) -> None:
        if hasattr(pool, _WATCHED):
            return
        connect = pool._new_conn

        def connect_watched() -> Any:
            connection = connect()
            with self._lock:
                self._connections.add(connection)
            return connection

        pool._new_conn = connect_watched
        setattr(pool, _WATCHED, True)

    def hang_up(self) -> None:
        """Shut down every open connection: who waits for an answer gets an error now."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            open_socket = getattr(connection, "sock", None)
            if open_socket is not None:
                with contextlib.suppress(OSError):
                    # Of the socket below TLS, whose own shutdown would take the session from under its reader.
                    socket.socket.shutdown(open_socket, socket.SHUT_RDWR)
