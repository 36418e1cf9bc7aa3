"""Puts the API together: `create_app(services)` is the whole of it.

A request passes, from the outside in: the access log (which also turns a crash into a plain 500), the gate (tokens, or
loopback only), the limit on bodies, then the routes.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware

from api import documents, errors
from api.access import AccessLog
from api.auth import Gate, check_binding
from api.intake import BodyLimit
from api.routers import health, instances, metrics, nodes
from api.services import Services
from api.waiting import Stopping


def create_app(services: Services) -> FastAPI:
    """Return the API over these services. Raises SettingsError where the settings would leave it open to others."""
    check_binding(services.settings)
    app = FastAPI(
        title=documents.TITLE,
        version=documents.VERSION,
        description=documents.DESCRIPTION,
        openapi_tags=documents.TAGS,
        redirect_slashes=False,
        redoc_url=None,
        separate_input_output_schemas=False,
        middleware=[Middleware(AccessLog), Middleware(Gate, services.settings), Middleware(BodyLimit)],
    )
    app.state.services = services
    app.state.stopping = Stopping()
    errors.install(app)
    for resource in (health, instances, nodes, metrics):
        app.include_router(resource.router)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(documents.make_document(app, tokens_needed=bool(services.settings.tokens)))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app
