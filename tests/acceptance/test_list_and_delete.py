"""Listing and deleting: pages that hold still, and deletes that leave nothing behind in whatever state."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import pytest

from tests.support.service import Service
from tests.support.shell_image import shell_image

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
TINY = {"memory_gb": 0.125, "cpu_cores": 1}
KILLED = "137"


@pytest.fixture(scope="module")
def shell() -> Iterator[str]:
    """Give the name of an image with a shell and without a browser."""
    with shell_image(docker.from_env()) as name:
        yield name


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    """Give a service that gives up at once what can't be created."""
    return start_service(create_attempts=1)


@pytest.fixture(scope="module")
def listed(service: Service, shell: str) -> list[dict[str, Any]]:
    """Give three instances, the last of them dormant, in the order in which they were created."""
    made = [service.create(image=shell, config=TINY, wait_s=0) for _ in range(3)]
    for instance in made:
        service.wait_for(instance["id"], "running")
    assert service.post(f"{made[2]['id']}/dormant").json()["status"] == "dormant"
    return made


def page(service: Service, **query: object) -> dict[str, Any]:
    """Return a page of instances."""
    answer = service.http.get("/v2/instances", params={name: str(value) for name, value in query.items()})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids(found: dict[str, Any] | list[dict[str, Any]]) -> list[str]:
    """Return the ids in a page."""
    instances = found["instances"] if isinstance(found, dict) else found
    return [instance["id"] for instance in instances]


def assert_nothing_left(service: Service, instance_id: str) -> None:
    """Fail unless neither API, Docker nor snapshot store has anything of the instance; the last test asks the stack."""
    assert service.http.get(f"/v2/instances/{instance_id}").status_code == 404
    mine = {"label": f"machineuse.instance={instance_id}"}
    assert not service.docker.containers.list(all=True, filters=mine, ignore_removed=True)
    assert not service.docker.volumes.list(filters=mine)
    assert not service.docker.images.list(filters=mine)
    assert not [volume.name for volume in service.docker.volumes.list() if instance_id in volume.name]
    assert not list(service.settings.snapshots_dir.rglob(f"*{instance_id}*"))


def create_two(service: Service, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Create two instances at once: one to be deleted, one by force."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: service.create(**body), range(2))
    return first, second


def delete_two(service: Service, two: Sequence[dict[str, Any]]) -> None:
    """Delete the first, and the second by force; fail unless nothing is left of either."""
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda one, force: service.delete(one["id"], force=force), two, (False, True))
    assert [answer.status_code for answer in answers] == [200, 200]
    for instance in two:
        assert_nothing_left(service, instance["id"])


def how_it_died(service: Service, instance: dict[str, Any], *, since: float) -> str:
    """Return the exit code with which the instance's container ended, as Docker tells."""
    name = service.container_name(instance["id"])
    told = service.docker.events(
        since=int(since), until=int(time.time()) + 1, filters={"container": name, "event": "die"}, decode=True
    )
    codes = [event["Actor"]["Attributes"]["exitCode"] for event in told]
    assert codes, f"{name} did not end"
    code: str = codes[-1]
    return code


# ---- list


def test_instances_are_listed_oldest_first_and_in_the_same_order_every_time(
    service: Service, listed: list[dict[str, Any]]
) -> None:
    found = page(service)
    assert (found["total"], found["limit"], found["offset"]) == (3, 100, 0)
    assert ids(found) == ids(listed)
    assert [instance["created_at"] for instance in found["instances"]] == sorted(
        instance["created_at"] for instance in listed
    )
    assert ids(page(service)) == ids(found)


def test_limit_and_offset_cut_pages_that_fit_together(service: Service, listed: list[dict[str, Any]]) -> None:
    pages = [page(service, limit=1, offset=offset) for offset in range(4)]
    assert [one["total"] for one in pages] == [3, 3, 3, 3]
    assert [one["offset"] for one in pages] == [0, 1, 2, 3]
    assert [ids(one) for one in pages] == [[instance["id"]] for instance in listed] + [[]]
    assert ids(page(service, limit=2, offset=1)) == ids(listed[1:])


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=1001", "limit=many", "limit=1.5", "offset=-1", "offset=x", "status=sleepy"],
)
def test_a_query_beyond_its_bounds_is_refused(service: Service, query: str) -> None:
    answer = service.http.get(f"/v2/instances?{query}")
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_request"
    assert query.partition("=")[0] in answer.json()["detail"]


def test_instances_are_listed_by_status(service: Service, listed: list[dict[str, Any]]) -> None:
    assert ids(page(service, status="dormant")) == [listed[2]["id"]]
    assert ids(page(service, status="running")) == ids(listed[:2])
    assert page(service, status="failed") == {"instances": [], "total": 0, "limit": 100, "offset": 0}


def test_instances_are_listed_by_node(service: Service, listed: list[dict[str, Any]]) -> None:
    assert ids(page(service, node_id="local")) == ids(listed)
    assert ids(page(service, node_id="local", status="dormant")) == [listed[2]["id"]]
    assert page(service, node_id="elsewhere")["total"] == 0


def test_one_instance_is_shown_as_it_is_listed(service: Service, listed: list[dict[str, Any]]) -> None:
    one = service.get(listed[2]["id"])
    assert one["status"] == "dormant"
    for changing in ("resources", "disk_bytes", "last_active_at"):
        one.pop(changing)
    found = page(service, status="dormant")["instances"][0]
    assert one.items() <= found.items()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "mu-nowhere"),
        ("DELETE", "mu-nowhere"),
        ("POST", "mu-nowhere/dormant"),
        ("POST", "mu-nowhere/revive"),
        ("GET", "mu-nowhere/events"),
    ],
)
def test_an_unknown_instance_is_404(service: Service, method: str, path: str) -> None:
    answer = service.http.request(method, f"/v2/instances/{path}")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"
    assert "mu-nowhere" in answer.json()["detail"]


# ---- delete: gracefully, and by force


def test_a_delete_stops_the_browser_gracefully_and_a_forced_one_kills_it(service: Service) -> None:
    began = time.time()
    two = create_two(service, config=SMALL)
    delete_two(service, two)
    assert [how_it_died(service, instance, since=began) for instance in two] == ["0", KILLED]


def test_what_is_deleted_is_gone(service: Service, shell: str) -> None:
    instance = service.create(image=shell, config=TINY)
    answer = service.delete(instance["id"])
    assert answer.status_code == 200
    assert instance["id"] in answer.json()["message"]
    assert service.delete(instance["id"]).status_code == 404
    assert service.post(f"{instance['id']}/dormant").status_code == 404
    assert instance["id"] not in ids(page(service))


def test_a_dormant_instance_is_deleted_with_its_archive_and_its_copy(service: Service, shell: str) -> None:
    two = create_two(service, image=shell, config=TINY)
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda instance: service.post(f"{instance['id']}/dormant"), two)
    assert [answer.json()["status"] for answer in answers] == ["dormant", "dormant"]
    for instance in two:
        assert list((service.settings.snapshots_dir / instance["id"]).rglob("manifest.json"))
        assert any(instance["id"] in volume and "-copy-" in volume for volume in service.volumes())
    delete_two(service, two)


def test_an_instance_that_is_being_created_can_be_deleted(service: Service, shell: str) -> None:
    two = create_two(service, image=shell, config=TINY, wait_s=0)
    assert [instance["status"] for instance in two] == ["creating", "creating"]
    delete_two(service, two)


def test_a_failed_instance_can_be_deleted(service: Service) -> None:
    with shell_image(service.docker, command=["/no/such/program"]) as image:
        two = create_two(service, image=image, config=TINY)
        assert [instance["status"] for instance in two] == ["failed", "failed"]
        assert "/no/such/program" in two[0]["error"]["message"]
        delete_two(service, two)


def test_an_instance_on_its_way_to_sleep_can_be_deleted(service: Service) -> None:
    two = create_two(service, config=SMALL)
    for instance in two:
        assert service.post(f"{instance['id']}/dormant", wait_s=0).json()["operation"] == "making_dormant"
    delete_two(service, two)


def test_a_reviving_instance_can_be_deleted(service: Service, shell: str) -> None:
    two = create_two(service, image=shell, config=TINY)
    for instance in two:
        service.post(f"{instance['id']}/dormant", wait_s=0)
    for instance in two:
        service.wait_for(instance["id"], "dormant")
        assert service.post(f"{instance['id']}/revive", wait_s=0).json()["operation"] == "reviving"
    delete_two(service, two)


def test_many_deletes_of_the_same_all_answer(service: Service, shell: str) -> None:
    instance = service.create(image=shell, config=TINY, wait_s=0)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: service.delete(instance["id"]).status_code, range(4)))
    assert 200 in answers
    assert set(answers) <= {200, 404}
    assert_nothing_left(service, instance["id"])


def test_wait_0_answers_at_once_and_the_delete_goes_on(service: Service, shell: str) -> None:
    instance = service.create(image=shell, config=TINY)
    answer = service.delete(instance["id"], wait_s=0)
    assert answer.status_code == 200
    assert "is being deleted" in answer.json()["message"]
    assert service.delete(instance["id"]).status_code in (200, 404)
    assert_nothing_left(service, instance["id"])


def test_the_stack_has_the_instances_that_are_listed_and_no_others(
    service: Service, listed: list[dict[str, Any]]
) -> None:
    assert ids(page(service)) == ids(listed)
    named = {found for urn in service.urns() for found in re.findall(r"mu-\w{8}", urn)}
    assert named == set(ids(listed))
