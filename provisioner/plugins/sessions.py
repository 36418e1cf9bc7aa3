"""Who is calling: one long-lived plugin server has many callers.

Every run of the CLI is a `Session`, named by the address of its engine; every provider resource in it has a connection
of its own, named by its peer address, and its own configuration. Nothing tells a server that a connection ended, so
both are kept in bounded caches, and the least recently used one goes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import structlog
from pulumi.runtime.proto import engine_pb2, engine_pb2_grpc

log = structlog.get_logger(__name__)

LOG_TIMEOUT_S = 2.0
SESSIONS_KEPT = 64
CONNECTIONS_KEPT = 2048

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A thread-safe map that makes missing values and forgets the least recently used ones."""

    def __init__(self, make: Callable[[K], V], *, keep: int, forget: Callable[[V], None] = lambda _: None) -> None:
        self._make = make
        self._keep = keep
        self._forget = forget
        self._lock = threading.Lock()
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V:
        """Return the value of `key`, made now if need be."""
        forgotten: list[V] = []
        with self._lock:
            if key not in self._values:
                self._values[key] = self._make(key)
                while len(self._values) > self._keep:
                    forgotten.append(self._values.popitem(last=False)[1])
            self._values.move_to_end(key)
            value = self._values[key]
        for old in forgotten:
            self._forget(old)
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            values = list(self._values.values())
            self._values.clear()
        for value in values:
            self._forget(value)


class Session:
    """One run of the CLI, and the way to show its user something."""

    def __init__(self, engine_address: str) -> None:
        self.engine_address = engine_address
        self.cancelled = threading.Event()
        """Set when the user interrupts the run; long operations may look at it."""
        self.replacing: set[str] = set()
        """URNs that this run is replacing: a delete of one of them makes room for its successor."""
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._deaf = not engine_address

    def show(self, message: str, *, urn: str, warning: bool = False, passing: bool = False) -> None:
        """Show a message at a resource, `passing` ones only until the next; never raises."""
        if self._deaf:
            return
        request = engine_pb2.LogRequest(
            severity=engine_pb2.WARNING if warning else engine_pb2.INFO, message=message, urn=urn, ephemeral=passing
        )
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(self.engine_address)
            stub = engine_pb2_grpc.EngineStub(self._channel)
        try:
            stub.Log(request, timeout=LOG_TIMEOUT_S)
        except (grpc.RpcError, ValueError) as error:  # ValueError: closed by another thread
            self._deaf = True
            log.debug("engine does not listen", engine=self.engine_address, error=str(error))

    def close(self) -> None:
        """Drop the connection to the engine; later messages go nowhere."""
        with self._lock:
            self._deaf = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


@dataclass(slots=True)
class Connection:
    """One provider resource of one run: its configuration, once it was configured."""

    session: Session
    config: Mapping[str, Any] | None = None


@dataclass(slots=True)
class KeyedLocks:
    """One lock a key, kept while somebody holds or awaits it."""

    _guard: threading.Lock = field(default_factory=threading.Lock)
    _locks: dict[str, tuple[threading.Lock, int]] = field(default_factory=dict)

    def acquire(self, key: str) -> None:
        """Wait for the key."""
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        lock.acquire()

    def release(self, key: str) -> None:
        """Give the key back."""
        with self._guard:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)
        lock.release()
