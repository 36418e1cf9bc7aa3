"""The mark that a restore leaves in a home volume as its last act: which snapshot is in it, and how it got there."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, ValidationError


class Method(StrEnum):
    """How a snapshot is given back; the API's words."""

    QUICK_START = "quick_start"
    FULL_RESTORE = "full_restore"


MARK_NAME = ".machineuse-restored"
"""The mark's file, in the home directory."""


class Mark(BaseModel):
    """What was restored.

    The browser's user can write such a file too. It proves that a restore was completed only where `home_sha256` is
    that of the archive being restored, which nothing inside that archive can know.
    """

    model_config = ConfigDict(frozen=True)

    generation: int
    home_sha256: str
    method_used: Method
    fallback_reason: str | None


def parse_mark(text: str | None) -> Mark | None:
    """Return the mark that a file holds, or None when it holds none."""
    if text is None:
        return None
    try:
        return Mark.model_validate_json(text)
    except ValidationError:
        return None
