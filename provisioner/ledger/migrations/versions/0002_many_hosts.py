"""Many hosts: labels, availability, moves, live snapshots, and leases of several control planes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("instances", sa.Column("node_labels", sa.JSON(), server_default="{}", nullable=False))
    op.add_column("instances", sa.Column("volume", sa.String(length=16), server_default="docker", nullable=False))
    op.add_column("instances", sa.Column("moving", sa.String(length=16), nullable=True))
    op.add_column("snapshots", sa.Column("live", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("snapshots", sa.Column("volume", sa.String(length=16), server_default="docker", nullable=False))
    op.add_column("nodes", sa.Column("offline_since", sa.Float(), nullable=True))
    op.add_column("nodes", sa.Column("availability", sa.String(length=16), server_default="active", nullable=False))
    op.add_column("nodes", sa.Column("labels", sa.JSON(), server_default="{}", nullable=False))
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("taken_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def downgrade() -> None:
    op.drop_table("leases")
    for table, names in (
        ("nodes", ("labels", "availability", "offline_since")),
        ("snapshots", ("volume", "live")),
        ("instances", ("moving", "volume", "node_labels")),
    ):
        with op.batch_alter_table(table) as batch:
            for name in names:
                batch.drop_column(name)
