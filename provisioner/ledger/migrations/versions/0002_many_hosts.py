"""Many hosts: labels, availability, moves, live snapshots, sums of what nodes promised, and leases."""

from __future__ import annotations

import math

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
        "node_images",
        sa.Column("node_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=512), nullable=False),
        sa.Column("used_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("node_id", "name"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("taken_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    _sum_up_loads()


def _sum_up_loads() -> None:
    """Make the table of what each node has promised, from the instances that there are."""
    loads = op.create_table(
        "node_loads",
        sa.Column("node_id", sa.String(length=64), nullable=False),
        sa.Column("instances", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.BigInteger(), nullable=False),
        sa.Column("cpu_cores", sa.Integer(), nullable=False),
        sa.Column("disk_mib", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node_id"),
        sqlite_with_rowid=False,
    )
    instances = sa.table(
        "instances",
        *(sa.column(name) for name in ("node_id", "memory_gb", "cpu_cores", "disk_gb", "wanted")),
        sa.column("body", sa.Boolean()),
    )
    columns = instances.c
    held = sa.select(columns.node_id, columns.memory_gb, columns.cpu_cores, columns.disk_gb).where(
        sa.or_(columns.body, columns.wanted == "running")
    )
    sums: dict[str, list[int]] = {}
    for node_id, memory_gb, cpu_cores, disk_gb in op.get_bind().execute(held):
        amounts = (1, math.ceil(memory_gb * 1024), cpu_cores, math.ceil(disk_gb * 1024))
        sums[node_id] = [a + b for a, b in zip(sums.get(node_id, (0, 0, 0, 0)), amounts, strict=True)]
    names = ("instances", "memory_mib", "cpu_cores", "disk_mib")
    op.bulk_insert(
        loads, [{"node_id": node_id, **dict(zip(names, found, strict=True))} for node_id, found in sums.items()]
    )


def downgrade() -> None:
    op.drop_table("node_loads")
    op.drop_table("leases")
    op.drop_table("node_images")
    for table, names in (
        ("nodes", ("labels", "availability", "offline_since")),
        ("snapshots", ("volume", "live")),
        ("instances", ("moving", "volume", "node_labels")),
    ):
        with op.batch_alter_table(table) as batch:
            for name in names:
                batch.drop_column(name)
