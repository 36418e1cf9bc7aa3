"""Which images the service has brought to which nodes: only those may be removed again when nothing needs them."""

from __future__ import annotations

import time

import sqlalchemy as sa

from provisioner.ledger import tables
from provisioner.ledger.database import Database


class NodeImages:
    """The table of brought images."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, *, node_id: str, name: str) -> None:
        """Note that an image was brought to a node, by that name, and is used now. Idempotent."""
        with self._database.write() as connection:
            connection.execute(tables.node_images.delete().where(*_is(node_id, name)))
            connection.execute(tables.node_images.insert().values(node_id=node_id, name=name, used_at=time.time()))

    def note_use(self, *, node_id: str, name: str) -> None:
        """Note that an image is used again; nothing for one that was there without us."""
        with self._database.write() as connection:
            connection.execute(tables.node_images.update().where(*_is(node_id, name)).values(used_at=time.time()))

    def list(self, node_id: str) -> dict[str, float]:
        """Return the images that were brought to a node: name → when it was used last."""
        table = tables.node_images
        with self._database.read() as connection:
            rows = connection.execute(sa.select(table.c.name, table.c.used_at).where(table.c.node_id == node_id))
            return {row.name: row.used_at for row in rows}

    def forget(self, *, node_id: str, name: str) -> None:
        """Forget an image that is gone."""
        with self._database.write() as connection:
            connection.execute(tables.node_images.delete().where(*_is(node_id, name)))


def _is(node_id: str, name: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return tables.node_images.c.node_id == node_id, tables.node_images.c.name == name
