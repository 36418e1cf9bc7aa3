"""What `pulumi up` and `pulumi preview` run: everything that the cluster's ledger wants.

The one file here that reads the ledger. Without this cluster's own ledger it refuses: that nothing is known must never
look as if nothing were wanted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pulumi
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from provisioner.cluster import APPLIED, fingerprint
from provisioner.clusterfile import explain, find_clash
from provisioner.errors import MachineuseError
from provisioner.ledger import Ledger
from provisioner.settings import Settings
from provisioner.specs import specs_of
from stacks.cluster import declare
from stacks.spec import FIELDS, ClusterSpec


async def main() -> None:
    """Declare the cluster named like the stack, with all instances of its ledger."""
    config = pulumi.Config("cluster")
    fields = {name: config.get_object(name) for name in FIELDS}
    said = {name: value for name, value in fields.items() if value is not None}
    try:
        spec = ClusterSpec.model_validate({"name": pulumi.get_stack(), **said})
    except ValidationError as error:
        raise pulumi.RunError(f"Pulumi.{pulumi.get_stack()}.yaml: {explain(error, fields=said)}") from error
    if (clash := find_clash(spec)) is not None:
        raise pulumi.RunError(f"Pulumi.{pulumi.get_stack()}.yaml: {clash[1]}")
    try:
        ledger = Ledger.open(Settings().ledger_location)
        ledger.check_cluster(spec.name)
    except MachineuseError as error:
        raise pulumi.RunError(error.explain()) from error
    if not pulumi.runtime.is_dry_run() and ledger.fact(APPLIED) != fingerprint(spec):
        # Another version of the file than the service knows the stack to have: it looks at its next start.
        ledger.write_fact(APPLIED, "an operator's")
    await declare(spec, ledger_id=ledger.id, instances=specs_of(ledger.instances.all()))


pulumi.run(main)
