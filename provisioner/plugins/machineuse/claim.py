"""`machineuse:index:Claim`: the stack's tie to one ledger.

The first update records the ledger's id. A program that comes with another id (a fresh data directory, another
machine) is refused before anything else is looked at, so that "this ledger knows no instances" never deletes any.
"""

from __future__ import annotations

from provisioner.errors import LedgerMismatch
from provisioner.plugins.machineuse.inputs import ClaimInputs
from provisioner.plugins.machineuse.shared import MachineuseResource
from provisioner.plugins.resources import Call, Checked, Created, Difference, Found
from provisioner.plugins.values import Properties, has_unknowns


class ClaimType(MachineuseResource):
    """Refuses every ledger but the first."""

    model = ClaimInputs

    def check(self, call: Call, *, olds: Properties, news: Properties) -> Checked:
        """Validate the inputs; raises `LedgerMismatch` when the stack belongs to another ledger."""
        old, new = olds.get("ledgerId"), news.get("ledgerId")
        if old and old != new and not has_unknowns(new):
            raise LedgerMismatch(
                f"This stack belongs to the ledger {old}, and the one at hand is {new}.",
                resolution="Set MACHINEUSE_DATA_DIR to the data directory of the service that runs this cluster.",
            )
        return super().check(call, olds=olds, news=news)

    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """See no difference: `check` lets none through."""
        del call, id, old_inputs, old_outputs, news
        return Difference()

    def create(self, call: Call, *, inputs: Properties) -> Created:
        """Record the ledger's id."""
        del call
        return Created(id=inputs["ledgerId"], outputs={"ledgerId": inputs["ledgerId"]})

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        """Return what was recorded."""
        del call
        return Found(id=id, inputs=inputs, outputs=outputs)

    def update(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Properties:
        """Keep what was recorded."""
        del call, id, old_inputs, news
        return old_outputs

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        """Give the stack back; there is nothing outside it."""
        del call, id, inputs, outputs
