"""Errors on the wire: one table from error class to status, one body shape for everything that is refused.

Whatever goes wrong, the body is `{"detail", "code"}` (with `resolution` where there is something to do about it), and
never a stack trace: what a caller can't act on goes to the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from provisioner.errors import (
    Conflict,
    InvalidRequest,
    LedgerUnavailable,
    MachineuseError,
    NoCapacity,
    NodeUnreachable,
    NotFound,
)

log = structlog.get_logger(__name__)

STATUS_BY_ERROR: Mapping[type[MachineuseError], HTTPStatus] = {
    InvalidRequest: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    NoCapacity: HTTPStatus.SERVICE_UNAVAILABLE,
    NodeUnreachable: HTTPStatus.SERVICE_UNAVAILABLE,
    LedgerUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""A class stands for its subclasses too; what is not here is our own fault: 500."""

CODE_BY_STATUS: Mapping[int, str] = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden_origin",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}
"""Codes of what HTTP itself refuses, before any of our errors can be raised."""

INTERNAL_CODE = MachineuseError.code
INTERNAL_DETAIL = "Something went wrong inside the service; its log says what."
NODE_RETRY_AFTER_S = 10
LEDGER_RETRY_AFTER_S = 2


class ErrorResponse(BaseModel):
    """What every refused or failed request answers with."""

    detail: str = Field(description="One sentence for people.")
    code: str = Field(description="Stable, for programs.")
    resolution: str | None = Field(default=None, description="What to do about it, where there is something.")


DOCUMENTED: Mapping[int, tuple[str, str]] = {
    400: ("BadRequest", "Bad request"),
    401: ("Unauthorized", "No valid token, where authentication is enabled"),
    403: ("Forbidden", "Sent from a page of another web site, or for another host name"),
    404: ("NotFound", "Resource not found"),
    409: ("Conflict", "Resource state conflict"),
    413: ("BodyTooLarge", "The request's body is too large"),
    415: ("UnsupportedMediaType", "The request's body is not JSON"),
    500: ("InternalError", "The service failed; its log says how"),
    503: ("InsufficientResources", "Insufficient resources"),
}
"""Status → name and description of the response in the OpenAPI document."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that may answer with these statuses, besides those that any route may."""
    possible = sorted({*statuses, 403, 500, 503})
    return {status: {"$ref": f"#/components/responses/{DOCUMENTED[status][0]}"} for status in possible}


def error_response(
    status: int, *, detail: str, code: str, resolution: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Make the answer; text that is no valid Unicode (a lone surrogate in a field's name) is replaced, not sent."""
    body = {"detail": _sendable(detail), "code": code}
    if resolution is not None:
        body["resolution"] = _sendable(resolution)
    return JSONResponse(body, status_code=int(status), headers=dict(headers) if headers else None)


def status_of(error: MachineuseError) -> HTTPStatus:
    """Return the status that the table gives to an error's class."""
    for kind in type(error).__mro__:
        if kind in STATUS_BY_ERROR:
            return STATUS_BY_ERROR[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def install(app: FastAPI) -> None:
    """Make the app answer every error in the one shape."""
    app.add_exception_handler(MachineuseError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MachineuseError)
    status = status_of(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request failed", path=request.url.path, code=error.code, error=str(error), detail=error.detail)
        return error_response(status, detail=INTERNAL_DETAIL, code=error.code)
    if error.detail:
        log.info("request refused", path=request.url.path, code=error.code, error=str(error), detail=error.detail)
    headers = {}
    if isinstance(error, NoCapacity):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, LedgerUnavailable):
        headers["Retry-After"] = str(LEDGER_RETRY_AFTER_S)
    elif status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(NODE_RETRY_AFTER_S)
    return error_response(status, detail=error.message, code=error.code, resolution=error.resolution, headers=headers)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"There is nothing at {request.url.path}."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_allowed_methods(request))
        headers["Allow"] = allowed
        detail = f"{request.method} is not possible at {request.url.path}; possible: {allowed}."
    elif error.status_code == HTTPStatus.BAD_REQUEST:
        detail = "The body can't be read as JSON."
    code = CODE_BY_STATUS.get(error.status_code, INTERNAL_CODE)
    return error_response(error.status_code, detail=detail, code=code, headers=headers)


async def _answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(
        HTTPStatus.BAD_REQUEST, detail=describe_invalid(error.errors()[0]), code=CODE_BY_STATUS[HTTPStatus.BAD_REQUEST]
    )


def describe_invalid(problem: Mapping[str, Any]) -> str:
    """Say in one sentence what pydantic found wrong, naming the field by its path in the body or the query."""
    where, *path = problem["loc"]
    kind = problem["type"]
    name = ".".join(str(part) for part in path)
    if kind == "json_invalid":
        return f"The body is not JSON: {problem['ctx']['error']} at character {path[0]}."
    if kind == "extra_forbidden":
        return f"There is no field '{name}'."
    if not name:
        return _BODY_PHRASES.get(kind, f"The body is not what is expected: {problem['msg']}.")
    if where != "body":
        name = f"{where} parameter {name}"
    message = str(problem["ctx"]["error"]) if kind == "value_error" else _FIELD_PHRASES.get(kind, str(problem["msg"]))
    message = message.removeprefix("Input ")
    return f"{name} {message[:1].lower()}{message[1:]}."


_BODY_PHRASES: Mapping[str, str] = {
    "missing": "The request needs a body: a JSON object.",
    "model_attributes_type": "The body must be a JSON object.",
    "string_unicode": "The body has a field whose name is not valid text.",
}
_FIELD_PHRASES: Mapping[str, str] = {
    "missing": "is required",
    "model_attributes_type": "must be a JSON object",
    "string_pattern_mismatch": "is not a name that an image can have",
    "string_unicode": "is not valid text",
    "string_too_short": "must not be empty",
}
"""Where pydantic's own words don't read well after a field's name."""


def _allowed_methods(request: Request) -> list[str]:
    """Return every method that some route offers at the request's path."""
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.router.routes
        )
    ]


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
