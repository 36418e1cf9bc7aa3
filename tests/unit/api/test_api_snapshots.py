"""The commands for the keys of snapshots: what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from api import cli
from provisioner.errors import SettingsError
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import SnapshotRecord, SnapshotState
from provisioner.settings import Settings
from provisioner.snapshots.keyfile import KeyFile
from stacks.spec import NodeSpec
from tests.support.records import make_record


def test_no_key_is_dropped_while_a_snapshot_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was begun with the key that was in use then, and nobody could read it once it is complete."""
    monkeypatch.setenv("MACHINEUSE_SNAPSHOT_KEYS", str(tmp_path / "keys.json"))
    keys = KeyFile(tmp_path / "keys.json")
    first = keys.create().primary_id
    keys.rotate()
    pending = SnapshotRecord(
        instance_id="mu-test", generation=2, node_id="local", state=SnapshotState.PENDING, bytes=None, created_at=0
    )
    ledger = Ledger.create(Settings(data_dir=tmp_path).ledger_location)
    try:
        ledger.nodes.sync([NodeSpec(id="local", host="unix:///nobody.sock")])
        ledger.instances.create(lambda _: (make_record(), "made by a test"))
        ledger.instances.change("mu-test", lambda _, __: Update(put_snapshots=(pending,)))
    finally:
        ledger.close()
    drop = ["snapshots", "drop-key", str(first), "--data-dir", str(tmp_path)]
    refused = CliRunner().invoke(cli.app, drop)
    assert isinstance(refused.exception, SettingsError)
    assert f"A snapshot of mu-test is being taken, maybe with key {first}." in refused.exception.message
    assert first in keys.load().ids
    assert CliRunner().invoke(cli.app, [*drop, "--force"]).exit_code == 0
    assert first not in keys.load().ids
