"""What may come in: strict query parameters, JSON bodies only, and not too much of them."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated

from fastapi import Query, Request
from pydantic import BeforeValidator, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import CODE_BY_STATUS, error_response
from api.schemas import MAX_INT64

MAX_BODY_BYTES = 64 * 1024
MAX_LIMIT = 1000

_TOO_LARGE = f"The request's body is larger than {MAX_BODY_BYTES} bytes."


def _parse_whole(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"-?[0-9]{1,100}", value):
            raise ValueError("must be a whole number")
        return int(value)
    return value


def _parse_flag(value: object) -> object:
    if isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return value.lower() == "true"
    return value


Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT), BeforeValidator(_parse_whole), Query(description="How many at most.")]
Offset = Annotated[
    int, Field(ge=0, le=MAX_INT64), BeforeValidator(_parse_whole), Query(description="How many to skip.")
]
QueryFlag = Annotated[bool, BeforeValidator(_parse_flag)]


async def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON; none at all is fine. Also keeps web forms of other sites out."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = content_type == "application/json" or (
        content_type.startswith("application/") and content_type.endswith("+json")
    )
    if not is_json and await request.body():
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be JSON, sent with 'Content-Type: application/json'."
        )


class BodyLimit:
    """Refuses bodies that are too large, by what they declare and by what really arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > MAX_BODY_BYTES):
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            await error_response(status, detail=_TOO_LARGE, code=CODE_BY_STATUS[status])(scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LARGE)
            return message

        await self._app(scope, count, send)
