"""Samples in a real ledger: averages, what is read back, and how much is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from provisioner.errors import InvalidRequest, NotFound
from provisioner.ledger import Ledger
from provisioner.ledger.samples import FRESH_FOR_S, HOUR, RAW, TEN_MINUTES, Sample, Scope, Usage
from provisioner.metrics import PERIODS, read_metrics
from provisioner.settings import Settings
from provisioner.states import Status
from stacks.spec import NodeSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = empty_ledger(ledger_location)
    ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b")])
    yield ledger
    ledger.close()


def sample(cpu: float, *, memory: float = 1, disk: float | None = None, subject: str = "a") -> Sample:
    usage = Usage(cpu_percent=cpu, memory_percent=memory, disk_percent=disk)
    return Sample(scope=Scope.NODE, subject=subject, usage=usage)


def test_samples_enter_the_averages_at_once(ledger: Ledger) -> None:
    for seconds, cpu in ((0, 10), (15, 20), (30, 60), (700, 5)):
        ledger.samples.add([sample(cpu)], at=7200.0 + seconds)
    tens = ledger.samples.series(Scope.NODE, since=0, resolution_s=TEN_MINUTES, step_s=TEN_MINUTES)
    assert [(p.at, p.count, p.cpu_percent) for p in tens] == [(7200, 3, 30), (7800, 1, 5)]
    hours = ledger.samples.series(Scope.NODE, since=0, resolution_s=HOUR, step_s=HOUR)
    assert [(p.at, p.count, p.cpu_percent) for p in hours] == [(7200, 4, 23.75)]
    raw = ledger.samples.series(Scope.NODE, since=7210, resolution_s=RAW, step_s=30)
    assert [(p.at, p.cpu_percent) for p in raw] == [(7200, 20), (7230, 60), (7890, 5)]


def test_a_series_is_of_all_subjects_or_of_one(ledger: Ledger) -> None:
    ledger.samples.add([sample(10), sample(30, subject="b")], at=7200.0)
    everything = ledger.samples.series(Scope.NODE, since=0, resolution_s=HOUR, step_s=HOUR)
    one = ledger.samples.series(Scope.NODE, since=0, resolution_s=HOUR, step_s=HOUR, subject="b")
    assert [point.cpu_percent for point in everything + one] == [20, 30]


def test_an_unknown_disk_does_not_spoil_an_average(ledger: Ledger) -> None:
    now = time.time()
    ledger.samples.add([sample(1, disk=None)], at=now - 2)
    ledger.samples.add([sample(1, disk=40)], at=now - 1)
    assert ledger.samples.latest(Scope.NODE, ["a"])["a"].disk_percent == 40


def test_the_latest_use_is_told_only_while_it_is_recent(ledger: Ledger) -> None:
    now = time.time()
    ledger.samples.add([sample(1), sample(2, subject="b")], at=now - 1000)
    ledger.samples.add([sample(3)], at=now - 20)
    ledger.samples.add([sample(4)], at=now - 5)
    assert {k: v.cpu_percent for k, v in ledger.samples.latest(Scope.NODE, ["a", "b", "c"]).items()} == {"a": 4}
    assert ledger.samples.latest(Scope.INSTANCE, ["a"]) == {}
    assert ledger.samples.latest(Scope.NODE, [f"x{n}" for n in range(500)] + ["a"])["a"].cpu_percent == 4


def test_what_is_kept_is_bounded(ledger: Ledger) -> None:
    now = time.time()
    for age_s in (0, 2 * HOUR, 2 * 24 * HOUR, 8 * 24 * HOUR):
        ledger.samples.add([sample(1)], at=now - age_s)
    ledger.samples.prune()

    def kept(resolution_s: int) -> int:
        return len(ledger.samples.series(Scope.NODE, since=0, resolution_s=resolution_s, step_s=HOUR))

    assert [kept(RAW), kept(TEN_MINUTES), kept(HOUR)] == [1, 2, 3]


@pytest.mark.parametrize("period", PERIODS)
def test_an_answer_has_at_most_180_points(ledger: Ledger, period: str) -> None:
    now = time.time()
    asked = PERIODS[period]
    for age_s in range(0, asked.length_s, asked.length_s // 400):
        ledger.samples.add([sample(50, memory=25)], at=now - age_s)
    report = read_metrics(ledger, period=period)
    assert 100 < len(report.timestamps) <= 180
    assert list(report.timestamps) == sorted(report.timestamps)
    assert (report.avg_cpu_percent, report.avg_memory_percent) == (50, 25)
    assert set(report.cpu) == {50}


def test_a_report_counts_the_instances_of_now(ledger: Ledger) -> None:
    for number, (status, node) in enumerate(
        [(Status.RUNNING, "a"), (Status.IDLE, "a"), (Status.DORMANT, "a"), (Status.RUNNING, "b")]
    ):
        record = make_record(id=f"mu-{number}", status=status, node_id=node, debug_port=None, stream_port=None)
        ledger.instances.create(lambda _, record=record: (record, "made by a test"))
    cluster, node = read_metrics(ledger, period="1h"), read_metrics(ledger, period="1h", node_id="a")
    assert (cluster.total_instances, cluster.running_instances) == (4, 3)
    assert (node.total_instances, node.running_instances) == (3, 2)
    assert (cluster.timestamps, cluster.avg_cpu_percent) == ((), 0)


def test_an_unknown_node_or_period_is_refused(ledger: Ledger) -> None:
    with pytest.raises(NotFound):
        read_metrics(ledger, period="1h", node_id="nowhere")
    with pytest.raises(InvalidRequest):
        read_metrics(ledger, period="2h")


def test_the_next_sample_comes_before_the_last_one_is_too_old_to_be_shown() -> None:
    with pytest.raises(ValidationError, match="sample_s"):
        Settings(sample_s=FRESH_FOR_S)
