"""How far a node is with giving away its instances, and how that is shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import SecretStr

from api import drain_progress
from provisioner import lifecycle
from provisioner.errors import Conflict, SnapshotFailed
from provisioner.leaving import service_runs, watch_leaving
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import NodeStatus
from provisioner.states import Status, Wanted
from stacks.spec import Availability, NodeSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = empty_ledger(ledger_location)
    ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b", host="unix:///nobody", availability=Availability.DRAINING)])
    beat = {"status": NodeStatus.ONLINE, "last_heartbeat": time.time()}
    for node_id in ("a", "b"):
        ledger.nodes.observe(node_id, values=beat)
    yield ledger
    ledger.close()


def add(ledger: Ledger, instance_id: str, **fields: Any) -> None:
    given = {"node_id": "b", "debug_port": None, "stream_port": None} | fields
    ledger.instances.create(lambda _: (make_record(id=instance_id, **given), "test"))


def test_what_is_on_a_node_is_moving_stuck_or_waiting(ledger: Ledger) -> None:
    add(ledger, "elsewhere", node_id="a")
    add(ledger, "asleep", status=Status.DORMANT, wanted=Wanted.DORMANT, body=False)
    add(ledger, "waits")
    add(ledger, "moves")
    ledger.instances.change("moves", lambda r, _: lifecycle.wish_drained(r))
    add(ledger, "failed", status=Status.FAILED)
    add(ledger, "refused")
    ledger.events.add("not_moved", message="no node has room", instance_id="refused", node_id="b")
    now = watch_leaving(ledger, node_id="b")
    assert now.waiting == ("waits",)
    assert now.moving == {"moves": "moving"}
    assert set(now.stuck) == {"failed", "refused"}
    assert now.stuck["refused"] == "no node has room"
    assert now.left == 4


def test_what_was_refused_once_is_not_stuck_for_ever(ledger: Ledger) -> None:
    add(ledger, "mu")
    ledger.events.add("not_moved", message="no node has room", instance_id="mu", node_id="b")
    ledger.instances.change("mu", lambda r, _: lifecycle.wish_drained(r))
    assert not watch_leaving(ledger, node_id="b").stuck
    failed = SnapshotFailed("The store is full.")
    ledger.instances.change("mu", lambda r, _: lifecycle.note_sleep_failed(r, generation=r.generation, error=failed))
    assert watch_leaving(ledger, node_id="b").stuck == {"mu": "The store is full."}


def test_a_service_runs_while_some_node_has_a_heartbeat(ledger: Ledger) -> None:
    assert service_runs(ledger, heartbeat_s=5)
    for node_id in ("a", "b"):
        ledger.nodes.observe(node_id, values={"last_heartbeat": time.time() - 60})
    assert not service_runs(ledger, heartbeat_s=5)
    assert service_runs(ledger, heartbeat_s=30)


def test_an_empty_node_is_told_at_once(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    drain_progress.follow(ledger, node_id="b", heartbeat_s=5)
    assert capsys.readouterr().out == "Node b is empty.\n"


def test_a_node_is_not_called_empty_before_the_service_knows_that_nothing_new_may_come(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.nodes.sync([NodeSpec(id="b")])

    def take_over(_: float) -> None:
        assert capsys.readouterr().out == ""
        ledger.nodes.sync([NodeSpec(id="b", availability=Availability.DRAINING)])

    monkeypatch.setattr(drain_progress.time, "sleep", take_over)
    drain_progress.follow(ledger, node_id="b", heartbeat_s=5)
    assert capsys.readouterr().out == "Node b is empty.\n"


@pytest.mark.parametrize("left", [0, 1])
def test_a_drain_that_somebody_stops_is_not_watched_for_ever_nor_called_done(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    add(ledger, "mu")

    def uncordon(_: float) -> None:
        if not left:
            ledger.instances.change("mu", lambda _, __: Update(values={"node_id": "a"}))
        ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b", host="unix:///nobody")])

    monkeypatch.setattr(time, "sleep", uncordon)
    with pytest.raises(Conflict, match="Node b takes instances again: its drain was stopped"):
        drain_progress.follow(ledger, node_id="b", heartbeat_s=5)
    assert "is empty" not in capsys.readouterr().out


def test_each_change_is_one_line_off_a_terminal(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ledger, "mu-1")
    add(ledger, "mu-2", status=Status.FAILED)
    steps = iter(
        [
            lambda: None,
            lambda: ledger.instances.change("mu-1", lambda r, _: lifecycle.wish_drained(r)),
            lambda: ledger.instances.change("mu-1", lambda r, _: lifecycle.note_gone(r)),
            lambda: ledger.nodes.observe("b", values={"status": NodeStatus.OFFLINE}),
            lambda: ledger.instances.change("mu-2", lambda r, _: lifecycle.note_gone(r)),
        ]
    )
    monkeypatch.setattr(drain_progress.time, "sleep", lambda _: next(steps)())
    drain_progress.follow(ledger, node_id="b", heartbeat_s=5)
    assert capsys.readouterr().out.splitlines() == [
        "2 instance(s) to move.",
        "mu-2 stays for now: it has failed, and can't be moved: delete it",
        "mu-1: moving",
        "mu-1 has left. 1 to go.",
        "Node b does not answer: what is on it waits for it.",
        "mu-2 has left. 0 to go.",
        "Node b is empty.",
    ]


def test_without_a_service_it_is_said_who_would_move_them(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ledger, "mu")
    for node_id in ("a", "b"):
        ledger.nodes.observe(node_id, values={"last_heartbeat": None})

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drain_progress.time, "sleep", interrupt)
    with pytest.raises(typer.Exit) as ended:
        drain_progress.follow(ledger, node_id="b", heartbeat_s=5)
    assert ended.value.exit_code == 130
    said = capsys.readouterr().out
    assert "No service runs" in said
    assert "goes on draining node b" in said
    assert "`machineuse node drain b` shows progress again" in said


def test_on_a_terminal_nothing_in_a_reason_is_markup(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ledger, "mu")
    why = "node a is full [/a], at tcp://[fd00::3]:2376; " + "no room there " * 10
    ledger.events.add("not_moved", message=why, instance_id="mu", node_id="b")
    gone = [lambda: ledger.instances.change("mu", lambda r, _: lifecycle.note_gone(r))]
    monkeypatch.setattr(drain_progress.time, "sleep", lambda _: gone.pop()())
    drain_progress._follow_live(ledger, node_id="b", heartbeat_s=5)
    assert f"mu stays for now: {why}\n" in capsys.readouterr().out
