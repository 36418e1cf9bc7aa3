"""The service's own port: taken before anything else is started, so a busy one is a clear line and not a crash."""

from __future__ import annotations

import errno
import socket

import psutil

from provisioner.errors import SettingsError, SetupError


def bind_port(host: str, port: int) -> list[socket.socket]:
    """Return sockets bound to every address of `host`; nothing listens yet.

    Raises SetupError for a port that is taken, naming who has it where that can be seen, and SettingsError for a host
    that is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"'{host}' is not an address to serve on.", detail=str(error)) from error
    bound: list[socket.socket] = []
    refusals: list[OSError] = []
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        bound_port = bound[0].getsockname()[1] if bound else port  # with port 0, the same one on every address
        try:
            bound.append(_bind(family, (address[0], bound_port, *address[2:])))
        except OSError as error:
            refusals.append(error)
    taken = next((error for error in refusals if error.errno == errno.EADDRINUSE), None)
    if taken is None and bound:
        return bound  # an address of a family that this machine does not have is no loss
    for one in bound:
        one.close()
    if taken is not None:
        raise SetupError(
            f"Port {port} on {host} is taken{_name_owner(port)}.",
            resolution="Stop what uses it, or choose another one with --port.",
        ) from taken
    reason = refusals[0]
    raise SettingsError(f"Can't serve on {host}, port {port}: {reason.strerror}.") from reason


def _bind(family: int, address: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _name_owner(port: int) -> str:
    """Return " by process N (name)", or nothing where that can't be seen."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and tuple(connection.laddr)[1:2] == (port,):
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return ""
