"""A node is lost in the middle of a capture, a drain's capture or a restore onto it: nothing is lost or left over.

Two real engines on machines of their own. The homes are big enough that what is broken off takes seconds, and each test
looks where the work is before it breaks it off.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_chaos import BREAKS, SMALL, await_rest, events_of, services_by_policy
from tests.support.containers import execute
from tests.support.engines import Engine
from tests.support.service import Service
from tests.support.watched import wait_until

HOME = "/home/machine"
BIG_MB = 120
BEGUN_BYTES = 8 << 20
"""How much of a home must have been moved for the work to be in the middle."""


@pytest.fixture(scope="module")
def engines() -> Iterator[Mapping[str, Engine]]:
    with Engine("tcp") as a, Engine() as b:
        yield {"a": a, "b": b}


@pytest.fixture(scope="module")
def services(start_service: Callable[..., Service], engines: Mapping[str, Engine]) -> Callable[[str], Service]:
    """Give a function that starts a service whose cluster has that policy about lost nodes; one runs at a time."""
    return services_by_policy(start_service, nodes=nodes_of(engines), after_minutes=3)


def nodes_of(engines: Mapping[str, Engine], **of_a: object) -> list[dict[str, object]]:
    return [engines["a"].node("a", **of_a), engines["b"].node("b")]


class Profile:
    """An instance, and what is known to be in its home."""

    def __init__(self, service: Service, engines: Mapping[str, Engine], *, node_id: str) -> None:
        made = service.create(config=SMALL, node_preference=node_id)
        assert made["node_id"] == node_id
        self.id: str = made["id"]
        self._service = service
        self._engines = engines
        self.write("first")

    @property
    def home(self) -> str:
        return f"{self._service.container_name(self.id)}-home"

    def write(self, note: str) -> None:
        self._execute(f"echo '{note}' > note && sync")

    def read(self) -> str:
        return self._execute("cat note").strip()

    def fill(self) -> None:
        """Make the home big."""
        self._execute(f"dd if=/dev/urandom of=big bs=1M count={BIG_MB} status=none && sha256sum big > sum && sync")

    def assert_full(self) -> None:
        self._execute("sha256sum --check --status sum")

    def sleep(self) -> None:
        slept = self._service.post(f"{self.id}/dormant").json()
        assert slept["status"] == "dormant", slept

    def revive(self, node_id: str, *, wait_s: int = 60) -> dict[str, Any]:
        answer = self._service.post(f"{self.id}/revive", wait_s=wait_s, method="full_restore", node_preference=node_id)
        assert answer.status_code == 200, answer.text
        revived: dict[str, Any] = answer.json()
        return revived

    def _execute(self, script: str) -> str:
        node_id = self._service.get(self.id)["node_id"]
        container = self._engines[node_id].client().containers.get(self._service.container_name(self.id))
        return execute(container, "sh", "-c", f"cd {HOME} && {script}")


# ---- where the work is


def await_saving(service: Service, profile: Profile) -> None:
    """Wait until part of the home is in the store."""
    instance = service.settings.snapshots_dir / profile.id
    await_some(lambda: instance.glob("*/.home*.tmp"), what="the home is being saved")


def await_copying(engine: Engine, profile: Profile) -> None:
    """Wait until part of the home is in the node's own copy, with the archive whole."""
    copies = re.sub("home$", "copy-*", profile.home)
    volumes = engine.volume(profile.home).parent.parent
    await_some(lambda: volumes.glob(f"{copies}/_data/*/big"), what="the home is being copied")


def await_unpacking(engine: Engine, profile: Profile) -> None:
    """Wait until part of the home is in the volume that is filled from the archive."""
    await_some(lambda: engine.volume(profile.home).glob("big"), what="the home is being unpacked")


def await_some(files: Callable[[], Iterator[Path]], *, what: str) -> None:
    def found() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(BEGUN_BYTES <= file.stat().st_size < BIG_MB << 20 for file in files())
        return False

    wait_until(found, what=what)


# ---- what must be true afterwards


@contextlib.contextmanager
def lost(service: Service, engine: Engine, *, how: str) -> Iterator[None]:
    """Lose node a, and have it back at the end; others go on without it meanwhile."""
    getattr(engine, how)()
    try:
        made = service.create(config=SMALL, node_preference="b")
        assert (made["status"], made["node_id"]) == ("running", "b")
        assert service.delete(made["id"]).status_code == 200
        service.wait_for_node("a", "offline")
        yield
    finally:
        getattr(engine, BREAKS[how])()
    service.wait_for_node("a", "online")


def objects_on(engine: Engine, service: Service) -> set[str]:
    """Return the names of the cluster's containers and volumes on a node, and of those that bear nobody's name."""
    client = engine.client()
    containers = client.containers.list(all=True, ignore_removed=True)
    names = {each.name for each in (*containers, *client.volumes.list())}
    return {name for name in names if f"-{service.cluster}-" in name or not name.startswith("machineuse-")}


def assert_nothing_else(service: Service, engines: Mapping[str, Engine], *profiles: Profile) -> None:
    """Nodes and store must have what the instances are made of: no body twice, nothing half made, no helper."""
    shown = {profile.id: service.get(profile.id) for profile in profiles}
    for node_id, engine in engines.items():
        wanted = {
            name
            for instance_id, instance in shown.items()
            if instance["node_id"] == node_id and instance["status"] in ("running", "idle")
            for name in (service.container_name(instance_id), f"{service.container_name(instance_id)}-home")
        }
        copies = {
            f"{service.container_name(instance_id)}-copy-{snapshot['generation']}"
            for instance_id, instance in shown.items()
            for snapshot in instance["snapshots"]
            if snapshot["node_id"] == node_id
        }

        def is_clean(engine: Engine = engine, wanted: set[str] = wanted, copies: set[str] = copies) -> bool:
            return wanted <= objects_on(engine, service) <= wanted | copies

        try:
            wait_until(is_clean, what="nothing else is there")
        except AssertionError:
            raise AssertionError(
                f"node {node_id} has {objects_on(engine, service)}, and not just {wanted}, {copies}"
            ) from None
    for profile in profiles:
        snapshots = shown[profile.id]["snapshots"]
        assert all(snapshot["state"] == "verified" for snapshot in snapshots)
        directory = service.settings.snapshots_dir / profile.id
        files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        assert {name for name in files if name.endswith(".tmp")} == set()
        assert {name for name in files if name.endswith("manifest.json")} == {
            f"{snapshot['generation']}/manifest.json" for snapshot in snapshots
        }


def assert_kept_and_delete(service: Service, engines: Mapping[str, Engine], profile: Profile) -> None:
    assert profile.read() == "first"
    profile.assert_full()
    assert_nothing_else(service, engines, profile)
    assert service.delete(profile.id).status_code == 200
    assert_nothing_else(service, engines)


def test_a_capture_that_is_cut_off_is_refused_and_the_instance_runs_once_the_node_is_back(
    services: Callable[[str], Service], engines: Mapping[str, Engine]
) -> None:
    service, a = services("wait"), engines["a"]
    profile = Profile(service, engines, node_id="a")
    profile.fill()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.post, f"{profile.id}/dormant", wait_s=120)
        await_saving(service, profile)
        with lost(service, a, how="unplug"):
            assert service.get(profile.id)["operation"] == "making_dormant"
        refused = answer.result(timeout=120)
    assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_failed"), refused.text
    there = await_rest(service, profile.id)
    assert (there["status"], there["node_id"]) == ("running", "a")
    assert_kept_and_delete(service, engines, profile)


def test_an_instance_whose_archive_was_whole_falls_asleep_and_wakes_without_its_node(
    services: Callable[[str], Service], engines: Mapping[str, Engine]
) -> None:
    """Only the node's own copy was still to be made: nobody needs the node for anything else."""
    service, a = services("wait"), engines["a"]
    profile = Profile(service, engines, node_id="a")
    profile.fill()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.post, f"{profile.id}/dormant", wait_s=120)
        await_copying(a, profile)
        with lost(service, a, how="freeze"):
            assert answer.result(timeout=60).json()["status"] == "dormant"
            woken = profile.revive("a")
            assert (woken["status"], woken["node_id"], woken["restore_note"]) == ("running", "b", None)
    assert_kept_and_delete(service, engines, profile)


@pytest.mark.parametrize(("step", "how"), [("saving", "kill"), ("copying", "unplug")])
def test_an_instance_whose_node_is_lost_while_it_is_drained_is_given_back_elsewhere(
    services: Callable[[str], Service], engines: Mapping[str, Engine], step: str, how: str
) -> None:
    """From the snapshot before, telling what is lost; or, once the drain's own is whole, as it was."""
    service, a = services("move"), engines["a"]
    profile = Profile(service, engines, node_id="a")
    profile.sleep()
    assert profile.revive("a")["node_id"] == "a"
    profile.write("second")
    profile.fill()
    service.write_cluster_file(nodes_of(engines, availability="draining"))
    try:
        if step == "saving":
            await_saving(service, profile)
        else:
            await_copying(a, profile)
        with lost(service, a, how=how):
            wait_until(lambda: service.get(profile.id)["node_id"] == "b", what="it goes elsewhere")
            there = await_rest(service, profile.id)
        moves = [message for kind, message in events_of(service, profile.id) if kind == "move"]
        if step == "saving":
            assert profile.read() == "first"
            assert [there["restore_note"] is not None, len(moves)] == [True, 1]
            assert "from snapshot 2 of" in moves[0]
            assert "what it did after that is lost" in moves[0]
        else:
            assert profile.read() == "second"
            profile.assert_full()
            assert (there["restore_note"], moves) == (None, [])
        assert_nothing_else(service, engines, profile)
    finally:
        service.write_cluster_file(nodes_of(engines))
        wait_until(
            lambda: service.http.get("/v2/nodes/a").json()["availability"] == "active", what="it is drained no more"
        )
    assert service.delete(profile.id).status_code == 200
    assert_nothing_else(service, engines)


@pytest.mark.parametrize(("policy", "how"), [("wait", "kill"), ("move", "freeze")])
def test_a_revival_onto_a_node_that_is_lost_meanwhile_comes_to_its_end(
    services: Callable[[str], Service], engines: Mapping[str, Engine], policy: str, how: str
) -> None:
    """On another node, whatever the policy says of instances that run: it has nothing to lose. Its caller waits."""
    service, a = services(policy), engines["a"]
    profile = Profile(service, engines, node_id="b")
    profile.fill()
    profile.sleep()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(profile.revive, "a", wait_s=120)
        await_unpacking(a, profile)
        with lost(service, a, how=how):
            revived = answer.result(timeout=60)
    assert (revived["status"], revived["node_id"]) == ("running", "b")
    assert "Node a was lost while it was being restored there." in revived["restore_note"]
    (moved,) = [message for kind, message in events_of(service, profile.id) if kind == "move"]
    assert "is lost" not in moved
    assert_kept_and_delete(service, engines, profile)
