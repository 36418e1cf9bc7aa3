"""Turns what the engine says of a failed resource back into the error that a plugin raised."""

from __future__ import annotations

import re
from collections.abc import Iterator

from provisioner.errors import (
    EngineError,
    InvalidRequest,
    LedgerMismatch,
    MachineuseError,
    SnapshotCorrupt,
    SnapshotMissing,
    StillWanted,
)
from provisioner.plugins.failures import read_code

PERMANENT = (InvalidRequest, SnapshotCorrupt, SnapshotMissing, LedgerMismatch, StillWanted)
"""Failures that trying again does not mend."""

_NOISE = re.compile(r"^(error: )?(rpc error: code = \w+ desc = )?", re.MULTILINE)
_CODE = re.compile(r"\s*\[[a-z_]+\]\s*$")


def error_of(text: str) -> MachineuseError:
    """Return the error that the text tells of: of its own class where it ends in a code, else an EngineError."""
    code = read_code(text)
    said = next((line for line in text.splitlines() if code and f"[{code}]" in line), text)
    message = _CODE.sub("", _NOISE.sub("", said.strip())).strip() or "The Pulumi engine failed."
    for kind in _family(MachineuseError):
        if code is not None and kind.code == code:
            return kind(message, detail=text)
    return EngineError(message, detail=text)


def _family(kind: type[MachineuseError]) -> Iterator[type[MachineuseError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)
