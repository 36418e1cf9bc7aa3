# ruff: noqa: ARG002 - the signatures are the protocol's
"""The machineuse resources without an engine: what is compared, and how a snapshot goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import LedgerMismatch, NodeUnreachable, SnapshotFailed, StillWanted
from provisioner.plugins.machineuse.claim import ClaimType
from provisioner.plugins.machineuse.restore import RestoreType
from provisioner.plugins.machineuse.snapshot import SnapshotType
from provisioner.plugins.policy import DeleteDecision
from provisioner.plugins.resources import Call, Change, ChangeKind
from provisioner.plugins.sessions import Session
from provisioner.plugins.values import UNKNOWN
from provisioner.snapshots.directory import DirectoryStore
from provisioner.snapshots.keyfile import KeyFile
from provisioner.snapshots.manifest import PartName, SnapshotId
from provisioner.snapshots.sealing import Sealing
from provisioner.snapshots.tars import write_part
from provisioner.volumes.ec2 import Ec2Options, Ec2Regions
from tests.support.manifests import make_manifest

DEAD_NODE = "tcp://127.0.0.1:1"
SNAPSHOT = SnapshotId(instance_id="mu-1", generation=2)
INPUTS: dict[str, Any] = {
    "cluster": "local",
    "ledgerId": "ledger",
    "instance": "mu-1",
    "generation": 2,
    "nodeId": "local",
    "dockerHost": DEAD_NODE,
    "container": "c",
    "volume": "v",
    "image": "browser",
    "homePath": "/home/machine",
    "copyVolume": "v-copy",
    "helperImage": "browser",
    "stopTimeoutS": 10,
}
RESTORE: dict[str, Any] = {
    key: INPUTS[key]
    for key in ("cluster", "ledgerId", "instance", "nodeId", "dockerHost", "volume", "image", "helperImage")
} | {"snapshotGeneration": 2, "method": "quick_start", "copyVolume": "v-copy"}


@dataclass
class Policy:
    decision: DeleteDecision
    away: bool = False
    leftovers: list[str] = field(default_factory=list)

    def check_delete(self, *, urn: str, labels: Mapping[str, str], kind: str, replacing: bool) -> DeleteDecision:
        assert (kind, labels["machineuse.instance"], labels["machineuse.ledger"]) == ("snapshot", "mu-1", "ledger")
        assert not replacing
        return self.decision

    def is_away(self, node_id: str) -> bool:
        assert node_id == "local"
        return self.away

    def note_leftover(self, *, urn: str, host: str, name: str) -> None:
        assert host == DEAD_NODE
        self.leftovers.append(name)


@pytest.fixture
def call() -> Call:
    return Call(urn="urn", name="name", config={}, session=Session(""))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path)
    writer = store.begin(SNAPSHOT)
    with writer.part(PartName.HOME) as sink:
        part = write_part([bytes(1024)], sink, name=PartName.HOME)
    writer.commit(make_manifest(generation=2, parts=(part,)))
    return store


def snapshots(store: DirectoryStore, decision: DeleteDecision) -> tuple[SnapshotType, Policy]:
    policy = Policy(decision)
    return SnapshotType(
        store=store, hosts=DockerHosts(timeout_s=1), policy=policy, regions=Ec2Regions(Ec2Options())
    ), policy


def test_what_was_recorded_before_snapshots_could_be_live_stays_as_it_is(store: DirectoryStore, call: Call) -> None:
    kind, _ = snapshots(store, DeleteDecision(allowed=True))
    news = kind.check(call, olds=INPUTS, news=INPUTS | {"live": False}).inputs
    assert kind.check(call, olds={}, news=INPUTS).inputs == news
    assert not kind.diff(call, id="mu-1/2", old_inputs=INPUTS, old_outputs=INPUTS, news=news).changes
    assert kind.read(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS) is not None


def test_a_snapshot_whose_key_is_missing_is_still_there(tmp_path: Path, call: Call) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    keys.create()
    writer = DirectoryStore(tmp_path / "store", sealing=Sealing(keys)).begin(SNAPSHOT)
    with writer.part(PartName.HOME) as sink:
        part = write_part([bytes(1024)], sink, name=PartName.HOME, seal=writer.sealer().seal)
    writer.commit(writer.sealer().seal_manifest(make_manifest(generation=2, parts=(part,))))
    kind, _ = snapshots(DirectoryStore(tmp_path / "store"), DeleteDecision(allowed=True))
    assert kind.read(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS) is not None


def test_a_snapshot_that_the_ledger_keeps_is_not_deleted(store: DirectoryStore, call: Call) -> None:
    kind, _ = snapshots(store, DeleteDecision(allowed=False, reason="It is kept."))
    with pytest.raises(StillWanted, match="It is kept"):
        kind.delete(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS)
    assert store.read_manifest(SNAPSHOT)


def test_on_a_dead_node_nothing_is_deleted(store: DirectoryStore, call: Call) -> None:
    kind, policy = snapshots(store, DeleteDecision(allowed=True))
    with pytest.raises(NodeUnreachable):
        kind.delete(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS)
    assert store.read_manifest(SNAPSHOT)
    assert policy.leftovers == []


def test_on_a_dead_node_a_forced_delete_notes_what_it_leaves(store: DirectoryStore, call: Call) -> None:
    kind, policy = snapshots(store, DeleteDecision(allowed=True, force=True))
    kind.delete(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS)
    assert policy.leftovers == ["v-copy", "machineuse/restored:mu-1-2"]
    assert store.list("mu-1") == ()


def test_a_snapshot_that_was_whole_before_its_node_was_lost_is_taken_without_the_node(
    store: DirectoryStore, call: Call
) -> None:
    kind, policy = snapshots(store, DeleteDecision(allowed=True))
    with pytest.raises(SnapshotFailed, match="does not answer"):
        kind.create(call, inputs=INPUTS)  # asked, because it is not known to be away
    policy.away = True
    created = kind.create(call, inputs=INPUTS)
    assert (created.id, created.outputs["quickCopy"]) == ("mu-1/2", False)
    assert policy.leftovers == ["v-copy"]
    with pytest.raises(SnapshotFailed, match="node local does not answer"):
        kind.create(call, inputs=INPUTS | {"generation": 3})


def test_only_another_snapshot_is_a_difference(store: DirectoryStore, call: Call) -> None:
    kind, policy = snapshots(store, DeleteDecision(allowed=True))

    def differences(**changes: Any) -> list[str]:
        found = kind.diff(call, id="mu-1/2", old_inputs=INPUTS, old_outputs=INPUTS, news=INPUTS | changes)
        return sorted(found.changes)

    assert differences(helperImage="other", dockerHost="other", container="gone", image="newer") == []
    assert differences(generation=3) == ["generation"]
    restores = RestoreType(store=store, hosts=DockerHosts(), policy=policy)
    outputs = RESTORE | {"image": "machineuse/restored:mu-1-2"}
    assert not restores.diff(call, id="", old_inputs=RESTORE, old_outputs=outputs, news=RESTORE).changes
    assert restores.update(call, id="", old_inputs=RESTORE, old_outputs=outputs, news=RESTORE) == outputs


def test_a_node_that_leaves_is_a_difference_and_one_that_comes_back_is_none(store: DirectoryStore, call: Call) -> None:
    kind, _ = snapshots(store, DeleteDecision(allowed=False))
    gone = INPUTS | {"dockerHost": ""}
    found = kind.diff(call, id="mu-1/2", old_inputs=INPUTS, old_outputs=INPUTS, news=gone)
    assert found.changes == {"dockerHost": Change(kind=ChangeKind.UPDATE, replace=False)}
    assert not kind.diff(call, id="mu-1/2", old_inputs=gone, old_outputs=gone, news=gone).changes
    assert not kind.diff(call, id="mu-1/2", old_inputs=gone, old_outputs=gone, news=INPUTS).changes


def test_a_node_that_is_gone_for_good_may_leave_with_what_it_has(store: DirectoryStore, call: Call) -> None:
    kind, _ = snapshots(store, DeleteDecision(allowed=False))
    gone = INPUTS | {"dockerHost": ""}
    outputs = INPUTS | {"quickCopy": True, "bytes": 1}
    now = kind.update(call, id="mu-1/2", old_inputs=INPUTS, old_outputs=outputs, news=gone)
    assert now == gone | {"quickCopy": False, "bytes": 1}
    assert store.read_manifest(SNAPSHOT)


def test_a_snapshot_is_there_as_long_as_its_manifest_is(store: DirectoryStore, call: Call) -> None:
    kind, _ = snapshots(store, DeleteDecision(allowed=True))
    found = kind.read(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS | {"bytes": 1})
    assert found is not None
    assert found.outputs["bytes"] == 1
    store.delete(SNAPSHOT)
    assert kind.read(call, id="mu-1/2", inputs=INPUTS, outputs=INPUTS) is None


@pytest.mark.parametrize(
    ("news", "failing"),
    [
        (INPUTS, []),
        (INPUTS | {"volume": UNKNOWN, "__defaults": []}, []),
        (INPUTS | {"instance": "../x"}, ["instance"]),
        (INPUTS | {"colour": "red"}, ["colour"]),
        ({key: value for key, value in INPUTS.items() if key != "volume"}, ["volume"]),
        (INPUTS | {"volume": UNKNOWN, "generation": -1}, ["generation"]),
    ],
)
def test_inputs_are_checked_as_far_as_they_are_known(
    store: DirectoryStore, call: Call, news: dict[str, Any], failing: list[str]
) -> None:
    kind, _ = snapshots(store, DeleteDecision(allowed=True))
    checked = kind.check(call, olds={}, news=news)
    assert [failure.property for failure in checked.failures] == failing


def test_a_method_that_does_not_exist_is_refused(store: DirectoryStore, call: Call) -> None:
    kind = RestoreType(store=store, hosts=DockerHosts(), policy=Policy(DeleteDecision(allowed=True)))
    assert not kind.check(call, olds={}, news=RESTORE).failures
    checked = kind.check(call, olds={}, news=RESTORE | {"method": "magic"})
    assert [failure.property for failure in checked.failures] == ["method"]


def test_a_stack_belongs_to_the_first_ledger(call: Call) -> None:
    claims = ClaimType()
    assert claims.create(call, inputs={"ledgerId": "one"}).id == "one"
    assert not claims.check(call, olds={"ledgerId": "one"}, news={"ledgerId": "one"}).failures
    with pytest.raises(LedgerMismatch, match="belongs to the ledger one"):
        claims.check(call, olds={"ledgerId": "one"}, news={"ledgerId": "two"})
