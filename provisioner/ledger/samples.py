"""Samples of CPU, memory and disk in the ledger, bounded in size whatever the age of the cluster.

Each sample is kept raw for a little over an hour, and enters two averages at once: of ten minutes (kept for a day) and
of an hour (kept for a week). So an answer at any resolution has the newest data in it, there is no job that could fall
behind, and a subject takes about 600 rows at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from provisioner.ledger import tables
from provisioner.ledger.database import Database
from provisioner.ledger.tables import Long

RAW = 0
TEN_MINUTES = 600
HOUR = 3600

FRESH_FOR_S = 90
_KEPT_S = {RAW: HOUR + TEN_MINUTES, TEN_MINUTES: 25 * HOUR, HOUR: 7 * 24 * HOUR + HOUR}


class Scope(StrEnum):
    """What a sample is of."""

    INSTANCE = "instance"
    NODE = "node"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """How much of what it has something uses, in percent; disk is None where it is unknown."""

    cpu_percent: float
    memory_percent: float
    disk_percent: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One subject's use at one time."""

    scope: Scope
    subject: str
    """An instance's or a node's id."""
    usage: Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The average of one stretch of time."""

    at: float
    """When it began, in seconds since the epoch."""
    count: int
    """How many samples it is made of."""
    cpu_percent: float
    memory_percent: float


class Samples:
    """The table of samples."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, samples: Sequence[Sample], *, at: float) -> None:
        """Store what was seen at `at`, raw and in the averages, in one transaction."""
        if not samples:
            return
        upsert = _UPSERT_SHARED if self._database.is_shared else _UPSERT
        with self._database.write() as connection:
            for resolution_s in (RAW, TEN_MINUTES, HOUR):
                start = at - at % resolution_s if resolution_s else at
                connection.execute(upsert, [_row(s, resolution_s=resolution_s, at=start) for s in samples])

    def latest(self, scope: Scope, subjects: Sequence[str]) -> dict[str, Usage]:
        """Return the newest use of each subject that was sampled within the last minute and a half."""
        table = tables.samples
        query = (
            sa.select(table.c.subject, table.c.cpu_percent, table.c.memory_percent, table.c.disk_percent)
            .where(table.c.resolution_s == RAW, table.c.scope == scope.value, table.c.at >= time.time() - FRESH_FOR_S)
            .order_by(table.c.at)
        )
        wanted = set(subjects)
        if len(wanted) <= 200:  # beyond that, filtering here beats an enormous IN list
            query = query.where(table.c.subject.in_(wanted))
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all() if wanted else []
        return {  # a later row takes the place of an earlier one
            row["subject"]: Usage(
                cpu_percent=row["cpu_percent"],
                memory_percent=row["memory_percent"],
                disk_percent=row["disk_percent"],
            )
            for row in rows
            if row["subject"] in wanted
        }

    def series(
        self, scope: Scope, *, since: float, resolution_s: int, step_s: int, subject: str | None = None
    ) -> list[Point]:
        """Return the average over all subjects (or of one) for each `step_s` seconds from `since` on, oldest first.

        `resolution_s` says which samples to take: `RAW`, `TEN_MINUTES` or `HOUR`. Stretches without any are left out.
        """
        table = tables.samples
        steps = table.c.at / step_s
        if self._database.is_shared:
            steps = sa.func.floor(steps)  # a cast rounds there; here it cuts off
        start = (sa.cast(steps, Long) * step_s).label("start")
        count = sa.func.sum(table.c.count)
        query = (
            sa.select(
                start,
                count.label("count"),
                (sa.func.sum(table.c.cpu_percent * table.c.count) / count).label("cpu_percent"),
                (sa.func.sum(table.c.memory_percent * table.c.count) / count).label("memory_percent"),
            )
            .where(table.c.resolution_s == resolution_s, table.c.scope == scope.value, table.c.at >= since)
            .group_by(start)
            .order_by(start)
        )
        if subject is not None:
            query = query.where(table.c.subject == subject)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            Point(
                at=float(row["start"]),
                count=int(row["count"]),
                cpu_percent=float(row["cpu_percent"]),
                memory_percent=float(row["memory_percent"]),
            )
            for row in rows
        ]

    def prune(self) -> None:
        """Delete what is older than its resolution is kept."""
        table, now = tables.samples, time.time()
        with self._database.write() as connection:
            for resolution_s, kept_s in _KEPT_S.items():
                for scope in Scope:  # named, so that it is one range of the index
                    connection.execute(
                        table.delete().where(
                            table.c.resolution_s == resolution_s,
                            table.c.scope == scope.value,
                            table.c.at < now - kept_s,
                        )
                    )


def _make_upsert(insert: sqlite.Insert | postgresql.Insert) -> sqlite.Insert | postgresql.Insert:
    """Build the statement that inserts a sample, or has it enter the average that is there."""
    old, new = tables.samples.c, insert.excluded

    def average(name: str) -> sa.ColumnElement[float]:
        joined = (old[name] * old.count + new[name] * new.count) / (old.count + new.count)
        return sa.func.coalesce(joined, new[name], old[name])  # either may be unknown

    averages = {name: average(name) for name in ("cpu_percent", "memory_percent", "disk_percent")}
    return insert.on_conflict_do_update(
        index_elements=["resolution_s", "scope", "at", "subject"],
        set_=averages | {"count": old.count + new.count},
    )


def _row(sample: Sample, *, resolution_s: int, at: float) -> dict[str, object]:
    usage = sample.usage
    return {
        "resolution_s": resolution_s,
        "scope": sample.scope.value,
        "at": at,
        "subject": sample.subject,
        "count": 1,
        "cpu_percent": round(usage.cpu_percent, 2),
        "memory_percent": round(usage.memory_percent, 2),
        "disk_percent": None if usage.disk_percent is None else round(usage.disk_percent, 2),
    }


_UPSERT = _make_upsert(sqlite.insert(tables.samples))
_UPSERT_SHARED = _make_upsert(postgresql.insert(tables.samples))
