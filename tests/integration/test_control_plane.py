"""The service without its front door, with the real CLI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from provisioner.errors import LedgerMismatch
from provisioner.replica import Replica
from provisioner.settings import Settings

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def test_a_service_with_another_ledger_than_its_stack_s_does_not_start(tmp_path: Path) -> None:
    """Whoever removed the ledger and kept the state would go on with a cluster that the service knows nothing of."""
    for name in ("Pulumi.yaml", "stacks", "provisioner", "images", ".venv"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    nodes = [{"id": "local", "host": f"unix://{tmp_path}/nobody.sock"}]  # none answers: nothing is made anywhere
    (tmp_path / "Pulumi.other.yaml").write_text(json.dumps({"config": {"cluster:nodes": nodes}}))
    settings = Settings(project_dir=tmp_path, cluster="other")
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
