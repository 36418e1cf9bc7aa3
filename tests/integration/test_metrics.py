"""What instances and nodes use, how full their disks are, and who uses them: from real containers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from provisioner.browser_status import agent_url, ask_all
from provisioner.disk import DiskWatch
from provisioner.docker_hosts.stats import cpu_percent, read_container
from provisioner.health import NodeHealth
from provisioner.idle import IdleWatch
from provisioner.images import ImageCatalogue
from provisioner.ledger.samples import Scope
from provisioner.metrics import Sampler, read_metrics
from provisioner.service import InstanceService
from provisioner.states import Status, Wanted
from tests.support.watched import SLEEPER, Watched, wait_until

BUSY = ["sh", "-c", "while :; do :; done"]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    health = NodeHealth(watched.ledger, settings=watched.settings, **watched.parts())
    health.beat_once()
    health.close()
    yield watched
    watched.clean_up()


def test_a_fresh_service_has_a_point_after_its_first_sample(watched: Watched) -> None:
    Sampler(watched.ledger, cluster=watched.cluster, hosts=watched.hosts).step()
    for period in ("1h", "24h", "7d"):
        report = read_metrics(watched.ledger, period=period)
        assert len(report.timestamps) == len(report.cpu) == len(report.memory) == 1
        assert 0 < report.memory[0] < 100
        assert report.avg_memory_percent == report.memory[0]
        assert time.time() - report.timestamps[0] < 3700
    assert read_metrics(watched.ledger, period="1h", node_id="local").timestamps


def test_an_instance_s_use_is_of_what_it_was_given(watched: Watched) -> None:
    busy, quiet = watched.add(cpu_cores=1, memory_gb=0.25, disk_bytes=2**30), watched.add(cpu_cores=1, memory_gb=0.25)
    watched.run(busy, command=BUSY, nano_cpus=500_000_000)
    watched.run(quiet, command=SLEEPER)
    sampler = Sampler(watched.ledger, cluster=watched.cluster, hosts=watched.hosts)
    sampler.step()
    sampler.step()
    usage = watched.ledger.samples.latest(Scope.INSTANCE, [busy.id, quiet.id, "mu-nobody"])
    assert usage.keys() == {busy.id, quiet.id}
    assert 5 < usage[busy.id].cpu_percent <= 60  # half a core of its one
    assert usage[quiet.id].cpu_percent < 5
    assert 0 < usage[quiet.id].memory_percent < 50
    assert usage[busy.id].disk_percent == 10
    assert usage[quiet.id].disk_percent is None


def test_memory_is_counted_without_the_page_cache(watched: Watched) -> None:
    record = watched.add(memory_gb=1.0)
    reader = [
        "sh",
        "-c",
        "head -c 200000000 /dev/zero > /var/tmp/big; cat /var/tmp/big > /dev/null; echo done; sleep infinity",
    ]
    container = watched.run(record, command=reader)
    wait_until(lambda: container.logs() or None, what="the file is in the page cache")
    host = watched.hosts.get(watched.node.host)
    reading = read_container(host, container_id=container.id)
    assert reading is not None
    assert reading.memory_bytes < 100_000_000
    assert cpu_percent(reading, reading, cores=1) is None


def test_going_over_the_disk_is_one_event_and_coming_back_another(watched: Watched) -> None:
    record = watched.add_browser(disk_gb=0.03)
    container = watched.run(record)
    url = agent_url(watched.node, debug_port=record.debug_port or 0)
    wait_until(lambda: ask_all({"it": url}), what="the agent answers")
    disk = DiskWatch(watched.ledger, cluster=watched.cluster, hosts=watched.hosts)
    disk.step()
    assert not watched.get(record).disk_over
    code, _ = container.exec_run(["sh", "-c", "head -c 40000000 /dev/urandom > /var/tmp/big"])
    assert code == 0

    def over() -> bool:
        disk.step()
        return watched.get(record).disk_over

    wait_until(over, what="it is over its disk")
    over()
    assert (watched.get(record).disk_bytes or 0) > 40_000_000
    container.exec_run(["rm", "/var/tmp/big"])
    wait_until(lambda: not over(), what="it is below its disk again")
    assert len(watched.events("disk_over")) == len(watched.events("disk_back")) == 1
    assert "0.03 GB of disk; it keeps running" in watched.events("disk_over")[0]
    container.reload()
    assert container.status == "running"


def test_the_home_of_an_image_without_an_agent_is_measured_too(watched: Watched) -> None:
    record = watched.add()
    volume = watched.names.docker_volume(record.id)
    watched.docker.volumes.create(volume, labels=watched.labels(record.id))
    mounts = {volume: {"bind": "/home/machine", "mode": "rw"}}
    container = watched.run(record, command=SLEEPER, volumes=mounts)
    container.exec_run(["sh", "-c", "head -c 5000000 /dev/urandom > /home/machine/five"])
    DiskWatch(watched.ledger, cluster=watched.cluster, hosts=watched.hosts).step()
    assert 5_000_000 <= (watched.get(record).disk_bytes or 0) < 20_000_000


def test_an_unused_browser_goes_idle_wakes_with_use_and_at_last_sleeps(tmp_path: Path) -> None:
    watched = Watched(tmp_path, idle_after_s=1.0, minute_s=4.0)
    try:
        NodeHealth(watched.ledger, settings=watched.settings, **watched.parts()).beat_once()
        record = watched.add_browser(idle_timeout_minutes=1, last_active_at=time.time())
        watched.run(record)
        url = agent_url(watched.node, debug_port=record.debug_port or 0)
        wait_until(lambda: (s := ask_all({"it": url}).get("it")) and s.ready, what="the browser is ready")
        service = InstanceService(
            watched.ledger,
            cluster=watched.cluster,
            settings=watched.settings,
            catalogue=ImageCatalogue(watched.cluster, hosts=watched.hosts),
            changes=watched.changes,
        )
        idle = IdleWatch(
            watched.ledger,
            cluster=watched.cluster,
            settings=watched.settings,
            service=service,
            changes=watched.changes,
        )

        def becomes(status: Status) -> bool:
            idle.step()
            return watched.get(record).status is status

        def wakes_with_use() -> bool:
            httpx.get(f"{url}/json/version", trust_env=False).raise_for_status()
            return becomes(Status.RUNNING)

        wait_until(lambda: becomes(Status.IDLE), what="it is idle")
        wait_until(wakes_with_use, what="use by CDP is seen")
        wait_until(lambda: becomes(Status.IDLE), what="it is idle again")
        assert watched.get(record).wanted is Wanted.RUNNING

        def sleeps() -> bool:
            idle.step()
            return watched.get(record).wanted is Wanted.DORMANT

        wait_until(sleeps, what="it is to be dormant")
        assert watched.events("dormant") == ["idle for 1 minute"]
    finally:
        watched.clean_up()
