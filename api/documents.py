"""The OpenAPI document: what FastAPI generates, put into the contract's words.

Four things are not FastAPI's: error responses are named components, there is no 422 (what is invalid is 400), what may
be left out of a request is not said to be null, and the document says whether a token is needed.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.auth import OPEN_PATHS
from api.errors import DOCUMENTED, ErrorResponse, refusals

TITLE = "Machineuse API"
VERSION = "2.0.0"
DESCRIPTION = "Distributed container management for browser automation"
TAGS = [
    {"name": "Health", "description": "Health check endpoints"},
    {"name": "Instances", "description": "Instance management"},
    {"name": "Nodes", "description": "Node management"},
    {"name": "Metrics", "description": "Metrics and monitoring"},
]
_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "string"},
    503: {"Retry-After": "integer"},
}


def make_document(app: FastAPI, *, tokens_needed: bool) -> dict[str, Any]:
    """Return the document of an app."""
    document = get_openapi(
        title=TITLE,
        version=VERSION,
        description=DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
        license_info={"name": "MIT", "url": "https://opensource.org/licenses/MIT"},
    )
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["schemas"]["ErrorResponse"] = ErrorResponse.model_json_schema()
    components["responses"] = {name: _response(status, text) for status, (name, text) in DOCUMENTED.items()}
    components["securitySchemes"] = {"bearerAuth": {"type": "http", "scheme": "bearer"}}
    if tokens_needed:
        document["security"] = [{"bearerAuth": []}]
    for path, item in document["paths"].items():
        for operation in item.values():
            _complete(operation, needs_token=tokens_needed and path not in OPEN_PATHS, tokens_needed=tokens_needed)
    return document


def _complete(operation: dict[str, Any], *, needs_token: bool, tokens_needed: bool) -> None:
    for part in (*operation.get("parameters", ()), *operation.get("requestBody", {}).get("content", {}).values()):
        part["schema"] = _without_null(part["schema"])
    responses = operation["responses"]
    responses.pop("422", None)
    if needs_token:
        responses.update({str(status): said for status, said in refusals(401).items()})
    elif tokens_needed:
        operation["security"] = []
    for status, said in responses.items():
        if "$ref" in said:
            responses[status] = {"$ref": said["$ref"]}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Turn `anyOf [X, null]` into X: what is left out of a query, or is no body at all, is not null."""
    meanings = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    if len(meanings) != 1:
        return schema
    if "$ref" in meanings[0]:
        return dict(meanings[0])
    return {**{key: schema[key] for key in schema if key != "anyOf"}, **meanings[0]}


def _response(status: int, description: str) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }
    if status in _HEADERS:
        response["headers"] = {name: {"schema": {"type": kind}} for name, kind in _HEADERS[status].items()}
    return response
