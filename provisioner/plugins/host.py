"""The plugin host: our plugins, served for the engine from inside the control plane.

`PULUMI_DEBUG_PROVIDERS=docker:PORT,machineuse:PORT` makes the CLI dial these servers instead of starting a process a
plugin, which takes longer than most updates. One server a package serves every run of the CLI and every provider
resource in it, for as long as the control plane lives. Loopback only.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures

import grpc
import structlog
from pulumi.runtime._grpc_settings import _GRPC_CHANNEL_OPTIONS
from pulumi.runtime.proto import provider_pb2_grpc

from provisioner.errors import SetupError
from provisioner.plugins.base import PluginServicer

log = structlog.get_logger(__name__)

WORKERS = 64
"""Calls that a plugin serves at once; a snapshot occupies one for as long as it takes."""
_OPTIONS = [*_GRPC_CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)]


class PluginServer:
    """One plugin on a port of its own."""

    def __init__(self, servicer: PluginServicer) -> None:
        self.servicer = servicer
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix=f"plugin-{servicer.package}"),
            options=_OPTIONS,
        )
        provider_pb2_grpc.add_ResourceProviderServicer_to_server(servicer, self._server)
        self.port = 0

    def start(self) -> int:
        """Listen on a free port of 127.0.0.1 and return it; raise `SetupError` when there is none."""
        try:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        except RuntimeError as error:
            raise SetupError("No port on 127.0.0.1 can be opened for a Pulumi plugin.", detail=str(error)) from error
        self._server.start()
        return self.port

    def stop(self, *, grace_s: float = 0.0) -> None:
        """Take no more calls, give those under way `grace_s` seconds, and close."""
        self._server.stop(grace_s).wait()
        self.servicer.close()


class PluginHost:
    """All plugins of a process; a context manager."""

    def __init__(self, servicers: Sequence[PluginServicer]) -> None:
        self._servers = [PluginServer(servicer) for servicer in servicers]

    def start(self) -> None:
        """Start serving; raise `SetupError`."""
        for server in self._servers:
            server.start()
        log.info("plugins served", providers=self.debug_providers)

    def stop(self, *, grace_s: float = 0.0) -> None:
        """Stop serving; calls under way get `grace_s` seconds."""
        for server in self._servers:
            server.stop(grace_s=grace_s)

    @property
    def debug_providers(self) -> str:
        """Return the value of PULUMI_DEBUG_PROVIDERS that makes the CLI use these plugins."""
        return ",".join(f"{server.servicer.package}:{server.port}" for server in self._servers)

    def __enter__(self) -> PluginHost:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
