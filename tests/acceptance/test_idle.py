"""A browser that nobody uses is idle, and after a while dormant; being asked about is not being used.

Seconds stand for minutes: the service's settings say how long a minute is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.browsing import new_page
from tests.support.service import Service
from tests.support.viewer import open_view

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
CONFIGS = {
    "awake": SMALL | {"idle_timeout_minutes": 0},
    "stayer": SMALL | {"idle_timeout_minutes": 1, "auto_snapshot": False},
    "sleeper": SMALL | {"idle_timeout_minutes": 1},
}
EVERY_S = 0.05


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    return start_service(idle_after_s=1.5, idle_check_s=0.2, minute_s=2)


@pytest.fixture(scope="module")
def instances(service: Service) -> Mapping[str, dict[str, Any]]:
    with ThreadPoolExecutor(len(CONFIGS)) as pool:
        created = pool.map(lambda config: service.create(config=config), CONFIGS.values())
        return dict(zip(CONFIGS, created, strict=True))


@pytest.fixture(scope="module")
def instance(instances: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Give the one that never goes dormant by itself."""
    return instances["awake"]


def do_until(service: Service, instance_id: str, status: str, *, what: Callable[[], object]) -> dict[str, Any]:
    """Do something again and again until the instance has a status; return it."""
    deadline = time.monotonic() + 30
    while True:
        what()
        instance = service.get(instance_id)
        if instance["status"] == status:
            return instance
        assert time.monotonic() < deadline, f"not {status}: {instance}\n{service.log()[-4000:]}"
        time.sleep(EVERY_S)


def kinds_of(service: Service, instance_id: str) -> list[str]:
    return [event["kind"] for event in service.events_of(instance_id)]


def ask_about(service: Service, instance: Mapping[str, Any]) -> None:
    """Ask for everything that can be asked for without using the browser."""
    for path in ("", f"/{instance['id']}", f"/{instance['id']}/events"):
        service.http.get(f"/v2/instances{path}").raise_for_status()
    for port in (instance["debug_port"], instance["stream_port"]):
        service.http.get(f"http://127.0.0.1:{port}/machineuse/status").raise_for_status()


def test_a_browser_that_nobody_uses_is_idle_however_often_it_is_asked_about(
    service: Service, instance: dict[str, Any]
) -> None:
    idle = do_until(service, instance["id"], "idle", what=lambda: ask_about(service, instance))
    assert idle["operation"] is None
    kinds = kinds_of(service, instance["id"])
    assert kinds[-1] == "idle"
    for _ in range(20):
        ask_about(service, instance)
    now = service.get(instance["id"])
    assert (now["status"], now["last_active_at"]) == ("idle", idle["last_active_at"])
    assert kinds_of(service, instance["id"]) == kinds


def test_after_its_timeout_an_idle_browser_is_dormant_unless_it_may_not(
    service: Service, instances: Mapping[str, dict[str, Any]]
) -> None:
    sleeper, stayer = instances["sleeper"], instances["stayer"]
    dormant = service.wait_for(sleeper["id"], "dormant")
    assert (dormant["debug_port"], dormant["snapshots"][0]["state"]) == (None, "verified")
    events = service.events_of(sleeper["id"])
    assert [event["message"] for event in events if event["kind"] == "dormant"] == ["idle for 1 minute"]
    kinds = [event["kind"] for event in events]
    assert kinds.index("idle") < kinds.index("dormant") < kinds.index("slept")
    # The other two were last used when this one was, and more than a minute ago.
    for other in (stayer, instances["awake"]):
        assert service.get(other["id"])["status"] == "idle"
        assert "dormant" not in kinds_of(service, other["id"])


def test_use_by_cdp_makes_it_running_and_an_open_connection_alone_does_not(
    service: Service, instance: dict[str, Any]
) -> None:
    before = service.wait_for(instance["id"], "idle")
    with new_page(instance) as page:
        used = do_until(service, instance["id"], "running", what=lambda: page.evaluate("1 + 1"))
        assert used["last_active_at"] > before["last_active_at"]
        service.wait_for(instance["id"], "idle")
    assert kinds_of(service, instance["id"])[-3:] == ["idle", "active", "idle"]


def test_keys_and_pointer_in_the_live_view_make_it_running_and_an_open_view_alone_does_not(
    service: Service, instance: dict[str, Any]
) -> None:
    service.wait_for(instance["id"], "idle")
    with open_view(instance) as view:
        service.wait_for(instance["id"], "running")  # somebody came to look
        for touch in (lambda: view.press("a"), lambda: view.move_pointer(20, 20)):
            do_until(service, instance["id"], "idle", what=view.ask_for_picture)
            do_until(service, instance["id"], "running", what=touch)
