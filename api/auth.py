"""Who may call: bearer tokens where there are any, else loopback only and no web pages.

Without tokens everybody on this machine is trusted, but not every page that somebody on this machine has open in a
browser. So then the Host header must name this machine (a foreign name that resolves to 127.0.0.1, DNS rebinding, does
not), and an Origin header must be our own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import CODE_BY_STATUS, error_response
from provisioner.errors import SettingsError
from provisioner.settings import Settings

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no token."""


def check_binding(settings: Settings) -> None:
    """Raise SettingsError when other machines could call without a token, or a token is no secret at all."""
    if any(not token.get_secret_value().strip() for token in settings.tokens):
        raise SettingsError(
            "MACHINEUSE_TOKENS has an empty token.", resolution="""Set e.g. MACHINEUSE_TOKENS='["<a long secret>"]'."""
        )
    if not settings.tokens and not settings.bound_to_loopback:
        raise SettingsError(
            f"Without a token the service may be reached from this machine only, and {settings.host} is not loopback.",
            resolution="""Set MACHINEUSE_TOKENS='["<a long secret>"]', or use --host 127.0.0.1.""",
        )


class Gate:
    """Lets requests through that may come in; answers the others itself."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._digests = [_digest(token.get_secret_value().encode()) for token in settings.tokens]
        self._own_names = {settings.host.lower(), (settings.public_address or settings.host).lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        if self._digests:
            if scope["path"] not in OPEN_PATHS and not self._has_token(headers):
                await error_response(
                    HTTPStatus.UNAUTHORIZED,
                    detail="A valid token is needed: 'Authorization: Bearer <token>'.",
                    code=CODE_BY_STATUS[HTTPStatus.UNAUTHORIZED],
                    headers={"WWW-Authenticate": "Bearer"},
                )(scope, receive, send)
                return
        else:
            reason = self._find_foreign(headers)
            if reason is not None:
                await error_response(
                    HTTPStatus.FORBIDDEN,
                    detail=reason,
                    code=CODE_BY_STATUS[HTTPStatus.FORBIDDEN],
                    resolution="Call it as localhost, or set MACHINEUSE_TOKENS and send a token.",
                )(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _has_token(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        scheme, _, token = _header(headers, b"authorization").strip().partition(b" ")
        digest = _digest(token.strip())
        # Every token is compared, in constant time, so the time taken tells nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)

    def _find_foreign(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        host = _header(headers, b"host").decode("latin-1").lower()
        if host and not self._is_own(_host_name(host)):
            return "The Host header names another machine."
        origin = _header(headers, b"origin").decode("latin-1").lower()
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            return "The request was sent by a page of another web site."
        return None

    def _is_own(self, name: str | None) -> bool:
        if name is None:
            return False
        if name == "localhost" or name in self._own_names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _host_name(host: str) -> str | None:
    """Return the name in a Host header without its port; None when it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
