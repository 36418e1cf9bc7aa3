"""The service without its front door, with the real CLI."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from provisioner.errors import LedgerMismatch
from provisioner.ledger.instances import Update
from provisioner.ledger.records import SnapshotRecord, SnapshotState
from provisioner.replica import Replica
from provisioner.settings import Settings
from stacks.spec import NodeSpec
from tests.support.records import make_record
from tests.support.watched import wait_until

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def project_in(directory: Path) -> Settings:
    """Make a project with one cluster of one node that never answers: nothing is made anywhere."""
    for name in ("Pulumi.yaml", "stacks", "provisioner", "images", ".venv"):
        (directory / name).symlink_to(CHECKOUT / name)
    nodes = [{"id": "local", "host": f"unix://{directory}/nobody.sock"}]
    (directory / "Pulumi.other.yaml").write_text(json.dumps({"config": {"cluster:nodes": nodes}}))
    return Settings(project_dir=directory, cluster="other")


def test_what_is_left_of_snapshots_is_removed_but_for_those_that_are_still_to_be_taken(tmp_path: Path) -> None:
    """After a long outage the next attempt begins while the store is cleaned up: the two must not meet."""
    replica = Replica(project_in(tmp_path))
    replica.ledger.nodes.sync([NodeSpec(id="local", host=f"unix://{tmp_path}/nobody.sock")])
    replica.ledger.instances.create(lambda _: (make_record(), "made by a test"))
    pending = SnapshotRecord(
        instance_id="mu-test", generation=1, node_id="local", state=SnapshotState.PENDING, bytes=None, created_at=0
    )
    replica.ledger.instances.change("mu-test", lambda _, __: Update(put_snapshots=(pending,)))
    kept, removed = (replica.settings.snapshots_dir / "mu-test" / generation for generation in ("1", "2"))
    for directory in (kept, removed):
        directory.mkdir(parents=True)
        (directory / "home.tar.zst").touch()
        for path in (directory / "home.tar.zst", directory):
            os.utime(path, (0, 0))
    try:
        replica.start()
        wait_until(lambda: not removed.exists(), what="the store is cleaned up")
        assert (kept / "home.tar.zst").exists()
    finally:
        replica.stop()


def test_a_service_with_another_ledger_than_its_stack_s_does_not_start(tmp_path: Path) -> None:
    """Whoever removed the ledger and kept the state would go on with a cluster that the service knows nothing of."""
    settings = project_in(tmp_path)
    first = Replica(settings)
    try:
        first.start()
    finally:
        first.stop()
    for path in settings.data_dir.glob("ledger.db*"):
        path.unlink()
    second = Replica(settings)
    try:
        with pytest.raises(LedgerMismatch, match="This stack belongs to the ledger"):
            second.start()
    finally:
        second.stop()
