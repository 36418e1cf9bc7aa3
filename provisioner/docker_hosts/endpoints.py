"""How an engine is reached, and why it is not: one readable line for each way in which that fails."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from provisioner.errors import NodeUnreachable

REMOTE_SOCKET = "/var/run/docker.sock"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine's URL, and what it takes to be let in."""

    url: str
    cert_path: Path | None = None
    """The directory of ca.pem, cert.pem and key.pem, for `tcp://`."""
    ssh_opts: tuple[str, ...] = ()
    """What is handed on to `ssh`, for `ssh://`."""

    @property
    def uses_ssh(self) -> bool:
        """Say whether the engine is behind an SSH server."""
        return self.url.startswith("ssh://")

    @property
    def login(self) -> str:
        """Return `user@host` of an `ssh://` URL."""
        return urlsplit(self.url).netloc.rpartition(":")[0] if self.ssh_port else urlsplit(self.url).netloc

    @property
    def ssh_port(self) -> int | None:
        """Return the port of an `ssh://` URL, if it names one; raises NodeUnreachable for one that is no port."""
        try:
            return urlsplit(self.url).port
        except ValueError as error:
            raise NodeUnreachable(f"{self.url} is not a URL: {error}.") from error

    @property
    def remote_socket(self) -> str:
        """Return where the engine's socket is on the other side of an `ssh://` URL."""
        path = urlsplit(self.url).path
        return path if path not in ("", "/") else REMOTE_SOCKET

    def certificates(self) -> tuple[Path, Path, Path] | None:
        """Return ca.pem, cert.pem and key.pem, or None without a `cert_path`.

        Raises NodeUnreachable when one of them can't be read.
        """
        if self.cert_path is None:
            return None
        files = (self.cert_path / "ca.pem", self.cert_path / "cert.pem", self.cert_path / "key.pem")
        for file in files:
            try:
                file.open("rb").close()
            except OSError as error:
                raise NodeUnreachable(
                    f"The Docker engine at {self.url} was not asked: {file} can't be read ({error.strerror}).",
                    detail=str(error),
                    resolution="Put ca.pem, cert.pem and key.pem into the node's cert_path.",
                ) from error
        return files


_SERVER_CERTIFICATE = "Check the engine's certificate, and ca.pem in the node's cert_path."
_CLIENT_CERTIFICATE = "Put a certificate that the engine's CA has signed into the node's cert_path: cert.pem, key.pem."
_KEYS = "Check the user name in the URL, and that `ssh` gets in with the node's ssh_opts and without a password."
_HOST_KEY = "Compare the host's key with the host itself, then add it to the known_hosts file that `ssh` uses."

_REASONS: tuple[tuple[str, str, str], ...] = (
    (
        r"Errno 13\]",
        "this user may not talk to it",
        "Add the user to the group 'docker', or run as root.",
    ),
    # -- TLS: what we think of the engine
    (
        r"CERTIFICATE_VERIFY_FAILED.*(mismatch|not valid for)",
        "its certificate is for another name",
        _SERVER_CERTIFICATE,
    ),
    (r"CERTIFICATE_VERIFY_FAILED.*expired", "its certificate has expired", "Give the engine a new certificate."),
    (r"CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by our ca.pem", _SERVER_CERTIFICATE),
    # -- TLS: what the engine thinks of us
    (r"ALERT_CERTIFICATE_REQUIRED", "it wants a client certificate", _CLIENT_CERTIFICATE),
    (r"ALERT_CERTIFICATE_EXPIRED", "our client certificate has expired", _CLIENT_CERTIFICATE),
    (r"ALERT_UNKNOWN_CA", "another CA than the engine's has signed our client certificate", _CLIENT_CERTIFICATE),
    (
        r"ALERT_(BAD|UNSUPPORTED)_CERTIFICATE|ALERT_CERTIFICATE_UNKNOWN",
        "it refuses our client certificate: another CA has signed it, or it has expired, or is not there",
        _CLIENT_CERTIFICATE,
    ),
    (r"HTTP request to an HTTPS server", "it wants TLS, and the node has no cert_path", _CLIENT_CERTIFICATE),
    (
        r"WRONG_VERSION_NUMBER|HTTP_REQUEST|RECORD_LAYER",
        "it does not speak TLS",
        "Leave out the node's cert_path, or start the engine with --tlsverify.",
    ),
    (r"Could not find", "a file of the node's cert_path is gone", "Put ca.pem, cert.pem and key.pem back there."),
    (r"KEY_VALUES_MISMATCH", "key.pem is not the key of cert.pem", _CLIENT_CERTIFICATE),
    (
        r"\[SSL\]|NO_CERTIFICATE_OR_CRL_FOUND|PEM lib",
        "a file in cert_path is no certificate or key",
        _CLIENT_CERTIFICATE,
    ),
    # -- ssh
    (r"HOST IDENTIFICATION HAS CHANGED", "its SSH host key is not the one that is known", _HOST_KEY),
    (r"Host key verification failed", "its SSH host key is not known here", _HOST_KEY),
    (r"Permission denied|Too many authentication failures", "ssh is not let in", _KEYS),
    (
        r"administratively prohibited",
        "its SSH server forwards no sockets",
        "Allow it: AllowStreamLocalForwarding yes.",
    ),
    (
        r"open failed",
        "there is no Docker socket that the SSH user may use",
        "Check that Docker runs there, that the user is in its group 'docker', and the socket's path in the URL.",
    ),
    # -- any
    (
        r"Name or service not known|not known|name resolution|Could not resolve|No address associated",
        "its host name is unknown",
        "Correct the node's host.",
    ),
    (r"Connection refused", "nothing listens there", "Start the engine (or sshd), or correct the node's host."),
    (r"No route to host|Network is unreachable", "there is no way to that machine", "Check that the machine is up."),
    (r"No such file or directory", "there is no such socket", "Start the engine, or correct the node's host."),
    (
        r"timed out|did not get through within",
        "it says nothing in time",
        "Check that the machine is up, that its engine is not stuck, and that no firewall is between.",
    ),
)
_LONGEST = 200
"""How much of what a library said is shown where the table knows no better words."""


def explain_silence(url: str, *, detail: str, what: str) -> NodeUnreachable:
    """Return the error for an engine that can't be talked to, from what a library or `ssh` said about it."""
    for pattern, reason, resolution in _REASONS:
        if re.search(pattern, detail, re.IGNORECASE):
            return NodeUnreachable(
                f"The Docker engine at {url} does not answer: {reason}.",
                detail=f"could not {what}: {detail}",
                resolution=resolution,
            )
    words = " ".join(detail.split())
    return NodeUnreachable(
        f"The Docker engine at {url} does not answer: {words[:_LONGEST]}{'…' if len(words) > _LONGEST else '.'}",
        detail=f"could not {what}: {detail}",
        resolution="Check that the node is up and that its Docker engine runs.",
    )
