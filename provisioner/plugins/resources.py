"""What a resource type of a plugin has to be able to do, in plain Python.

`base.PluginServicer` speaks gRPC and calls these; nothing here knows protobuf. Errors are `provisioner.errors`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from provisioner.plugins.sessions import Session
from provisioner.plugins.values import Properties


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows about the call it serves."""

    urn: str
    name: str
    config: Mapping[str, Any]
    """The provider's configuration, e.g. `host`."""
    session: Session
    timeout_s: float | None = None
    """The resource's `customTimeouts`, if it has any."""

    @property
    def cancelled(self) -> threading.Event:
        """Return the event that is set when the user interrupts the run."""
        return self.session.cancelled

    @property
    def replacing(self) -> bool:
        """Say whether this run replaces the resource, so that a delete only makes room for its successor."""
        return self.urn in self.session.replacing

    def progress(self, message: str) -> None:
        """Show how far the work is; the next message takes its place."""
        self.session.show(message, urn=self.urn, passing=True)

    def say(self, message: str) -> None:
        """Show a message that stays."""
        self.session.show(message, urn=self.urn)

    def warn(self, message: str) -> None:
        """Show a warning that stays."""
        self.session.show(message, urn=self.urn, warning=True)


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that can't be taken, and why."""

    property: str
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """The inputs with their defaults filled in, or what is wrong with them."""

    inputs: Properties
    failures: tuple[Failure, ...] = ()


class ChangeKind(StrEnum):
    """What happened to a property."""

    ADD = "add"
    DELETE = "delete"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Change:
    """How one property differs, and whether only a new resource can have it so."""

    kind: ChangeKind
    replace: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """All properties that differ between what is and what is wanted; empty = nothing to do."""

    changes: Mapping[str, Change] = field(default_factory=dict)
    delete_before_replace: bool = True
    """Names are deterministic: the old resource must go before the new one can have its name."""


@dataclass(frozen=True, slots=True)
class Created:
    """A resource that exists now."""

    id: str
    outputs: Properties


@dataclass(frozen=True, slots=True)
class Found:
    """A resource as it is now; `inputs` as they would have to be to declare it so."""

    id: str
    inputs: Properties
    outputs: Properties


class ResourceType(ABC):
    """One resource type; instances serve many threads at once.

    Operations on one URN are never run at the same time. `create` must be idempotent: after a crash it is asked for
    again, and finds what it had already made. In a preview only `check`, `diff` and `read` are called.
    """

    computed: ClassVar[frozenset[str]] = frozenset()
    """Outputs that only an update can tell: unknown in a preview of a create."""

    def check(self, call: Call, *, olds: Properties, news: Properties) -> Checked:
        """Validate the wanted inputs and fill in defaults; may contain `UNKNOWN` in a preview."""
        del call, olds
        return Checked(inputs=news)

    @abstractmethod
    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """Compare what was recorded with what is wanted."""

    @abstractmethod
    def create(self, call: Call, *, inputs: Properties) -> Created:
        """Make the resource, or adopt the one that an interrupted run made."""

    @abstractmethod
    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        """Return the resource as it is now, or None when it is gone."""

    def update(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Properties:
        """Change the resource in place; return its new outputs. For types whose every change replaces: never called."""
        del id, old_inputs, old_outputs, news
        raise AssertionError(f"{call.urn} can't be changed in place")

    @abstractmethod
    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        """Remove the resource; one that is gone already is a success."""
