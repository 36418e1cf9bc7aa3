"""Two services on one ledger: both answer, one changes the nodes, and the other takes over when that one ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from provisioner.lease import RUNS, name_of
from provisioner.ledger import Ledger
from tests.support.postgres import PostgresServer
from tests.support.service import Service
from tests.support.shell_image import shell_image
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.25, "cpu_cores": 1}


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    with shell_image(docker.from_env()) as name:
        yield name


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def pair(
    request: pytest.FixtureRequest, start_service: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Service, Service]:
    shared: Path = tmp_path_factory.mktemp("shared")
    passphrase = shared / "passphrase"
    passphrase.write_text("known to both")
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        ledger = server.url(server.new_database())
        state = f"{server.url(server.new_database(), scheme='postgres')}?sslmode=disable"
    else:
        ledger, state = str(shared / "ledger.db"), f"file://{shared}/state"
    settings = {
        "ledger": ledger,
        "state": state,
        "passphrase_file": passphrase,
        "snapshot_store": shared / "snapshots",
    }
    first = start_service(**settings)
    return first, start_service(beside=first, **settings)


@pytest.fixture
def leading(pair: tuple[Service, Service]) -> tuple[Service, Service]:
    """Give both, the one that leads first."""

    def sorted_pair() -> tuple[Service, Service] | None:
        said = [service.health()["leading"] for service in pair]
        return None if said.count(True) != 1 else (pair if said[0] else (pair[1], pair[0]))

    return wait_until(sorted_pair, what="one that leads")


def owned(service: Service) -> list[str]:
    """Return the instances whose containers there are, as often as there are containers."""
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    containers = service.docker.containers.list(all=True, filters=mine, ignore_removed=True)
    return sorted(i for container in containers if (i := container.labels.get("machineuse.instance")))


def last_cli(service: Service, *, leader: str) -> object:
    """Return the last CLI that a leader noted; they don't note any where the state is in files."""
    ledger = Ledger.open(service.settings.ledger_location)
    try:
        runs: dict[str, object] = json.loads(ledger.fact(RUNS) or "{}")
    finally:
        ledger.close()
    return next((run for holder, run in runs.items() if name_of(holder) == leader), None)


def everything_is_as_the_ledger_says(service: Service) -> None:
    listed = sorted(i["id"] for i in service.http.get("/v2/instances").json()["instances"])
    assert owned(service) == listed
    service.assert_unchanged()


def test_both_answer_and_see_what_the_other_does(leading: tuple[Service, Service], image: str) -> None:
    leader, follower = leading
    assert follower.health()["leader"] == leader.health()["leader"]
    assert "machineuse_leading 0.0" in follower.http.get("/metrics").text
    made = follower.create(image=image, config=SMALL)
    assert made["status"] == "running", leader.log()[-3000:]
    assert leader.get(made["id"])["status"] == "running"
    assert leader.delete(made["id"]).status_code == 200
    assert follower.http.get(f"/v2/instances/{made['id']}").status_code == 404


@pytest.mark.parametrize("pair", ["postgresql"], indirect=True)
def test_a_forced_delete_by_a_follower_kills_at_once(leading: tuple[Service, Service], image: str) -> None:
    leader, follower = leading
    made = leader.create(image=image, config=SMALL)
    assert follower.delete(made["id"], force=True).status_code == 200
    assert made["id"] not in owned(leader)


@pytest.mark.parametrize("pair", ["postgresql"], indirect=True)
def test_a_browser_goes_its_way_through_either(leading: tuple[Service, Service]) -> None:
    leader, follower = leading
    made = follower.create(config={"memory_gb": 0.5, "cpu_cores": 1})
    assert made["status"] == "running"
    assert follower.post(f"{made['id']}/dormant").json()["status"] == "dormant"
    assert leader.post(f"{made['id']}/revive").json()["status"] == "running"
    assert follower.delete(made["id"]).status_code == 200


def test_a_leader_that_is_frozen_is_followed_by_the_other_and_follows_when_it_thaws(
    leading: tuple[Service, Service], image: str
) -> None:
    leader, follower = leading
    thawing = leader.health()["leader"]
    begun = [leader.create(image=image, config=SMALL, wait_s=0)["id"] for _ in range(3)]
    wait_until(lambda: {*begun} & {*owned(leader)}, what="an update under way")
    leader.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: follower.health()["leading"], what="the other leads")
        for instance_id in begun:
            follower.wait_for(instance_id, "running")
        assert follower.create(image=image, config=SMALL)["status"] == "running"
        before, last = len(leader.events()), last_cli(follower, leader=thawing)
    finally:
        leader.signal(signal.SIGCONT)
    wait_until(lambda: leader.events("following", after=before), what="it follows")
    assert follower.create(image=image, config=SMALL)["status"] == "running"
    assert follower.health()["leading"]
    assert not leader.health()["leading"]
    assert not leader.events("leading", after=before)
    assert last_cli(follower, leader=thawing) == last  # it has changed nothing more
    everything_is_as_the_ledger_says(follower)


def test_when_the_leader_is_killed_the_other_takes_over_and_every_create_has_its_outcome(
    leading: tuple[Service, Service], image: str
) -> None:
    leader, follower = leading
    small = {"image": image, "config": SMALL}
    with ThreadPoolExecutor(max_workers=6) as pool:
        waiting = [pool.submit(follower.create, wait_s=90, **small) for _ in range(3)]
        accepted = [leader.create(wait_s=0, **small)["id"] for _ in range(4)]
        wait_until(lambda: {*accepted} & {*owned(leader)}, what="an update under way")
        leader.kill()
        waiting += [pool.submit(follower.create, wait_s=90, **small) for _ in range(3)]
        wait_until(lambda: follower.health()["leading"], what="the other leads")
        assert [call.result()["status"] for call in waiting] == ["running"] * 6
    for instance_id in accepted:
        assert follower.wait_for(instance_id, "running", timeout_s=90)["id"] == instance_id
    everything_is_as_the_ledger_says(follower)
    leader.start()
    assert not leader.health()["leading"]
    assert leader.get(accepted[0])["status"] == "running"
    for known in leader.http.get("/v2/instances").json()["instances"]:
        leader.delete(known["id"], force=True, wait_s=0)
    wait_until(lambda: not owned(leader), what="nothing left")


@pytest.mark.parametrize("pair", ["sqlite"], indirect=True)
def test_a_clean_stop_hands_over_at_once(leading: tuple[Service, Service], image: str) -> None:
    leader, follower = leading
    assert leader.stop() == 0
    wait_until(lambda: follower.health()["leading"], what="the other leads")
    assert follower.create(image=image, config=SMALL)["status"] == "running"
    leader.start()
    assert not leader.health()["leading"]
