"""When disk use is worth an event."""

from __future__ import annotations

import dataclasses

from provisioner.disk import disk_limit_bytes, observe_disk
from tests.support.records import make_record

GB = 2**30


def test_the_limit_is_in_binary_gigabytes_like_memory() -> None:
    assert disk_limit_bytes(make_record(disk_gb=0.5)) == GB // 2


def test_the_first_measure_is_noted_without_an_event() -> None:
    update = observe_disk(make_record(disk_gb=1), used_bytes=GB // 2)
    assert update is not None
    assert update.values == {"disk_bytes": GB // 2}
    assert update.event is None


def test_the_same_measure_again_is_no_write() -> None:
    assert observe_disk(make_record(disk_gb=1, disk_bytes=5), used_bytes=5) is None


def test_crossing_the_limit_is_one_event_each_way() -> None:
    record, kinds = make_record(disk_gb=1), []
    for used in (0.5, 1.1, 1.2, 0.97, 1.1, 0.9, 0.8):
        update = observe_disk(record, used_bytes=int(used * GB))
        assert update is not None
        kinds.append(update.event[0] if update.event else None)
        record = dataclasses.replace(record, **update.values)
    assert kinds == [None, "disk_over", None, None, None, "disk_back", None]
