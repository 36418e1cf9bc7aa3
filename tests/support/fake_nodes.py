"""Several nodes in memory, any of which may fall silent: who is asked then learns that it does not answer.

The stack and the snapshot store are one, as in `fake_engine`; volumes and containers are each on a node. What is on a
silent node stays there, whatever becomes of it in the stack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from provisioner.errors import EngineError
from provisioner.plugins.policy import DeleteDecision
from stacks.names import RESTORE_TYPE, SNAPSHOT_TYPE, Names
from stacks.spec import InstanceSpec
from tests.support.fake_engine import EMPTY, FakeEngine, kind_of

SILENT = "It does not answer. [node_unreachable]"


class FakeNodes(FakeEngine):
    """One stack and several nodes."""

    def __init__(self, names: Names) -> None:
        super().__init__(names)
        self.bodies: defaultdict[str, dict[str, str]] = defaultdict(dict)
        """What each node has: volumes and containers, by URN, and what is in them."""
        self.silent: set[str] = set()
        self.decide: Callable[[str], DeleteDecision] = lambda _: DeleteDecision(allowed=True)
        """What the ledger says of a delete."""
        self.note_leftover: Callable[[str, str], None] = lambda _node, _urn: None
        self.is_away: Callable[[str], bool] = lambda _: False
        """Whether the ledger knows that a node does not answer."""
        self.node_of: Callable[[str], str] = lambda _: ""
        """Where the ledger says that an instance is."""
        self._where: dict[str, str] = {}
        """The node that each resource of the stack is on."""

    def capture(self, urn: str, *, instance_id: str) -> None:
        """Take a snapshot of what the instance's node has; one that is whole needs nothing of a node that is away."""
        node_id = self.node_of(instance_id)
        if urn in self.made and self.is_away(node_id):
            return
        if node_id in self.silent:
            raise EngineError(SILENT)
        if urn not in self.made:
            home = self.bodies[node_id].get(self.names.volume_urn(instance_id))
            if home is None:
                raise EngineError("There is no container. [snapshot_failed]")
            self.made[urn] = home

    def make(self, urn: str, spec: InstanceSpec) -> None:
        """Make what a resource stands for on the node that its program names."""
        if kind_of(urn) == SNAPSHOT_TYPE:
            self.capture(urn, instance_id=spec.id)
            return
        if kind_of(urn) not in self.ON_NODES:
            return
        if spec.node_id in self.silent:
            raise EngineError(SILENT)
        here = self.bodies[spec.node_id]
        self._where[urn] = spec.node_id
        if kind_of(urn) != RESTORE_TYPE:
            here.setdefault(urn, EMPTY)
        elif self.names.container_urn(spec.id) not in here:
            assert spec.restore is not None
            here[self.names.volume_urn(spec.id)] = self.made[
                self.names.snapshot_urn(spec.id, spec.restore.snapshot.generation)
            ]

    def remove(self, urn: str) -> str | None:
        """Remove what a resource stands for, as the plugins do; return what kept it from that."""
        decision = self.decide(urn)
        assert decision.allowed, decision.reason
        if kind_of(urn) not in self.ON_NODES:
            self.made.pop(urn, None)
            return None
        node_id = self._where[urn]
        if decision.abandon or (decision.force and node_id in self.silent):
            self.note_leftover(node_id, urn)
        elif node_id in self.silent:
            return SILENT
        else:
            self.bodies[node_id].pop(urn, None)
        return None
