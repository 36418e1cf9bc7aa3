"""Runs the service: port, data directory, replica, web server; and stops them in the reverse order.

What can be refused is refused before anything is started: settings, a busy port, a second service on the same data
directory. On SIGTERM or SIGINT the server stops accepting, calls that wait answer with what is true by then, and the
control plane, where this replica leads, finishes the update under way. A second signal ends the process at once;
nothing is lost by that either.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.auth import check_binding
from api.logs import configure_logs
from api.ports import bind_port
from provisioner.errors import SetupError
from provisioner.replica import Replica
from provisioner.settings import Settings

log = structlog.get_logger(__name__)

DRAIN_S = 10
"""Seconds that answers under way get once the service is told to stop."""
STOP_S = 60.0
"""Seconds that an update under way gets."""


def serve(settings: Settings) -> None:
    """Serve until a signal says stop. Raises MachineuseError where the service can't be started."""
    check_binding(settings)
    sockets = bind_port(settings.host, settings.port)
    port = sockets[0].getsockname()[1]
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.data_dir.chmod(0o700)
    with only_service(settings.data_dir):
        configure_logs(log_format=settings.log_format, directory=settings.data_dir / "logs")
        log.info("starting", cluster=settings.cluster, data_dir=str(settings.data_dir))
        replica = Replica(settings)
        server = _Server(create_app(replica), host=settings.host, port=port)
        try:
            replica.start()
            server.run(sockets)
        finally:
            log.info("stopping")
            replica.stop(timeout_s=STOP_S)
            log.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn, told how we start and stop."""

    def __init__(self, app: FastAPI, *, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._app = app
        name = "localhost" if host in ("127.0.0.1", "::1", "localhost") else f"[{host}]" if ":" in host else host
        self._url = f"http://{name}:{port}"

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("serving", url=self._url)
        print(  # noqa: T201 - the one line that a person waits for
            f"Serving {self._url} (API description: {self._url}/docs). A first browser:\n"
            f"  curl -X POST {self._url}/v2/instances -H 'content-type: application/json' -d '{{}}'",
            flush=True,
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals as uvicorn does, but don't raise them again afterwards: there is more to stop."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not at once: what runs now may be inside the very lock that this takes.
        asyncio.get_running_loop().call_soon_threadsafe(self._app.state.stopping.set)
        super().handle_exit(sig, frame)


@contextmanager
def only_service(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process; the kernel lets go of it however the process ends."""
    path = data_dir / "serve.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip()
            raise SetupError(
                f"Another service{f' (process {holder})' if holder.isdigit() else ''} already uses {data_dir}.",
                resolution="Stop it first, or choose another directory with --data-dir.",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
