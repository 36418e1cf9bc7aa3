"""One fake node with one instance, and a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from provisioner.snapshots.capture import CaptureRequest
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.machine import Change, ChangeKind, Volumes
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import RestoreRequest
from provisioner.snapshots.sealing import Sealing
from tests.unit.snapshots.fakes import FakeMachine

SNAPSHOT = SnapshotId(instance_id="mu-test", generation=3)


@dataclass
class Scene:
    """The node, the store and what is asked of them."""

    machine: FakeMachine
    store: DirectoryStore
    store_root: Path
    capture: CaptureRequest

    @property
    def home(self) -> Path:
        return self.machine.volume("home")

    def restore(self, method: Method, *, volume: str = "new-home") -> RestoreRequest:
        """Make an empty volume and return the request to fill it."""
        self.machine.add_volume(volume)
        volumes = Volumes(home=volume, copy="copy", home_path="/home/machine")
        return RestoreRequest(snapshot=SNAPSHOT, method=method, volumes=volumes, image="browser")


PLAIN_AND_ENCRYPTED = pytest.mark.parametrize("sealing", ["plain", "encrypted"], indirect=True)
"""Lets a test run on both kinds of store."""


@pytest.fixture
def sealing(request: pytest.FixtureRequest, tmp_path: Path) -> Sealing:
    if getattr(request, "param", "plain") == "plain":
        return Sealing()
    keys = KeyFile(tmp_path / "keys.json")
    keys.create()
    return Sealing(keys)


@pytest.fixture
def scene(tmp_path: Path, sealing: Sealing) -> Scene:
    machine = FakeMachine(tmp_path / "node")
    home = machine.add_volume("home")
    (home / "profile" / "Default").mkdir(parents=True)
    (home / "profile" / "Default" / "Cookies").write_text("cookie" * 1000)
    (home / "profile" / "SingletonLock").symlink_to("host-1")
    (home / "notes.txt").write_text("kept")
    container = machine.add_container("browser-1", volume="home", instance=SNAPSHOT.instance_id)
    (container.root / "etc").mkdir()
    (container.root / "etc" / "added").write_text("added")
    (container.root / "opt" / "tool").mkdir(parents=True)
    (container.root / "opt" / "tool" / "run").write_text("tool")
    container.changes = [
        Change("/etc", ChangeKind.MODIFIED),
        Change("/etc/added", ChangeKind.ADDED),
        Change("/etc/gone", ChangeKind.DELETED),
        Change("/opt", ChangeKind.MODIFIED),
        Change("/opt/tool", ChangeKind.ADDED),
        Change("/opt/tool/run", ChangeKind.ADDED),
        Change("/tmp", ChangeKind.MODIFIED),
        Change("/tmp/socket", ChangeKind.ADDED),
    ]
    root = tmp_path / "store"
    request = CaptureRequest(
        snapshot=SNAPSHOT,
        cluster="local",
        node_id="local",
        container="browser-1",
        volumes=Volumes(home="home", copy="copy", home_path="/home/machine"),
        image="browser",
    )
    return Scene(machine=machine, store=DirectoryStore(root, sealing=sealing), store_root=root, capture=request)
