"""Says which ledger a stack belongs to.

The first full update records the ledger's id; the plugin refuses every later one that comes with another id.
"""

from __future__ import annotations

import pulumi

from stacks.names import CLAIM_TYPE


class Claim(pulumi.CustomResource):
    """The stack's tie to one ledger."""

    ledger_id: pulumi.Output[str]

    def __init__(self, resource_name: str, *, ledger_id: str) -> None:
        super().__init__(CLAIM_TYPE, resource_name, {"ledgerId": ledger_id})
