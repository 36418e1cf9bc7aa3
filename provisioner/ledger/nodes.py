"""Nodes in the ledger: the cluster's file, and what the heartbeats said."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from provisioner.errors import Conflict, NotFound
from provisioner.ledger import tables
from provisioner.ledger.database import Database
from provisioner.ledger.events import add_event
from provisioner.ledger.loads import NEXT_REVISION
from provisioner.ledger.records import NodeRecord, NodeStatus
from provisioner.states import Wanted
from stacks.spec import Availability, NodeSpec


class Nodes:
    """The table of nodes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def sync(self, specs: Sequence[NodeSpec], *, whole: bool = False) -> None:
        """Make the table name the nodes of the cluster's file; what was observed of a known node is kept.

        A node that the file does not name any more stays while an instance has a body there. With `whole` that is a
        Conflict, and nothing is written: whoever gets none knows that nothing can be placed on such a node any more.
        """
        table = tables.nodes
        with self._database.write() as connection:
            known = set(connection.scalars(sa.select(table.c.id)))
            gone = known - {spec.id for spec in specs}
            holds = sa.or_(tables.instances.c.body, tables.instances.c.wanted == Wanted.RUNNING.value)
            in_use = gone & set(connection.scalars(sa.select(tables.instances.c.node_id).where(holds).distinct()))
            if whole and in_use:
                raise Conflict(f"Node '{min(in_use)}' has instances.")
            for spec in specs:
                said = {
                    "host": spec.host,
                    "address": spec.address,
                    "max_instances": spec.max_instances,
                    "availability": spec.availability.value,
                    "revision": NEXT_REVISION,
                }
                if spec.id in known:
                    connection.execute(table.update().where(table.c.id == spec.id).values(**said))
                else:
                    connection.execute(
                        table.insert().values(
                            id=spec.id,
                            **said,
                            labels=spec.labels,
                            status=NodeStatus.OFFLINE.value,
                            misses=0,
                            disk_quota=False,
                        )
                    )
            for node_id in gone - in_use:  # after the others got newer revisions: none is given twice
                connection.execute(table.delete().where(table.c.id == node_id))

    def list(self, node_ids: Collection[str] | None = None) -> list[NodeRecord]:
        """Return every node, or those of these ids, by id."""
        query = sa.select(tables.nodes).order_by(tables.nodes.c.id)
        if node_ids is not None:
            query = query.where(tables.nodes.c.id.in_(node_ids))
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [_record(row) for row in rows]

    def online(self) -> set[str]:
        """Return the ids of the nodes that answer."""
        query = sa.select(tables.nodes.c.id).where(tables.nodes.c.status == NodeStatus.ONLINE.value)
        with self._database.read() as connection:
            return set(connection.scalars(query))

    def is_offline(self, node_id: str) -> bool:
        """Say whether a node is known not to answer."""
        query = sa.select(tables.nodes.c.status).where(tables.nodes.c.id == node_id)
        with self._database.read() as connection:
            return connection.scalar(query) == NodeStatus.OFFLINE.value

    def get(self, node_id: str) -> NodeRecord:
        """Return the node; raise NotFound."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(tables.nodes).where(tables.nodes.c.id == node_id)).mappings().first()
        if row is None:
            raise NotFound(f"There is no node '{node_id}'.")
        return _record(row)

    def observe(self, node_id: str, *, values: Mapping[str, Any], event: tuple[str, str] | None = None) -> None:
        """Write what was observed of a node, with an event when something changed for people."""
        plain = {k: v.value if isinstance(v, NodeStatus) else v for k, v in values.items()}
        update = tables.nodes.update().where(tables.nodes.c.id == node_id)
        with self._database.write() as connection:
            connection.execute(update.values(**plain, revision=NEXT_REVISION))
            if event is not None:
                add_event(connection, kind=event[0], message=event[1], node_id=node_id)


def _record(row: sa.RowMapping) -> NodeRecord:
    typed = {"status": NodeStatus(row["status"]), "availability": Availability(row["availability"])}
    return NodeRecord(**{str(k): v for k, v in row.items() if k != "revision"} | typed)
