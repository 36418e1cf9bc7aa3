"""An engine in memory: a stack, what a node really has, and the ways in which both can fail.

It does what the real one does, as far as the converger can tell: a target that the program declares is made or found,
one that it does not declare is deleted, one that is neither declared nor in the stack fails the whole update; what
depends on something that failed is left out; the stack is saved at the very end. What is made has contents, so that a
test can tell whose profile is where.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

from provisioner.engine import Program, UpdateResult
from provisioner.errors import EngineError, MachineuseError
from stacks.names import CONTAINER_TYPE, RESTORE_TYPE, SNAPSHOT_TYPE, VOLUME_TYPE, Names
from stacks.spec import InstanceSpec

EMPTY = "empty"
_ORDER = (VOLUME_TYPE, RESTORE_TYPE, CONTAINER_TYPE, SNAPSHOT_TYPE)
"""In which order the parts of an instance are made; the component, which is none of them, comes first."""


class Died(BaseException):
    """The process is killed here: nothing catches it."""


def declared_urns(specs: Iterable[InstanceSpec], *, names: Names) -> set[str]:
    """Return the URNs of what a program declares for these instances."""
    urns: set[str] = set()
    for spec in specs:
        urns.add(names.component_urn(spec.id))
        urns |= {names.snapshot_urn(spec.id, ref.generation) for ref in spec.snapshots}
        if spec.body:
            urns |= {names.volume_urn(spec.id), names.container_urn(spec.id)}
            if spec.restore is not None:
                urns.add(names.restore_urn(spec.id))
    return urns


class FakeEngine:
    """One stack and one node."""

    ON_NODES = frozenset({VOLUME_TYPE, RESTORE_TYPE, CONTAINER_TYPE})

    def __init__(self, names: Names) -> None:
        self.names = names
        self.resources: set[str] = set()
        """What the stack has."""
        self.made: dict[str, str] = {}
        """What the node and the snapshot store really have, by URN, and what is in it."""
        self.updates: list[tuple[str, ...]] = []
        self.fail: dict[str, str] = {}
        """Part of a URN → what the plugin says of its create."""
        self.fail_delete: dict[str, str] = {}
        self.down: MachineuseError | None = None
        self.poison: str | None = None
        """An instance with which every update fails as a whole."""
        self.die: str | None = None
        """`before` the update, `during` it (all is made, the stack is not saved) or `after` it."""
        self.before_delete: Callable[[str], None] = lambda _: None
        self.meanwhile: Callable[[], None] = lambda: None
        """Runs while an update does."""

    def update(self, program: Program, *, targets: Sequence[str] = (), refresh: bool = False) -> UpdateResult:
        """Run one update on exactly the targets."""
        self.updates.append(tuple(targets))
        if self.down is not None:
            raise self.down
        if self.die == "before":
            raise Died
        if self.poison is not None and any(self.poison in target for target in targets):
            raise EngineError(f"no update with {self.poison}")
        specs = _run(program)
        declared = declared_urns(specs, names=self.names)
        urns = {target.replace("Instanc*", "Instance"): "*" in target for target in targets}
        if lacking := [urn for urn, lenient in urns.items() if not lenient and urn not in declared | self.resources]:
            raise EngineError(f"neither declared nor in the stack: {lacking}")
        stack = set(self.resources)
        if refresh:
            if missing := [urn for urn, lenient in urns.items() if not lenient and urn not in self.resources]:
                raise EngineError(f"could not be found in the stack: {missing}")
            stack -= {urn for urn in urns if kind_of(urn) in (VOLUME_TYPE, CONTAINER_TYPE) and urn not in self.made}
        result = self._carry_out(urns, declared=declared, stack=stack, specs={spec.id: spec for spec in specs})
        self.meanwhile()
        if self.die == "during":
            raise Died
        self.resources = stack
        if self.die == "after":
            raise Died
        return result

    def _carry_out(
        self, urns: Iterable[str], *, declared: set[str], stack: set[str], specs: dict[str, InstanceSpec]
    ) -> UpdateResult:
        outputs: dict[str, dict[str, Any]] = {}
        errors: dict[str, str] = {}
        deleted: set[str] = set()
        broken: set[str] = set()  # instances of which something failed: nothing that depends on it is done
        for urn in sorted(urns, key=_rank):
            if urn not in declared or instance_of(urn) in broken:
                continue
            try:
                if urn not in stack:
                    self.make(urn, specs[instance_of(urn)])
            except EngineError as error:
                errors[urn] = error.message
                broken.add(instance_of(urn))
            else:
                stack.add(urn)
                outputs[urn] = {"bytes": 11.0} if kind_of(urn) == SNAPSHOT_TYPE else {"methodUsed": "quick_start"}
        broken.clear()
        for urn in sorted(urns, key=_rank, reverse=True):
            if urn in declared or urn not in stack or instance_of(urn) in broken:
                continue
            self.before_delete(urn)
            if (said := _find(self.fail_delete, urn) or self.remove(urn)) is not None:
                errors[urn] = said
                broken.add(instance_of(urn))
            else:
                stack.remove(urn)
                deleted.add(urn)
        return UpdateResult(
            outputs=outputs, deleted=frozenset(deleted), errors=errors, changed=len(outputs) + len(deleted)
        )

    def make(self, urn: str, spec: InstanceSpec) -> None:
        """Make what a resource stands for, or adopt it, or raise what its plugin says."""
        volume, container = self.names.volume_urn(spec.id), self.names.container_urn(spec.id)
        said = _find(self.fail, urn)
        if kind_of(urn) == SNAPSHOT_TYPE:
            self.capture(urn, instance_id=spec.id)
        elif kind_of(urn) == RESTORE_TYPE and container not in self.made:
            assert spec.restore is not None
            archive = self.names.snapshot_urn(spec.id, spec.restore.snapshot.generation)
            if archive not in self.made:
                raise EngineError("There is no such snapshot. [snapshot_missing]")
            self.made[volume] = self.made[archive] if said is None else "half"
        elif said is None and kind_of(urn) in (VOLUME_TYPE, CONTAINER_TYPE):
            self.made.setdefault(urn, EMPTY)
        if said is not None:
            raise EngineError(said)

    def remove(self, urn: str) -> str | None:
        """Remove what a resource stands for; return what kept it from that."""
        self.made.pop(urn, None)
        return None

    def capture(self, urn: str, *, instance_id: str) -> None:
        """Take a snapshot, or find the one that is there."""
        if (said := _find(self.fail, urn)) is not None:
            raise EngineError(said)
        if urn not in self.made:
            if self.names.container_urn(instance_id) not in self.made:
                raise EngineError("There is no container. [snapshot_failed]")
            self.made[urn] = self.made[self.names.volume_urn(instance_id)]


def instance_of(urn: str) -> str:
    """Return the id of the instance that a URN belongs to."""
    return "-".join(urn.rsplit("::", 1)[1].split("-")[:2])


def _run(program: Program) -> list[InstanceSpec]:
    specs: list[InstanceSpec] = []

    async def declare(_cluster: object, *, instances: Iterable[InstanceSpec], **_: object) -> None:
        specs.extend(instances)

    with patch("provisioner.converger.declare", declare):
        asyncio.run(program())  # type: ignore[arg-type]
    return specs


def _find(said: dict[str, str], urn: str) -> str | None:
    return next((text for part, text in said.items() if part in urn), None)


def kind_of(urn: str) -> str:
    """Return the type of a URN's resource."""
    return urn.split("::")[2].rsplit("$", 1)[-1]


def _rank(urn: str) -> tuple[int, str]:
    kind = kind_of(urn)
    return (_ORDER.index(kind) if kind in _ORDER else -1, urn)
