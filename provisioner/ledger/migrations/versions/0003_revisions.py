"""Revisions of nodes, by which a placement finds those that have changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from provisioner.ledger.tables import Long

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("revision", Long, server_default="0", nullable=False))
    op.create_index(op.f("ix_nodes_revision"), "nodes", ["revision"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_nodes_revision"), table_name="nodes")
    with op.batch_alter_table("nodes") as batch:
        batch.drop_column("revision")
