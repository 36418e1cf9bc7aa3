"""Going dormant: snapshot, verify, and only then destroy; and an instance whose snapshot fails goes on as it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.browsing import new_page
from tests.support.containers import execute
from tests.support.service import Service

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
COOKIE = {"name": "visit", "value": "first", "url": "http://example.test/", "expires": 4e9}


def resources_of(service: Service, instance_id: str) -> set[str]:
    """Return the types of what the stack has of an instance."""
    state = json.loads(service.pulumi("stack", "export", "--stack", service.cluster).stdout)
    mine = [resource for resource in state["deployment"]["resources"] if instance_id in resource["urn"]]
    return {resource["type"] for resource in mine}


def promised_by(service: Service) -> int:
    count: int = service.node()["instances_count"]
    return count


RUNNING = {"machineuse:index:Instance", "docker:index/volume:Volume", "docker:index/container:Container"}
DORMANT = {"machineuse:index:Instance", "machineuse:index:Snapshot"}


def test_a_dormant_instance_is_a_verified_snapshot_and_nothing_else(service: Service) -> None:
    instance = service.create(config=SMALL)
    container = service.container(instance["id"])
    assert resources_of(service, instance["id"]) == RUNNING
    assert promised_by(service) == 1

    answer = service.post(f"{instance['id']}/dormant")
    assert answer.status_code == 200, answer.text
    dormant = answer.json()
    assert (dormant["status"], dormant["operation"], dormant["error"]) == ("dormant", None, None)
    assert (dormant["debug_port"], dormant["stream_port"]) == (None, None)
    assert dormant["urls"] == {"debug": None, "stream": None}
    assert dormant["resources"] == {"cpu_percent": 0, "memory_percent": 0, "disk_percent": 0}

    # Its place on the node is free: nothing of it runs, or is kept for it but the snapshot's copy.
    (snapshot,) = dormant["snapshots"]
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    assert service.docker.api.containers(all=True, filters=mine) == []
    assert service.volumes() == [f"{container.name}-copy-{snapshot['generation']}"]
    assert promised_by(service) == 0
    counted = service.http.get("/v2/metrics").json()["cluster"]
    assert (counted["total_instances"], counted["running_instances"]) == (1, 0)
    assert resources_of(service, instance["id"]) == DORMANT

    # The snapshot is whole: every part is what the manifest says.
    assert snapshot["state"] == "verified"
    directory = service.project / ".machineuse/snapshots" / instance["id"] / str(snapshot["generation"])
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["stopped_cleanly"] is True
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *(p["name"] for p in manifest["parts"])}
    for part in manifest["parts"]:
        stored = (directory / part["name"]).read_bytes()
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (part["bytes"], part["sha256"])
    assert snapshot["bytes"] == sum(part["bytes"] for part in manifest["parts"])

    again = service.post(f"{instance['id']}/dormant")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    assert service.delete(instance["id"]).status_code == 200
    assert service.volumes() == []
    assert not directory.exists()
    assert resources_of(service, instance["id"]) == set()


# ---- snapshots that fail


class Store:
    """A directory for snapshots that can be made to fail for real."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def a_file(self) -> Iterator[None]:
        """Be a file instead of a directory."""
        aside = self.path.with_suffix(".aside")
        if self.path.exists():
            self.path.rename(aside)
        self.path.write_text("not a directory")
        try:
            yield
        finally:
            self.path.unlink()
            if aside.exists():
                aside.rename(self.path)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Be on a file system that is mounted read-only."""
        with self._mounted("size=1m,ro"):
            yield

    @contextmanager
    def full(self) -> Iterator[None]:
        """Be on a disk that is too small."""
        with self._mounted("size=64k"):
            yield

    @contextmanager
    def _mounted(self, options: str) -> Iterator[None]:
        self.path.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture(scope="module")
def store(service: Service) -> Store:
    return Store(service.settings.snapshots_dir)


@pytest.fixture(scope="module")
def instance(service: Service) -> dict[str, Any]:
    """Give an instance with something to lose, and too much of it for a small disk."""
    instance = service.create(config=SMALL)
    write = "cd /home/machine; echo kept > note; head -c 1000000 /dev/urandom > noise"
    execute(service.container(instance["id"]), "sh", "-c", write)
    with new_page(instance) as page:
        page.context.add_cookies([COOKIE])  # type: ignore[list-item]
    return instance


def assert_nothing_lost(service: Service, instance: dict[str, Any]) -> None:
    assert execute(service.container(instance["id"]), "cat", "/home/machine/note") == "kept\n"
    with new_page(instance) as page:
        assert [cookie["value"] for cookie in page.context.cookies()] == [COOKIE["value"]]


@pytest.mark.parametrize(
    ("cause", "words", "restarts"),
    [("a_file", "can't be written", False), ("read_only", "Read-only file system", False), ("full", "No space", True)],
)
def test_an_instance_whose_snapshot_fails_goes_on_running_with_the_error_on_it(
    service: Service, store: Store, instance: dict[str, Any], cause: str, words: str, restarts: bool
) -> None:
    started_at = service.container(instance["id"]).attrs["State"]["StartedAt"]
    with getattr(store, cause)():
        answer = service.post(f"{instance['id']}/dormant")
        assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_failed")
        assert words in answer.json()["detail"]
        assert str(store.path) in answer.json()["detail"]
        running = service.wait_for(instance["id"], "running")
        assert running["error"]["code"] == "snapshot_failed"
        assert words in running["error"]["message"]
        assert running["snapshots"] == []
        assert (running["debug_port"], running["stream_port"]) == (instance["debug_port"], instance["stream_port"])
        # A store that can't be written at all is found out before the browser is stopped.
        now = service.container(instance["id"]).attrs["State"]["StartedAt"]
        assert (now != started_at) is restarts
    assert_nothing_lost(service, instance)
    assert resources_of(service, instance["id"]) == RUNNING
    assert not any("-copy-" in volume for volume in service.volumes())


def test_it_can_go_dormant_once_the_cause_is_gone(service: Service, store: Store, instance: dict[str, Any]) -> None:
    with store.a_file():
        assert service.post(f"{instance['id']}/dormant").status_code == 409
    answer = service.post(f"{instance['id']}/dormant")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["error"]) == ("dormant", None)
    assert resources_of(service, instance["id"]) == DORMANT
    revived = service.post(f"{instance['id']}/revive").json()
    assert revived["status"] == "running"
    assert_nothing_lost(service, revived)
