"""Calls that arrive at the same moment share updates, and a failing one harms nobody."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from tests.support.service import Service


def updates_in(log: str) -> list[dict[str, object]]:
    """Return the updates that the log tells of."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == "update done" and "steps" in line]


def test_two_creates_a_dormant_and_a_delete_share_a_few_updates(service: Service) -> None:
    small = {"memory_gb": 0.5, "cpu_cores": 1}
    sleeper, doomed = service.create(config=small), service.create(config=small)
    before = len(updates_in(service.log()))
    with ThreadPoolExecutor(4) as pool:
        creates = [pool.submit(service.create, config=small) for _ in range(2)]
        dormant = pool.submit(service.post, f"{sleeper['id']}/dormant")
        deleted = pool.submit(service.delete, doomed["id"])
    assert [create.result()["status"] for create in creates] == ["running", "running"]
    assert dormant.result().status_code == 200
    assert dormant.result().json()["status"] == "dormant"
    assert deleted.result().status_code == 200
    assert service.http.get(f"/v2/instances/{doomed['id']}").status_code == 404
    assert len(updates_in(service.log())) - before <= 4


def test_one_that_fails_leaves_the_others_alone(service: Service) -> None:
    small = {"memory_gb": 0.5, "cpu_cores": 1}
    sleeper = service.create(config=small)
    # Its volume is gone behind the service's back: neither the snapshot nor the browser can go on.
    service.container(sleeper["id"]).rename(f"hidden-{sleeper['id']}")
    try:
        with ThreadPoolExecutor(3) as pool:
            create = pool.submit(service.create, config=small)
            dormant = pool.submit(service.post, f"{sleeper['id']}/dormant")
        assert create.result()["status"] == "running"
        assert dormant.result().status_code == 409
        assert dormant.result().json()["code"] == "snapshot_failed"
    finally:
        service.docker.containers.get(f"hidden-{sleeper['id']}").rename(f"machineuse-{service.cluster}-{sleeper['id']}")
    assert service.get(sleeper["id"])["status"] in ("running", "creating")
    assert service.wait_for(sleeper["id"], "running")["error"] is not None
