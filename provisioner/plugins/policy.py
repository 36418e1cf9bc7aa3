"""Whether our plugins may delete something: asked before every delete, answered by whoever knows what is wanted.

The plugin itself can't know: the engine tells it to delete whatever a program did not declare, and a program that could
not read its ledger declares nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from stacks.names import INSTANCE_LABEL


@dataclass(frozen=True, slots=True)
class DeleteDecision:
    """The answer, and how to go about it."""

    allowed: bool
    reason: str = ""
    """Why not: a sentence for the operator."""
    force: bool = False
    """Kill instead of stop, and take an unreachable node for an answer."""
    abandon: bool = False
    """Do not even ask the node, which is known not to answer: note what is left there."""
    stop_timeout_s: int = 10
    """How long a container may take to stop before it is killed."""


class DeletePolicy(Protocol):
    """Answers for every delete; called by many threads."""

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        """Decide about a `container`, `volume`, `mount` or `network` (or a kind of the machineuse plugin).

        A `mount` is a volume that only names a device.

        `labels` are the ones recorded in the stack. `replacing`: its successor is created in the same run, under the
        same URN; what is in it (a volume's files, a container's layer) is lost all the same.
        """

    def is_away(self, node_id: str) -> bool:
        """Say whether a node is known not to answer: whoever asks it all the same holds up the whole update."""

    def note_leftover(self, *, urn: str, host: str, name: str) -> None:
        """Remember that something was left on a host that did not answer, to be removed when it is back."""

    def note_image(self, *, node_id: str, name: str) -> None:
        """Remember that an image was brought to a node, and may be removed there once nothing needs it."""


class RefuseWithoutLedger:
    """The policy where no ledger is at hand: nothing that belongs to an instance is deleted."""

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        """Allow only what belongs to no instance."""
        del urn, replacing
        instance = labels.get(INSTANCE_LABEL)
        if instance is None:
            return DeleteDecision(allowed=True)
        return DeleteDecision(
            allowed=False,
            reason=f"The {kind} of instance {instance} is not deleted without the ledger that says it may be. "
            "Set MACHINEUSE_DATA_DIR to the data directory of the service that runs this cluster.",
        )

    def is_away(self, node_id: str) -> bool:
        """Know of none."""
        del node_id
        return False

    def note_leftover(self, *, urn: str, host: str, name: str) -> None:
        """Forget it: there is nowhere to write it down."""

    def note_image(self, *, node_id: str, name: str) -> None:
        """Forget it: the image is never removed then."""
