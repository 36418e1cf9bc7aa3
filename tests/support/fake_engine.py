"""An engine in memory: keeps the set of resources that a stack would have, and fails or dies where it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from provisioner.engine import Program, UpdateResult
from provisioner.errors import EngineError


class Died(BaseException):
    """The process is killed here: nothing catches it."""


class FakeEngine:
    """Creates plain targets, deletes targets given as patterns (see `stacks.names.if_there`)."""

    def __init__(self) -> None:
        self.resources: set[str] = set()
        self.updates: list[tuple[str, ...]] = []
        self.fail: dict[str, str] = {}
        """Part of a URN → what the plugin says of its create."""
        self.fail_delete: dict[str, str] = {}
        self.down: EngineError | None = None
        self.die: str | None = None
        """`before` or `after` the update is carried out."""
        self.before_delete: Callable[[str], None] = lambda _: None

    def update(self, program: Program, *, targets: Sequence[str] = (), refresh: bool = False) -> UpdateResult:
        del program, refresh
        self.updates.append(tuple(targets))
        if self.down is not None:
            raise self.down
        if self.die == "before":
            raise Died
        outputs: dict[str, dict[str, object]] = {}
        deleted: set[str] = set()
        errors: dict[str, str] = {}
        for target in targets:
            urn = target.replace("Instanc*", "Instance")
            fail = self.fail if urn == target else self.fail_delete
            said = next((text for part, text in fail.items() if part in urn), None)
            if said is not None:
                errors[urn] = said
            elif urn != target:
                self.before_delete(urn)
                self.resources.discard(urn)
                deleted.add(urn)
            else:
                self.resources.add(urn)
                outputs[urn] = {"bytes": 11.0} if "Snapshot" in urn else {"methodUsed": "quick_start"}
        if self.die == "after":
            raise Died
        return UpdateResult(outputs=outputs, deleted=frozenset(deleted), errors=errors, changed=len(outputs))
