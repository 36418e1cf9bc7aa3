"""`machineuse:index:Restore`: a home volume filled from a snapshot, and the image to run on it.

The container takes its image from the output `image`, so it can't start before the volume is whole. What was restored
is never compared again: from then on the volume lives its own life.
"""

from __future__ import annotations

from typing import ClassVar

from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import NodeUnreachable
from provisioner.plugins.machineuse.inputs import RestoreInputs, differ, parse
from provisioner.plugins.machineuse.shared import MachineuseResource
from provisioner.plugins.policy import DeletePolicy
from provisioner.plugins.resources import Call, Created, Difference, Found
from provisioner.plugins.values import Properties
from provisioner.snapshots.machine import Volumes
from provisioner.snapshots.restore import RestoreRequest, restore, restored_tag
from provisioner.snapshots.store import SnapshotStore
from stacks.names import CLUSTER_LABEL, INSTANCE_LABEL, LEDGER_LABEL

_ANY_HOME = "/home/machine"


class RestoreType(MachineuseResource):
    """Restores snapshots."""

    model = RestoreInputs
    computed: ClassVar[frozenset[str]] = frozenset({"methodUsed", "fallbackReason", "bytes"})

    def __init__(self, *, store: SnapshotStore, hosts: DockerHosts, policy: DeletePolicy) -> None:
        self._store = store
        self._hosts = hosts
        self._policy = policy

    def diff(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Difference:
        """See a difference only in which snapshot it was."""
        del call, id
        # The output `image` is not the input of that name: only identity counts, and that is the same in both.
        return differ(("instance", "snapshotGeneration"), old=old_outputs | old_inputs, new=news)

    def create(self, call: Call, *, inputs: Properties) -> Created:
        """Restore the snapshot, or find that an interrupted run did.

        Raises `SnapshotMissing`, `SnapshotCorrupt`, `Conflict`.
        """
        wanted = parse(RestoreInputs, inputs)
        result = restore(
            RestoreRequest(
                snapshot=wanted.snapshot,
                method=wanted.method,
                volumes=Volumes(home=wanted.volume, copy=wanted.copy_volume, home_path=_ANY_HOME),
                image=wanted.image,
                home_restored=wanted.cloud_volume is not None,
            ),
            machine=self._machine(wanted),
            store=self._store,
            progress=call.progress,
        )
        if result.fallback_reason is not None:
            call.warn(f"Restored from the archive instead of the node's copy: {result.fallback_reason}")
        outputs = inputs | {
            "methodUsed": result.method_used.value,
            "fallbackReason": result.fallback_reason,
            "image": result.image,
            "bytes": result.bytes,
        }
        return Created(id=f"{wanted.snapshot}/restored", outputs=outputs)

    def read(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> Found | None:
        """Return what was recorded: what was done stays done."""
        del call
        return Found(id=id, inputs=inputs, outputs=outputs)

    def update(
        self, call: Call, *, id: str, old_inputs: Properties, old_outputs: Properties, news: Properties
    ) -> Properties:
        """Take over new inputs, all but `image`: the output of that name is what the container runs."""
        del call, id, old_inputs
        return old_outputs | {key: value for key, value in news.items() if key != "image"}

    def delete(self, call: Call, *, id: str, inputs: Properties, outputs: Properties) -> None:
        """Remove the image that was built, unless something still uses it; never fails for that."""
        del id
        gone = parse(RestoreInputs, outputs | inputs)
        tag = restored_tag(gone.snapshot)
        if outputs.get("image") != tag:
            return
        labels = {INSTANCE_LABEL: gone.instance, LEDGER_LABEL: gone.ledger_id}
        decision = self._policy.check_delete(urn=call.urn, labels=labels, kind="restore", replacing=call.replacing)
        try:
            if decision.abandon:
                raise NodeUnreachable(f"Node {gone.node_id} does not answer.")
            self._machine(gone).remove_image(tag)
        except NodeUnreachable:
            self._policy.note_leftover(urn=call.urn, host=gone.docker_host, name=tag)

    def _machine(self, inputs: RestoreInputs) -> DockerMachine:
        return DockerMachine(
            inputs.host(self._hosts),
            helper_image=inputs.helper_image,
            labels={CLUSTER_LABEL: inputs.cluster, LEDGER_LABEL: inputs.ledger_id},
        )
