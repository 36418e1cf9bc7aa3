"""A Docker engine that a test can freeze or take away: a socket in front of the real one, which others need too."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16


class EngineProxy:
    """Passes everything on to the real engine, until it is told not to."""

    def __init__(self, engine: str = "/var/run/docker.sock") -> None:
        self._engine = engine
        self._directory = tempfile.TemporaryDirectory(prefix="machineuse-")  # a socket's path must be short
        self._path = Path(self._directory.name) / "engine.sock"
        self.url = f"unix://{self._path}"
        self._flowing = threading.Event()
        self._flowing.set()
        self._ends: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._listener = self._listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._directory.cleanup()

    def freeze(self) -> None:
        """Take connections and requests from now on, but pass nothing on: like a machine out of memory."""
        self._flowing.clear()

    def refuse(self) -> None:
        """Break all connections and take no new ones: like an engine that has ended."""
        self._path.unlink(missing_ok=True)
        for end in (self._listener, *list(self._ends)):
            _shut(end)
        self._listener.close()
        self._flowing.set()

    def restore(self) -> None:
        """Pass everything on again, beginning with what waits. Idempotent."""
        if not self._path.exists():
            self._listener = self._listen()
        self._flowing.set()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._path))
        listener.listen(128)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(self._engine)
            self._ends |= {client, engine}
            for source, target in ((client, engine), (engine, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self._flowing.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
