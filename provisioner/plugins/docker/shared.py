"""What the resource types of the docker package have in common: the table, the host, labels, and deletes by policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import structlog

from provisioner.docker_hosts.hosts import LOCAL_ENGINE, DockerHost, DockerHosts
from provisioner.errors import NodeUnreachable, StillWanted
from provisioner.plugins.docker.properties import Table, check_inputs, compare
from provisioner.plugins.policy import DeleteDecision, DeletePolicy
from provisioner.plugins.resources import Call, Checked, Difference, ResourceType
from provisioner.plugins.values import Properties
from stacks.names import LEDGER_LABEL, URN_LABEL

log = structlog.get_logger(__name__)


def read_labels(properties: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of a resource's inputs or outputs as a map."""
    return {item["label"]: item["value"] for item in properties.get("labels") or []}


def write_labels(labels: Mapping[str, str] | None) -> list[dict[str, str]]:
    """Return labels in the form of inputs and outputs."""
    return [{"label": label, "value": value} for label, value in sorted((labels or {}).items())]


def is_ours(live: Mapping[str, str] | None, *, wanted: Mapping[str, str]) -> bool:
    """Say whether something that exists was made for the resource whose labels are `wanted`.

    URN and ledger name a resource in the world. One that is wanted without them is never taken for ours.
    """
    if URN_LABEL not in wanted or LEDGER_LABEL not in wanted:
        return False
    return all((live or {}).get(label) == wanted[label] for label in (URN_LABEL, LEDGER_LABEL))


class DockerResources(ResourceType):
    """Base of the package's resource types: goes by a table, finds the host of a call, and asks before it deletes."""

    table: ClassVar[Table]

    def __init__(self, hosts: DockerHosts, policy: DeletePolicy) -> None:
        self._hosts = hosts
        self._policy = policy

    def check(self, call: Call, *, olds: Properties, news: Properties) -> Checked:
        """Validate the wanted inputs and fill in defaults, by the table."""
        del call, olds
        return check_inputs(self.table, news)

    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """Compare what was recorded with what is wanted, by the table."""
        del call, id
        return compare(self.table, old_inputs=old_inputs, old_outputs=old_outputs, news=news)

    def _host(self, call: Call) -> DockerHost:
        config = call.config
        ssh_opts = config.get("sshOpts") or ()
        return self._hosts.get(
            str(config.get("host") or LOCAL_ENGINE),
            cert_path=config.get("certPath") or None,
            ssh_opts=json.loads(ssh_opts) if isinstance(ssh_opts, str) else ssh_opts,  # the engine sends lists as JSON
        )

    def _delete(
        self,
        call: Call,
        *,
        kind: str,
        name: str,
        outputs: Properties,
        remove: Callable[[DockerHost, DeleteDecision], None],
    ) -> None:
        """Run `remove` if the policy allows it.

        Raises `StillWanted`, with nothing touched, when it does not. A node that does not answer is `NodeUnreachable`,
        unless the policy says `force` or `abandon`: then what is left is noted, and the resource counts as deleted.
        """
        host = self._host(call)
        decision = self._policy.check_delete(
            urn=call.urn, labels=read_labels(outputs), kind=kind, replacing=call.replacing
        )
        if not decision.allowed:
            raise StillWanted(decision.reason or f"The {kind} {name} is still wanted.", detail=call.urn)
        try:
            if decision.abandon:
                raise NodeUnreachable(f"The Docker engine at {host.url} does not answer.")
            remove(host, decision)
        except NodeUnreachable as error:
            if not decision.force and not decision.abandon:
                raise
            log.warning("left on unreachable node", kind=kind, name=name, host=host.url, urn=call.urn)
            call.warn(f"{error.message} The {kind} {name} is left there until it is back.")
            self._policy.note_leftover(urn=call.urn, host=host.url, name=name)
