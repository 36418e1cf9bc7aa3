"""Whether a cluster may become what its edited file says: never by losing somebody's browser.

Refused, by a Conflict that says what to do instead:

- A node is gone from the file, but an instance has its container there. (Drain the node first.)
- A node that has instances gets another `host`, or other `ssh_opts`, and behind that is another engine: one that
  lacks their homes.
- A node that has instances on cloud volumes is no cloud machine any more.
- A new node's `host` leads to the engine of another node: each would take the other's containers for its own.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.inventory import find_owner, list_volumes
from provisioner.errors import Conflict, DockerError
from provisioner.health import MOST_NODES_AT_ONCE
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.states import Wanted
from stacks.names import Names
from stacks.spec import ClusterSpec, NodeSpec


class ClusterCheck:
    """Checks edits of one cluster's file against what is on the nodes."""

    def __init__(self, ledger: Ledger, *, hosts: DockerHosts, cluster: str, file: str) -> None:
        """Check for a `cluster` of that name; `file` is how messages call its file."""
        self._ledger = ledger
        self._hosts = hosts
        self._names = Names(cluster)
        self._file = file

    def may_take_over(self, *, gone: Iterable[str], moved: Iterable[NodeSpec], nodes: Iterable[NodeSpec]) -> bool:
        """Return whether these `nodes` may be taken over now; False while something leaves by itself.

        Raises Conflict.
        """
        bodies: defaultdict[str, list[InstanceRecord]] = defaultdict(list)
        for record in self._ledger.instances.all():
            if record.body:
                bodies[record.node_id].append(record)
        leaving = False
        for node_id in sorted(gone):
            staying = [record.id for record in bodies[node_id] if not is_leaving(record)]
            if staying:
                raise Conflict(
                    f"{self._file} does not name node '{node_id}' any more, but {_count(staying)} there.",
                    resolution=f"Put the node back into the file, drain it (`machineuse node drain {node_id}`), then"
                    f" remove it. If it is gone for good: `machineuse node remove {node_id} --force`.",
                )
            leaving |= bool(bodies[node_id])
        for node in moved:
            if bodies[node.id]:
                self._refuse_other_engine(node, there=bodies[node.id])
        for node in nodes:
            homes = [record.id for record in bodies[node.id] if record.volume == "ebs"]
            if homes and node.cloud is None:
                raise Conflict(
                    f"Node '{node.id}' has no `cloud` any more, but {_count(homes)} on cloud volumes there.",
                    resolution=f"Put its instance_id and zone back, drain it (`machineuse node drain {node.id}`), then"
                    " change it.",
                )
        return not leaving

    def _refuse_other_engine(self, node: NodeSpec, *, there: Collection[InstanceRecord]) -> None:
        """Raise Conflict for a node whose new host is not the engine that has the homes of the instances `there`.

        Containers would be missed there, and made again around empty homes.
        """
        resolution = f"Put its former host back, drain it (`machineuse node drain {node.id}`), then change it."
        try:
            volumes = list_volumes(self._hosts.of(node), cluster=self._names.cluster, ledger_id=self._ledger.id)
        except DockerError as error:
            raise Conflict(
                f"Node '{node.id}' can't become {node.host} now: {_count([r.id for r in there])} there, and whether"
                f" that is the same engine can't be told. {error.message}",
                detail=error.detail,
                resolution=resolution,
            ) from error
        homes = {volume.name for volume in volumes}
        without = [record.id for record in there if self._names.docker_volume(record.id) not in homes]
        if without:
            raise Conflict(
                f"Node '{node.id}' can't become {node.host}: {_count(without)} there, and that engine does not have"
                " their homes.",
                resolution=resolution,
            )

    def refuse_known_engines(self, added: Collection[NodeSpec], *, spec: ClusterSpec) -> None:
        """Raise Conflict for a new node whose engine another node is; one that does not answer can't be asked."""
        with ThreadPoolExecutor(max_workers=MOST_NODES_AT_ONCE) as pool:
            owners = list(pool.map(self._owner_of, added))
        for node, owner in zip(added, owners, strict=True):
            if owner not in (None, node.id) and spec.node(str(owner)) is not None:
                raise Conflict(
                    f"Node '{node.id}' can't be added: behind {node.host} is the engine of node '{owner}'.",
                    resolution=f"To reach node '{owner}' that way, change its host.",
                )

    def _owner_of(self, node: NodeSpec) -> str | None:
        with contextlib.suppress(DockerError):
            return find_owner(self._hosts.of(node), cluster=self._names.cluster, ledger_id=self._ledger.id)
        return None


def is_leaving(record: InstanceRecord) -> bool:
    """Say whether an instance's body is about to go from its node by itself."""
    return record.wanted is Wanted.ABSENT or record.sleeps_safely


def _count(instance_ids: Collection[str]) -> str:
    shown = ", ".join(sorted(instance_ids)[:3]) + (", …" if len(instance_ids) > 3 else "")
    return f"instance {shown} is" if len(instance_ids) == 1 else f"{len(instance_ids)} instances ({shown}) are"
