"""The access log: one line a request, and a plain 500 for what nobody expected."""

from __future__ import annotations

import time
from http import HTTPStatus

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import INTERNAL_CODE, INTERNAL_DETAIL, error_response

log = structlog.get_logger(__name__)

QUIET_PATHS = frozenset({"/health", "/metrics"})
"""Paths that machines ask every few seconds: logged only when they fail."""


class AccessLog:
    """Logs every request when its answer is sent. Neither query nor headers: they may hold secrets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log its outcome."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:  # the outermost place: a crash must be an answer and a log entry
            log.exception("request crashed", method=scope["method"], path=scope["path"])
            if status:
                raise  # half an answer is sent already: all that is left is to close the connection
            answer = error_response(HTTPStatus.INTERNAL_SERVER_ERROR, detail=INTERNAL_DETAIL, code=INTERNAL_CODE)
            await answer(scope, receive, watch)
        finally:
            if status >= 400 or scope["path"] not in QUIET_PATHS:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    duration_ms=round((time.monotonic() - started) * 1000, 1),
                )
