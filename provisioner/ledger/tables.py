"""The ledger's tables, as SQLAlchemy knows them; migrations/ makes the same on disk, and a test compares the two.

Times are seconds since the epoch (UTC), as floats.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, ForeignKey, Integer, MetaData, Table, false
from sqlalchemy.types import TypeDecorator

metadata = MetaData()

Long = BigInteger().with_variant(Integer(), "sqlite")
"""A count of bytes, or a number that only grows. SQLite's integers are all as long as need be."""


def _clean(value: Any) -> Any:
    """Replace what PostgreSQL can't keep in a text: NUL, and half of a surrogate pair."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


class Text(TypeDecorator[str]):
    """Text of any length, whatever somebody's container or client put into it."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return what is stored, or compared with."""
        return _clean(value)


class String(TypeDecorator[str]):
    """Short text."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return what is stored, or compared with."""
        return _clean(value)


facts = Table(
    "facts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

instances = Table(
    "instances",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("node_id", String(64), nullable=False, index=True),
    # What was asked for.
    Column("image_requested", Text, nullable=False),
    Column("image", Text, nullable=False),
    Column("image_base", Text),
    Column("browser", Boolean, nullable=False),
    Column("memory_gb", Float, nullable=False),
    Column("cpu_cores", Integer, nullable=False),
    Column("disk_gb", Float, nullable=False),
    Column("disk_enforced", Boolean, nullable=False),
    Column("idle_timeout_minutes", Integer, nullable=False),
    Column("auto_snapshot", Boolean, nullable=False),
    Column("node_labels", JSON, nullable=False, server_default="{}"),
    Column("volume", String(16), nullable=False, server_default="docker"),
    Column("created_at", Float, nullable=False, index=True),
    # What it should be, and how far that is done.
    Column("wanted", String(16), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("applied_generation", Integer, nullable=False),
    Column("settled_generation", Integer, nullable=False),
    Column("body", Boolean, nullable=False),
    Column("repair", Boolean, nullable=False),
    Column("force", Boolean, nullable=False),
    Column("moving", String(16)),
    Column("attempts", Integer, nullable=False),
    Column("retry_at", Float, nullable=False),
    # What it is.
    Column("status", String(16), nullable=False),
    Column("status_since", Float, nullable=False),
    Column("last_active_at", Float, nullable=False),
    Column("debug_port", Integer),
    Column("stream_port", Integer),
    Column("disk_bytes", Long),
    Column("disk_over", Boolean, nullable=False),
    # Its snapshots.
    Column("snapshot_generation", Integer),
    Column("restore_generation", Integer),
    Column("restore_method", String(32)),
    Column("restored_by", String(32)),
    Column("restore_note", Text),
    # What went wrong last.
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("error_generation", Integer),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("instance_id", String(64), ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("node_id", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("live", Boolean, nullable=False, server_default=false()),
    Column("volume", String(16), nullable=False, server_default="docker"),
    Column("bytes", Long),
    Column("created_at", Float, nullable=False),
)

ports = Table(
    "ports",
    metadata,
    Column("node_id", String(64), primary_key=True),
    Column("port", Integer, primary_key=True),
    Column("instance_id", String(64), ForeignKey("instances.id", ondelete="CASCADE"), nullable=False, index=True),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("host", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("max_instances", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("error", Text),
    Column("misses", Integer, nullable=False),
    Column("last_heartbeat", Float),
    Column("offline_since", Float),
    Column("availability", String(16), nullable=False, server_default="active"),
    Column("labels", JSON, nullable=False, server_default="{}"),
    Column("cpu_cores", Float),
    Column("memory_bytes", Long),
    Column("disk_bytes", Long),
    Column("disk_quota", Boolean, nullable=False),
    Column("cpu_percent", Float),
    Column("memory_percent", Float),
    Column("disk_percent", Float),
    # Grows with every change of the row, and of the node's sums; see loads.py.
    Column("revision", Long, nullable=False, server_default="0", index=True),
)

node_loads = Table(
    "node_loads",
    metadata,
    # Of the instances that hold a place, summed up; see loads.py.
    Column("node_id", String(64), primary_key=True),
    Column("instances", Integer, nullable=False),
    Column("memory_mib", BigInteger, nullable=False),
    Column("cpu_cores", Integer, nullable=False),
    Column("disk_mib", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

events = Table(
    "events",
    metadata,
    Column("id", Long, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("instance_id", String(64), index=True),
    Column("node_id", String(64)),
    Column("kind", String(64), nullable=False),
    Column("message", Text, nullable=False),
)

samples = Table(
    "samples",
    metadata,
    # In the order in which they are asked for and pruned; the table is this index, and has no other.
    Column("resolution_s", Integer, primary_key=True),
    Column("scope", String(16), primary_key=True),
    Column("at", Float, primary_key=True),
    Column("subject", String(64), primary_key=True),
    Column("count", Integer, nullable=False),
    Column("cpu_percent", Float, nullable=False),
    Column("memory_percent", Float, nullable=False),
    Column("disk_percent", Float),
    sqlite_with_rowid=False,
)

leftovers = Table(
    "leftovers",
    metadata,
    Column("id", Long, primary_key=True, autoincrement=True),
    Column("node_id", String(64), nullable=False, index=True),
    Column("urn", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("at", Float, nullable=False),
)

node_images = Table(
    "node_images",
    metadata,
    Column("node_id", String(64), primary_key=True),
    Column("name", String(512), primary_key=True),
    Column("used_at", Float, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("taken_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)
