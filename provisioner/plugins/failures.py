"""Our errors as the engine gets them, and back.

The engine shows a plugin's error as text, in its events too. Ours end in their code in square brackets, so that whoever
reads the events (the converger) can tell a taken port from an unreachable node without guessing at words.
"""

from __future__ import annotations

import re

import grpc

from provisioner.errors import (
    Conflict,
    DockerNotFound,
    InvalidRequest,
    MachineuseError,
    NodeUnreachable,
    NotFound,
    PortTaken,
)

_LIMIT = 4000  # gRPC carries the text in a header
_CODE = re.compile(r"\[([a-z]+(?:_[a-z]+)+)\]")
_STATUS: tuple[tuple[type[MachineuseError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (DockerNotFound, grpc.StatusCode.NOT_FOUND),
    (PortTaken, grpc.StatusCode.ALREADY_EXISTS),
    (Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (NodeUnreachable, grpc.StatusCode.UNAVAILABLE),
)


def describe(error: MachineuseError) -> str:
    """Return the one text that the engine is given: what happened, what to do, and `[code]` at the end."""
    return f"{error.explain()[:_LIMIT]} [{error.code}]"


def read_code(text: str) -> str | None:
    """Return the code of the last error that `describe` wrote into the text, or None."""
    codes = _CODE.findall(text)
    return codes[-1] if codes else None


def status_of(error: MachineuseError) -> grpc.StatusCode:
    """Return a status that the engine takes as "failed, and the resource is as it was".

    Internal, DataLoss and Unknown would make it record the resource as in an unknown state; ours is always known,
    because creating is idempotent.
    """
    return next((status for kind, status in _STATUS if isinstance(error, kind)), grpc.StatusCode.FAILED_PRECONDITION)
