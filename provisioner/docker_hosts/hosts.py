"""The door to a Docker engine: one `DockerHost` per URL, shared by all threads.

docker-py's clients are `requests` sessions: they keep connections and may be used by several threads. A host has three
of them, because how long to wait for an answer depends on the question: `api` for what an engine answers at once,
`work_api` for work on one object (create, start, stop, remove), `slow_api` for work that takes as long as its data
(pull, copy, build), where silence is normal. All give up *connecting* within `timeout_s`, so that a dead node costs
seconds. An engine that accepts connections and then says nothing would cost the whole limit: whoever takes one of the
latter two therefore waits for a sign of life first, and work that has several parts waits in vain only once
(`SILENT_FOR_S`).

A node's engine is behind a Unix socket, behind TCP with client certificates (`cert_path`), or behind SSH: then the
clients talk to a Unix socket that a `Tunnel` keeps open.

Nothing is opened before it is needed: a `DockerHost` for a node that is down can be made, kept and asked again later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import docker
import requests
import urllib3
from docker.errors import APIError, DockerException, NotFound, create_api_error_from_http_exception
from docker.tls import TLSConfig
from docker.utils import version_lt

from provisioner.docker_hosts.connections import Connections
from provisioner.docker_hosts.endpoints import Endpoint, explain_silence
from provisioner.docker_hosts.tunnels import Tunnel
from provisioner.errors import DockerError, DockerNotFound, MachineuseError, NodeUnreachable, PortTaken
from stacks.spec import NodeSpec

LOCAL_ENGINE = "unix:///var/run/docker.sock"
ALIVE_FOR_S = 2.0
"""How long an answer counts as proof that the engine is alive."""
SILENT_FOR_S = 2.0
"""How long an engine that did not answer is not asked again before work: it is taken to be silent still."""
MINIMUM_API = "1.41"
"""The oldest API that has everything that is asked for: one-shot statistics. Docker 20.10 speaks it."""
POOL_SIZE = 64
"""Idle connections kept to one engine; as many long calls run at once without opening new ones."""

_MOST_LETTERS = 300
"""Of an engine's words in a message; all of them are in the detail."""
_UNREACHABLE_RESOLUTION = "Check that the node is up and that its Docker engine runs."
_WANTS_TLS = "HTTP request to an HTTPS server"
_FILE_GONE = "Could not find "
_PORT_TAKEN = ("port is already allocated", "address already in use")
_SILENCE = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)

P = ParamSpec("P")
R = TypeVar("R")


class _Client(docker.APIClient):
    """docker-py's low-level client, with a time limit for connecting that is apart from the one for answering."""

    def __init__(self, *, connect_timeout_s: float, connections: Connections, **kwargs: Any) -> None:
        self.connect_timeout_s = connect_timeout_s  # first: the constructor asks the engine for its API version
        self._connections = connections
        super().__init__(**kwargs)

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        self.trust_env = False  # engines are reached directly, not through a web proxy of the environment
        timeout = kwargs.get("timeout")
        if timeout is None or isinstance(timeout, int | float):
            kwargs["timeout"] = (self.connect_timeout_s, timeout)
        try:
            return super().request(*args, **kwargs)
        except OSError as error:
            if _FILE_GONE not in str(error):
                raise
            # A certificate that is gone since: of all that may be wrong with one, requests has no error of its own.
            raise requests.exceptions.SSLError(str(error)) from error

    def get_adapter(self, url: str) -> Any:
        adapter = super().get_adapter(url)
        self._connections.watch(adapter)
        return adapter

    def _disable_socket_timeout(self, socket: object) -> None:
        """Keep the limit that docker-py lifts while it reads a stream: an engine may freeze in the middle of one."""


class DockerHost:
    """One Docker engine, reached by a `unix://`, `tcp://` or `ssh://` URL."""

    def __init__(
        self,
        url: str = LOCAL_ENGINE,
        *,
        cert_path: Path | None = None,
        ssh_opts: tuple[str, ...] = (),
        directory: Path = Path(),
        timeout_s: float = 5.0,
        work_timeout_s: float = 60.0,
        slow_timeout_s: float = 600.0,
    ) -> None:
        """Connect to nothing yet. `cert_path` is for `tcp://`, `ssh_opts` for `ssh://`, run in `directory`."""
        self.url = url
        self._endpoint = Endpoint(url, cert_path=cert_path, ssh_opts=ssh_opts)
        self._tunnel = (
            Tunnel(self._endpoint, timeout_s=timeout_s, directory=directory) if self._endpoint.uses_ssh else None
        )
        self.timeout_s = timeout_s
        self.work_timeout_s = work_timeout_s
        self.slow_timeout_s = slow_timeout_s
        self._lock = threading.Lock()
        self._api: docker.APIClient | None = None
        self._workers: dict[tuple[float, float], docker.APIClient] = {}
        """By how long to wait for an answer, and for a connection (or for the engine to read)."""
        self._locks: dict[str, threading.Lock] = {}
        self._connections = Connections()
        self._work_connections = Connections()
        self._alive_at = float("-inf")
        self._silent_at = float("-inf")
        self._version: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"DockerHost({self.url!r})"

    @property
    def api(self) -> docker.APIClient:
        """Return the client for quick questions: it gives up after `timeout_s`; connects at first use.

        Raises NodeUnreachable, for an engine that is too old as well.
        """
        if self._tunnel is not None:
            self._tunnel.open()
        if self._api is None:
            with self._lock:
                if self._api is None:
                    self._api = self._checked(self._connect(timeout_s=self.timeout_s, version=None))
        return self._api

    @property
    def work_api(self) -> docker.APIClient:
        """Return the client for work on one object (create, start, stop, remove), once the engine is known to be alive.

        Gives up after `work_timeout_s`, so that an engine that freezes in the middle holds up an update no longer.
        Connects at first use. Raises NodeUnreachable.
        """
        return self._working_client(self.work_timeout_s)

    @property
    def slow_api(self) -> docker.APIClient:
        """Return the client for work that takes as long as its data (pull, copy, build), once the engine is alive.

        Gives up after `slow_timeout_s` without a byte. Connects at first use. Raises NodeUnreachable.
        """
        return self._working_client(self.slow_timeout_s)

    @property
    def transfer_api(self) -> docker.APIClient:
        """Return the client for streams of gigabytes into the engine, once the engine is alive.

        As `slow_api`, but the engine may also take its time to *read*. Raises NodeUnreachable.
        """
        return self._working_client(self.slow_timeout_s, connect_timeout_s=self.work_timeout_s)

    def _working_client(self, timeout_s: float, *, connect_timeout_s: float | None = None) -> docker.APIClient:
        self.check_alive()
        version = str(self.api.api_version)
        limits = (timeout_s, connect_timeout_s or self.timeout_s)
        with self._lock:
            client = self._workers.get(limits)
            if client is None:
                client = self._workers[limits] = self._connect(
                    timeout_s=timeout_s, connect_timeout_s=limits[1], version=version
                )
        return client

    @contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """Hold what this process may do on the engine only once at a time, such as bringing one image."""
        with self._lock:
            lock = self._locks.setdefault(what, threading.Lock())
        with lock:
            yield

    def is_locked(self, what: str) -> bool:
        """Say whether somebody in this process holds it just now."""
        with self._lock:
            return what in self._locks and self._locks[what].locked()

    def _connect(
        self, *, timeout_s: float, version: str | None, connect_timeout_s: float | None = None
    ) -> docker.APIClient:
        files = self._endpoint.certificates()
        with self.errors("connect"):
            return _Client(
                connect_timeout_s=connect_timeout_s or self.timeout_s,
                connections=self._work_connections if timeout_s == self.work_timeout_s else self._connections,
                base_url=self._tunnel.url if self._tunnel is not None else self.url,
                version=version,
                timeout=timeout_s,
                max_pool_size=POOL_SIZE,
                tls=files is not None
                and TLSConfig(ca_cert=str(files[0]), client_cert=(str(files[1]), str(files[2])), verify=True),
            )

    def _checked(self, client: docker.APIClient) -> docker.APIClient:
        if version_lt(str(client.api_version), MINIMUM_API):
            client.close()
            raise NodeUnreachable(
                f"The Docker engine at {self.url} is too old: it speaks API {client.api_version},"
                f" and Machineuse needs {MINIMUM_API} (Docker 20.10) or newer.",
                resolution="Update Docker on the node.",
            )
        return client

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn what docker-py raises inside into our errors; `what` completes "could not …".

        Raises `DockerNotFound`, `PortTaken`, `NodeUnreachable` or `DockerError`. Our own errors pass unchanged.
        """
        try:
            yield
        except MachineuseError:
            raise
        except (DockerException, *_SILENCE) as error:
            raise self._explain(error, what=what) from error

    def call(self, what: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` with its exceptions turned into ours: `host.call("list volumes", host.api.volumes)`."""
        with self.errors(what):
            return function(*args, **kwargs)

    def _explain(self, error: BaseException, *, what: str) -> DockerError:
        if _WANTS_TLS in str(error):
            return explain_silence(self.url, detail=" ".join(str(error).split()), what=what)
        if isinstance(error, APIError):
            words = " ".join(str(error.explanation or error).split())
            message = f"Docker on {self.url} could not {what}: {_shorten(words)}"
            if isinstance(error, NotFound):
                return DockerNotFound(message, detail=words)
            if any(phrase in words for phrase in _PORT_TAKEN):
                return PortTaken(
                    f"Docker on {self.url} could not {what}: a port that it is to publish is taken.",
                    detail=words,
                    resolution="Stop whatever listens on that port, or let the instance be created again.",
                )
            return DockerError(message, detail=words)
        detail = _root_cause(error)
        if isinstance(error, _SILENCE) or _hides_silence(error):
            self._alive_at = float("-inf")
            said = self._tunnel.explain() if self._tunnel is not None else ""
            return explain_silence(self.url, detail=said or detail, what=what)
        return DockerError(f"Docker on {self.url} could not {what}: {_shorten(detail)}", detail=detail)

    def ping(self) -> None:
        """Ask the engine for a sign of life; raise `NodeUnreachable` when none comes within `timeout_s`."""
        try:
            self.call("ping", self.api.ping)
        except NodeUnreachable:
            self._silent_at = time.monotonic()
            raise
        self._alive_at = time.monotonic()
        self._silent_at = float("-inf")

    def check_alive(self) -> None:
        """Ping, unless the engine answered, or did not, a moment ago; raise `NodeUnreachable`."""
        now = time.monotonic()
        if now - self._silent_at < SILENT_FOR_S:
            raise NodeUnreachable(
                f"The Docker engine at {self.url} does not answer.",
                detail=f"it did not a moment ago, and was given {SILENT_FOR_S:g} s",
                resolution=_UNREACHABLE_RESOLUTION,
            )
        if now - self._alive_at > ALIVE_FOR_S:
            self.ping()

    def hang_up(self, *, only_work: bool = False) -> None:
        """Break all connections, or those of `work_api`: whoever waits for an answer there gets NodeUnreachable now."""
        self._alive_at = float("-inf")
        self._version = None  # it may come back as another engine
        self._work_connections.hang_up()
        if not only_work:
            self._connections.hang_up()

    def info(self) -> dict[str, Any]:
        """Return what the engine says about itself and its machine (`docker info`)."""
        info: dict[str, Any] = self.call("report on itself", self.api.info)
        self._alive_at = time.monotonic()
        return info

    def version(self) -> dict[str, Any]:
        """Return what the engine says of its version and platform, asked once for as long as it answers."""
        if self._version is None:
            self._version = self.call("tell its version", self.api.version, api_version=False)
        return self._version

    def post(self, what: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST to the engine's API what docker-py has no function for, as work; return its JSON answer."""
        api = self.work_api
        with self.errors(what):
            response = api.post(f"{api.base_url}/v{api.api_version}{path}", json=body, timeout=self.work_timeout_s)
            try:
                response.raise_for_status()
            except requests.exceptions.HTTPError as error:
                create_api_error_from_http_exception(error)
            answer: dict[str, Any] = response.json() if response.content else {}
            return answer

    def close(self) -> None:
        """Close idle connections; the next use connects again."""
        with self._lock:
            clients = [*self._workers.values(), *([self._api] if self._api is not None else [])]
            self._workers.clear()
            self._api = None
        for client in clients:
            client.close()
        if self._tunnel is not None:
            self._tunnel.close()


class DockerHosts:
    """The Docker engines of a process, by how they are reached: each is made once and shared."""

    def __init__(self, *, base_dir: Path | None = None, timeout_s: float = 5.0, slow_timeout_s: float = 600.0) -> None:
        """Relative paths of certificates and keys are relative to `base_dir`, the project's directory."""
        self._base_dir = base_dir or Path()
        self._timeout_s = timeout_s
        self._slow_timeout_s = slow_timeout_s
        self._lock = threading.Lock()
        self._hosts: dict[tuple[str, str | None, tuple[str, ...]], DockerHost] = {}

    def get(self, url: str, *, cert_path: str | None = None, ssh_opts: Iterable[str] = ()) -> DockerHost:
        """Return the host that is reached so, always the same one; nothing is connected yet."""
        key = (url, cert_path, tuple(ssh_opts))
        with self._lock:
            host = self._hosts.get(key)
            if host is None:
                host = self._hosts[key] = DockerHost(
                    url,
                    cert_path=self._base_dir / Path(cert_path).expanduser() if cert_path else None,
                    ssh_opts=key[2],
                    directory=self._base_dir,
                    timeout_s=self._timeout_s,
                    slow_timeout_s=self._slow_timeout_s,
                )
            return host

    def of(self, node: NodeSpec) -> DockerHost:
        """Return a node's engine."""
        return self.get(node.host, cert_path=node.cert_path, ssh_opts=node.ssh_opts)

    def keep_only(self, nodes: Iterable[NodeSpec]) -> None:
        """Forget, and close, the engines of all but these nodes: after nodes were removed, or are reached otherwise."""
        kept = {(node.host, node.cert_path, node.ssh_opts) for node in nodes}
        with self._lock:
            gone = [self._hosts.pop(key) for key in set(self._hosts) - kept]
        for host in gone:
            host.close()

    def close(self) -> None:
        """Close all idle connections and tunnels."""
        with self._lock:
            hosts = list(self._hosts.values())
        for host in hosts:
            host.close()


def _hides_silence(error: BaseException) -> bool:
    """Say whether a dead connection is behind the error: docker-py wraps it while it asks for the API version."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _SILENCE) and not isinstance(cause, APIError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _root_cause(error: BaseException) -> str:
    """Return the innermost exception's words: the outer ones only repeat each other."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__


def _shorten(words: str) -> str:
    return words if len(words) <= _MOST_LETTERS else f"{words[:_MOST_LETTERS]}…"
