"""What may be deleted, by the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.guard import LedgerGuard
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeStatus
from provisioner.plugins.policy import DeleteDecision
from stacks.spec import NodeSpec
from tests.support.records import make_record
from tests.support.world import empty_ledger

ID = "mu-test"


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = empty_ledger(ledger_location)
    yield ledger
    ledger.close()


def ask(ledger: Ledger, *, kind: str = "volume", owner: str | None = None, replacing: bool = False) -> DeleteDecision:
    labels = {"machineuse.instance": ID, "machineuse.ledger": owner or ledger.id}
    return LedgerGuard(ledger, stop_timeout_s=1).check_delete(
        urn=f"urn:x::{ID}-{kind}", labels=labels, kind=kind, replacing=replacing
    )


@pytest.mark.parametrize("replacing", [False, True])
def test_a_cloud_volume_goes_only_after_a_verified_snapshot(ledger: Ledger, replacing: bool) -> None:
    ledger.instances.create(lambda _: (make_record(volume="ebs"), "test"))
    assert not ask(ledger, kind="cloud_volume", replacing=replacing).allowed
    ledger.instances.change(ID, lambda r, _: lifecycle.wish_dormant(r, reason="test"))
    assert not ask(ledger, kind="cloud_volume", replacing=replacing).allowed
    ledger.instances.change(ID, lambda r, _: lifecycle.note_snapshot(r, generation=2, size_bytes=1, keep=1))
    assert ask(ledger, kind="cloud_volume", replacing=replacing).allowed


def test_a_volume_that_only_names_a_device_may_be_replaced(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(volume="ebs"), "test"))
    assert not ask(ledger, kind="mount").allowed
    assert ask(ledger, kind="mount", replacing=True).allowed


def test_what_is_wanted_is_kept_but_a_container_may_be_replaced(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(), "test"))
    assert not ask(ledger).allowed
    assert not ask(ledger, replacing=True).allowed
    assert not ask(ledger, kind="container").allowed
    assert ask(ledger, kind="container", replacing=True).allowed


def test_what_is_being_deleted_may_go(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(), "test"))
    ledger.instances.change(ID, lambda record, _: lifecycle.wish_absent(record, force=True))
    assert ask(ledger).allowed
    assert ask(ledger).force


def test_what_another_ledger_made_is_kept(ledger: Ledger) -> None:
    decision = ask(ledger, owner="another")
    assert not decision.allowed
    assert "MACHINEUSE_DATA_DIR" in decision.reason


def test_what_the_ledger_never_knew_is_kept(ledger: Ledger) -> None:
    """An older copy of the ledger was put back, say: it has the right id, and lacks the instances made since."""
    for kind in ("volume", "container", "snapshot"):
        decision = ask(ledger, kind=kind)
        assert not decision.allowed
        assert "never known" in decision.reason


def test_what_the_ledger_saw_deleted_may_go(ledger: Ledger) -> None:
    ledger.instances.create(lambda _: (make_record(), "test"))
    ledger.instances.change(ID, lambda record, _: lifecycle.wish_absent(record, force=False))
    ledger.instances.change(ID, lambda record, _: lifecycle.note_gone(record))
    assert ask(ledger).allowed


def test_only_what_is_on_a_node_that_does_not_answer_is_left_there(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.nodes.sync([NodeSpec(id="local"), NodeSpec(id="other", host="unix:///other")])
    ledger.instances.create(lambda _: (make_record(), "test"))
    ledger.instances.change(ID, lambda record, _: lifecycle.wish_absent(record, force=False))
    monkeypatch.setattr(ledger.nodes, "list", lambda: pytest.fail("every node was read, to know of one"))
    for local, other in ((NodeStatus.ONLINE, NodeStatus.OFFLINE), (NodeStatus.OFFLINE, NodeStatus.ONLINE)):
        ledger.nodes.observe("local", values={"status": local})
        ledger.nodes.observe("other", values={"status": other})
        assert ask(ledger).abandon is (local is NodeStatus.OFFLINE)


def test_what_is_left_is_noted_for_its_own_node_of_two_with_the_same_address(ledger: Ledger) -> None:
    host = "ssh://root@10.0.0.2"  # in two networks, say, each behind a jump host of its own
    ledger.nodes.sync([NodeSpec(id=name, host=host, ssh_opts=("-J", f"jump-{name}")) for name in "ab"])
    ledger.instances.create(lambda _: (make_record(node_id="b"), "test"))
    LedgerGuard(ledger, stop_timeout_s=1).note_leftover(urn=f"urn:x::{ID}-browser", host=host, name="its-container")
    assert ledger.leftovers.list("a") == []
    assert [left.name for left in ledger.leftovers.list("b")] == ["its-container"]
