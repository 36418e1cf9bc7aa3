"""When a replica leads and when it stops to; the lease and the ledger are real, the control plane only listens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from provisioner import lease as lease_module
from provisioner import replica as module
from provisioner.errors import LedgerMismatch, LedgerUnavailable
from provisioner.lease import LEASE
from provisioner.replica import Replica
from provisioner.settings import Settings
from provisioner.watchdog import clock
from tests.support.watched import wait_until


class Listening:
    """Writes down what it was told; its starts fail with what `fails` has."""

    said: ClassVar[list[str]]
    fails: ClassVar[list[Exception]]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.said.append("made")

    def start(self) -> None:
        if self.fails:
            raise self.fails.pop()
        self.said.append("started")

    def abort(self) -> None:
        self.said.append("aborted")

    def stop(self, **_: float) -> None:
        self.said.append("stopped")


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    monkeypatch.setattr(Listening, "said", [], raising=False)
    monkeypatch.setattr(Listening, "fails", [], raising=False)
    monkeypatch.setattr(module, "ControlPlane", Listening)
    monkeypatch.setattr(module, "AGAIN_S", 0.1)
    monkeypatch.setattr(lease_module, "RENEWALS", 600)
    replica = Replica(Settings(project_dir=tmp_path, lease_s=60))
    yield replica
    replica.stop()


def test_all_has_ended_before_a_ledger_that_is_away_is_asked_who_leads(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def refuse(*_: Any, **__: Any) -> Any:
        asked.append([*Listening.said])
        raise LedgerUnavailable("The ledger's database does not answer.")

    replica.start()
    assert replica.is_leading
    with monkeypatch.context() as away:
        for reading in ("take", "get", "release"):
            away.setattr(replica.ledger.leases, reading, refuse)
        now = clock()
        away.setattr(lease_module, "clock", lambda: now + 60)
        wait_until(lambda: asked and asked[-1][2:] == ["aborted", "stopped"], what="it has ended, and asks")
        assert not replica.is_leading
    assert not any("aborted" in said and "stopped" not in said for said in asked)
    wait_until(lambda: replica.is_leading, what="it leads again")
    assert Listening.said[4:] == ["made", "started"]


def test_it_tries_again_whatever_its_start_failed_with(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "elsewhere|1|m|1"
    replica.ledger.leases.take(LEASE, holder=other, duration_s=60)
    monkeypatch.setattr(Listening, "fails", [RuntimeError("odd"), LedgerUnavailable("away")])
    release = replica.ledger.leases.release

    def release_oddly(*arguments: Any, **named: Any) -> None:
        release(*arguments, **named)
        raise RuntimeError("odder")

    with monkeypatch.context() as odd:
        odd.setattr(replica.ledger.leases, "release", release_oddly)
        replica.start()
        assert not replica.is_leading
        replica.ledger.leases.take(LEASE, holder=other, duration_s=0)
        wait_until(lambda: replica.is_leading, what="it leads")
    assert Listening.said == ["made", "stopped", "made", "stopped", "made", "started"]


def test_the_ledger_of_another_cluster_is_refused(replica: Replica, tmp_path: Path) -> None:
    """A second one would be given the instances of the first, with empty homes."""
    ledger = replica.settings.data_dir / "ledger.db"
    with pytest.raises(LedgerMismatch, match="cluster 'local', and this is cluster 'other'"):
        Replica(Settings(project_dir=tmp_path, data_dir=tmp_path / "b", cluster="other", ledger=str(ledger)))
