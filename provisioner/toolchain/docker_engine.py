"""Makes sure that a Docker engine answers on this machine: installs and starts one where we may.

The ping is plain HTTP over the socket, so that set-up needs no Docker library and costs a millisecond when all is well.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from provisioner.errors import SetupError
from provisioner.toolchain.locks import locked
from provisioner.toolchain.packages import can_install_packages, install_command, install_packages

if TYPE_CHECKING:
    from provisioner.toolchain.progress import Step

DEFAULT_SOCKET = Path("/var/run/docker.sock")
LOG = Path("/var/log/machineuse-dockerd.log")

_PACKAGES = ("docker.io", "mmdebstrap")
_PING_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0
_POLL_S = 0.1
_TAIL_LINES = 15
_CONTAINERD_SOCKET = Path("/run/containerd/containerd.sock")


def find_docker_socket() -> Path | None:
    """Return the Unix socket on which a Docker engine answers now, or None.

    DOCKER_HOST decides where it is set; else the usual place comes first, and Docker Desktop's second.
    """
    return next((path for path in _sockets() if ping(path)), None)


def ping(path: Path) -> bool:
    """Say whether a Docker engine answers on this Unix socket within five seconds."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def provide_docker_engine(step: Step) -> None:
    """Return once a Docker engine answers; install and start one first if none does and we may. Idempotent.

    Raises SetupError with the exact command to run where we may not, or with the end of the engine's log where it does
    not start.
    """
    host = os.environ.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        step.outcome = f"{host}, as DOCKER_HOST says"
        return
    found = find_docker_socket()
    if found is None:
        if host:
            raise SetupError(
                f"No Docker engine answers on {host}, which DOCKER_HOST names.",
                resolution="Start that engine, or unset DOCKER_HOST.",
            )
        found = _provide_default_engine(step)
    step.outcome = f"answers on {found}"


def start_engine(
    *,
    socket_path: Path = DEFAULT_SOCKET,
    log: Path = LOG,
    pid_file: Path = Path("/var/run/docker.pid"),
    arguments: Sequence[str] = (),
) -> int:
    """Start `dockerd` as a process of its own that outlives us; return its pid once it answers on the socket.

    Files of an engine that is gone (a pid that somebody else may have by now, a dead containerd's socket) are removed
    first: they would keep the new engine from starting. Raises SetupError with the end of the log.
    """
    dockerd = _which("dockerd")
    if dockerd is None:
        raise SetupError("`dockerd` is not installed.", resolution=f"Run: {install_command(_PACKAGES)}")
    _remove_stale_pid_file(pid_file, of="dockerd")
    if socket_path == DEFAULT_SOCKET:
        _remove_stale_pid_file(Path("/var/run/docker/containerd/containerd.pid"), of="containerd")
        _remove_dead_socket(_CONTAINERD_SOCKET)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [dockerd, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
            env=_clean_environment(),
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ping(socket_path):
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            process.kill()
            raise SetupError(
                f"The Docker engine did not start (exit code {code})."
                if code is not None
                else f"The Docker engine did not answer within {_START_TIMEOUT_S:.0f} seconds.",
                detail="\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]),
                resolution=f"Its log is {log}; start a Docker engine and run this again.",
            )
        time.sleep(_POLL_S)
    return process.pid


def _provide_default_engine(step: Step) -> Path:
    if _which("dockerd") is None:
        if not can_install_packages():
            raise SetupError(
                "No Docker engine answers on this machine.",
                resolution=(
                    f"Start Docker Desktop, or run: {install_command(_PACKAGES)}"
                    if shutil.which("apt-get")
                    else "Install and start Docker Desktop or Docker Engine, and run this again."
                ),
            )
        install_packages(step, _PACKAGES, reason="a Docker engine")
    elif os.geteuid() != 0:
        raise SetupError(
            "A Docker engine is installed, but does not answer us.",
            resolution=(
                "Run: sudo systemctl start docker. If it runs already: sudo usermod -aG docker $USER, and log in again."
            ),
        )
    with locked(LOG.with_suffix(".lock"), step=step, waiting_for="starting the Docker engine"):
        if not ping(DEFAULT_SOCKET):  # the package's own scripts, or another set-up, may have started it by now
            _start_default_engine(step)
    return DEFAULT_SOCKET


def _start_default_engine(step: Step) -> None:
    if Path("/run/systemd/system").is_dir():
        step.say("starting the Docker engine: systemctl start docker")
        step.run(["systemctl", "start", "docker"], what="systemctl start docker", timeout_s=_START_TIMEOUT_S)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ping(DEFAULT_SOCKET):
            if time.monotonic() > deadline:
                raise SetupError(
                    "The Docker engine was started but does not answer.", resolution="See: journalctl -u docker"
                )
            time.sleep(_POLL_S)
        return
    pid = start_engine()
    step.say(f"started the Docker engine, pid {pid}; it goes on running after us, its log is {LOG}")


def _sockets() -> list[Path]:
    host = os.environ.get("DOCKER_HOST", "")
    if host.startswith("unix://"):
        return [Path(host.removeprefix("unix://"))]
    return [DEFAULT_SOCKET, Path.home() / ".docker" / "run" / "docker.sock"]


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def _remove_stale_pid_file(path: Path, *, of: str) -> None:
    """Remove a pid file unless the process with that pid is still the program that wrote it."""
    try:
        pid = int(path.read_text())
        command = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        command = ""
    if command != of:
        path.unlink(missing_ok=True)


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def _clean_environment() -> dict[str, str]:
    """Return our environment less what belongs to this run of make and its virtual environment."""
    private = ("MAKE", "MFLAGS", "VIRTUAL_ENV", "PYTHON", "PULUMI", "MACHINEUSE")
    return {name: value for name, value in os.environ.items() if not name.startswith(private)}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=_PING_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_PING_TIMEOUT_S)
        self.sock.connect(str(self._path))
