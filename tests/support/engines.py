"""Further Docker engines on this machine, each on a "machine" of its own: real nodes that a test may freeze or unplug.

A machine here is one process in its own process, mount and network namespaces, with a /run of its own. So it has an
address that others reach over a (virtual) cable, ports that nobody else takes, and its engine's socket where every
machine has it. When that process ends, however, the kernel ends everything in it: containers, mounts, bridges. And it
ends with the test's process, by the kernel's hand as well, so a killed test leaves files and empty cgroups at most,
which the next engine of the same number removes.

The browser image comes from a template: a data directory into which it was loaded once per user and image. An engine
starts on a copy of it, whose layers are hard links; an engine never changes a layer in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import docker
import psutil
import pytest

from provisioner.toolchain.pulumi_cli import cache_dir
from stacks.spec import BROWSER_IMAGE
from tests.support.certificates import CertificateAuthority

MOST_ENGINES = 32
TLS_PORT = 2376
_CGROUPS = Path("/sys/fs/cgroup")
STARTS_WITHIN_S = 60

_BOOT = r"""
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/lock
ip link set lo up
read -r _  # until the cable is plugged in
trap 'kill -TERM $engine; wait $engine; exit 0' TERM
if [ -n "$SSHD" ]; then "$SSHD" -D -e -f "$SSHD_CONFIG" & fi
dockerd "$@" & engine=$!
wait $engine
"""
"""What the first process of a machine does; it also collects the processes that others leave to it."""

_SSHD_CONFIG = """\
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/login_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""


class Engine:
    """One engine on a machine of its own; it starts with the block and is gone with it.

    `transport` is how a cluster reaches it: by a `unix` socket, by `tcp` with client certificates, or by `ssh`. The
    unix socket is there in any case, for a look behind (`client`).
    """

    def __init__(self, transport: Literal["unix", "tcp", "ssh"] = "unix", *, browser_image: bool = True) -> None:
        """Reserve a place for the engine; without `browser_image` it has no image at all."""
        if os.geteuid() != 0:
            pytest.skip("further Docker engines on this machine need root")
        self.transport = transport
        self._root = cache_dir() / "engines"
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock, self._number = _reserve(self._root)
        self._directory = self._root / str(self._number)
        self._cable = f"mu-test-{self._number}"
        self._cgroup = f"machineuse-engine-{self._number}"
        self.socket = Path(tempfile.gettempdir()) / f"{self._cgroup}.sock"  # a socket's path must be short
        self._clear()
        self._directory.mkdir()
        self.address = f"198.18.{self._number}.2"
        self.bind_ip = self.address
        self.authority = CertificateAuthority(self._directory / "ca")
        """Signs the engine's certificate, and decides which clients it takes."""
        self.log_path = self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[docker.DockerClient] = []
        if transport == "tcp":
            self.authority.issue(self._directory / "server", names=[self.address])
            self.authority.issue(self._directory / "client")
        if transport == "ssh":
            self._make_keys()
        if browser_image:
            self._copy(_template(self._root))

    @property
    def url(self) -> str:
        """Return how the engine is reached."""
        return {
            "unix": f"unix://{self.socket}",
            "tcp": f"tcp://{self.address}:{TLS_PORT}",
            "ssh": f"ssh://root@{self.address}",
        }[self.transport]

    @property
    def cert_path(self) -> str | None:
        """Return the directory of a client's ca.pem, cert.pem and key.pem."""
        return str(self._directory / "client") if self.transport == "tcp" else None

    @property
    def ssh_opts(self) -> tuple[str, ...]:
        """Return what `ssh` needs: the client's key, and the file that knows the host's key."""
        if self.transport != "ssh":
            return ()
        known = f"UserKnownHostsFile={self._directory}/known_hosts"
        return ("-F", "none", "-i", f"{self._directory}/login_key", "-o", known, "-o", "IdentitiesOnly=yes")

    def node(self, node_id: str, **more: object) -> dict[str, object]:
        """Return what a cluster's file says of a node with this engine."""
        said: dict[str, object] = {
            "id": node_id,
            "host": self.url,
            "address": self.address,
            "bind_ip": self.bind_ip,
        }
        if self.cert_path is not None:
            said["cert_path"] = self.cert_path
        if self.ssh_opts:
            said["ssh_opts"] = list(self.ssh_opts)
        return said | more

    def client(self, *, timeout_s: float = 60) -> docker.DockerClient:
        """Return a client of the engine, through its unix socket."""
        client = docker.DockerClient(base_url=f"unix://{self.socket}", version="auto", timeout=timeout_s)
        self._clients.append(client)
        return client

    def volume(self, name: str) -> Path:
        """Return the directory of one of its volumes, for a look that the engine is not asked for."""
        return self._directory / "data" / "volumes" / name / "_data"

    # -- the machine -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Switch the machine on and wait until its engine answers. Idempotent."""
        if self._process is not None:
            return
        self.socket.unlink(missing_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("bash", "-ec", _BOOT, "boot", *self._arguments()),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                env={
                    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "SSHD": (shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or "sshd")
                    if self.transport == "ssh"
                    else "",
                    "SSHD_CONFIG": str(self._directory / "sshd_config"),
                },
            )
        self._plug_in(self._process.pid)
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.close()
        self._await()

    def stop(self) -> None:
        """Shut the machine down: the engine ends its containers first. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Cut the power: nothing on the machine gets to do anything any more. Idempotent."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Shut the machine down and switch it on again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop the engine where it is: it takes connections and never answers. Its containers go on."""
        self._signal_engine(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen engine go on. Idempotent."""
        self._signal_engine(signal.SIGCONT)

    def unplug(self) -> None:
        """Pull the cable: nobody reaches the machine (but by its unix socket), and everything on it goes on."""
        self._inside("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Put the cable back in. Idempotent."""
        self._inside("ip", "link", "set", "eth0", "up")

    def close(self) -> None:
        """Switch the machine off and remove everything of it. Idempotent."""
        if self._lock.closed:
            return
        for client in self._clients:
            client.close()
        self.kill()
        self._clear()
        self._lock.close()

    # -- how ---------------------------------------------------------------------------------------------------------

    def _arguments(self) -> list[str]:
        arguments = [
            *("--data-root", str(self._directory / "data"), "--exec-root", "/run/docker"),
            *("--pidfile", "/run/docker.pid", "--cgroup-parent", f"/{self._cgroup}"),
            *("--iptables=false", "--ip6tables=false", "--ip-masq=false", "--userland-proxy=true"),
            *("--host", "unix:///run/docker.sock", "--host", f"unix://{self.socket}"),
        ]
        if self.transport == "tcp":
            server = self._directory / "server"
            arguments += [
                *("--host", f"tcp://{self.address}:{TLS_PORT}", "--tlsverify", "--tlscacert", str(server / "ca.pem")),
                *("--tlscert", str(server / "cert.pem"), "--tlskey", str(server / "key.pem")),
            ]
        return arguments

    def _plug_in(self, pid: int) -> None:
        """Lay a cable between this machine and that one, once that one's namespaces are there."""
        ours = Path("/proc/self/ns/net").readlink()
        _wait(lambda: Path(f"/proc/{pid}/ns/net").readlink() != ours, what="the machine has a network", log=self.log)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("address", "add", f"198.18.{self._number}.1/30", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        self._inside("ip", "address", "add", f"{self.address}/30", "dev", "eth0")
        self._inside("ip", "link", "set", "eth0", "up")

    def _await(self) -> None:
        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the engine ended:\n{self.log()}"
            with (
                contextlib.suppress(docker.errors.DockerException, OSError),
                contextlib.closing(
                    docker.APIClient(base_url=f"unix://{self.socket}", version="auto", timeout=STARTS_WITHIN_S)
                ) as api,
            ):
                return bool(api.ping()) and self._takes_logins()
            return False

        _wait(answers, what="the engine answers", log=self.log)

    def _takes_logins(self) -> bool:
        if self.transport == "ssh":
            socket.create_connection((self.address, 22), timeout=5).close()
        return True

    def log(self) -> str:
        """Return the last of what engine and sshd said."""
        return self.log_path.read_text(errors="replace")[-4000:]

    def _processes(self) -> Iterator[psutil.Process]:
        """Give every process of the machine, its first one first."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                yield from psutil.Process(self._process.pid).children(recursive=True)

    def _signal_engine(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() in ("dockerd", "containerd"):
                    process.send_signal(number)

    def _inside(self, *command: str) -> None:
        assert self._process is not None
        subprocess.run(["nsenter", "--net", "--target", str(self._process.pid), *command], check=True, timeout=10)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        first = next(self._processes(), None)
        if first is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                first.send_signal(number)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and the machine with it
            self._process.wait()
        self._process = None
        self._drop_cable()

    def _drop_cable(self) -> None:
        """Take the cable away. The kernel does that, too, but some time after the last process of the machine."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self._cable)

    def _clear(self) -> None:
        """Remove what there is of an engine of this number, ours or one that was killed and may not be quite gone."""

        def is_gone() -> bool:
            shutil.rmtree(self._directory, ignore_errors=True)
            return not self._directory.exists()

        _wait(is_gone, what="an engine's files are gone", log=lambda: str(self._directory))
        self._drop_cable()
        self.socket.unlink(missing_ok=True)
        for root in (*_CGROUPS.glob(self._cgroup), *_CGROUPS.glob(f"*/{self._cgroup}")):  # of versions 2 and 1
            for directory, _, _ in os.walk(root, topdown=False):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()

    def _copy(self, template: Path) -> None:
        data = self._directory / "data"
        with _locked(template.with_suffix(".lock")):
            subprocess.run(["cp", "-a", "--reflink=auto", template / "metadata", data], check=True)
            subprocess.run(["cp", "-al", template / "overlay2", data / "overlay2"], check=True)

    def _make_keys(self) -> None:
        for name in ("host_key", "login_key"):
            path = self._directory / name
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        host_key = (self._directory / "host_key.pub").read_text()
        (self._directory / "known_hosts").write_text(f"{self.address} {host_key}")
        (self._directory / "sshd_config").write_text(
            _SSHD_CONFIG.format(address=self.address, directory=self._directory)
        )


def _template(root: Path) -> Path:
    """Return a data directory whose only image is this machine's browser image; made at first use, half a minute."""
    with contextlib.closing(docker.from_env()) as local:
        image = local.images.get(BROWSER_IMAGE)
        template = root / f"template-{image.id.removeprefix('sha256:')[:12]}"
        with _locked(template.with_suffix(".lock")):
            if not template.exists():
                for old in root.glob("template-*"):
                    if old.is_dir():
                        shutil.rmtree(old)
                with Engine(browser_image=False) as engine:
                    engine.client(timeout_s=600).images.load(image.save(named=True))
                    engine.stop()
                    partial = template.with_suffix(".partial")
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    (engine._directory / "data").rename(partial / "metadata")
                    (partial / "metadata" / "overlay2").rename(partial / "overlay2")
                    partial.rename(template)
    return template


def _reserve(root: Path) -> tuple[IO[str], int]:
    """Return the lowest number that no other engine has, and its lock, which the kernel opens when we end."""
    for number in range(MOST_ENGINES):
        handle = (root / f"{number}.lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
        else:
            return handle, number
    raise AssertionError(f"{MOST_ENGINES} engines run already")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _wait(found: Callable[[], bool], *, what: str, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if found():
                return
        assert time.monotonic() < deadline, f"not within {STARTS_WITHIN_S} s: {what}\n{log()}"
        time.sleep(0.02)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10, stderr=subprocess.DEVNULL)
