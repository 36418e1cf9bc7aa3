"""What a running service makes of an edited cluster file; the ledger is real, the engine only listens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import APPLIED, Cluster, fingerprint
from provisioner.clusterfile import path_of, read_cluster
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.engine import UpdateResult
from provisioner.errors import Conflict, EngineError
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord, NodeStatus, SnapshotRecord, SnapshotState
from provisioner.reload import Reload
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import Availability
from tests.support.records import make_record
from tests.support.world import empty_ledger

A = "config:\n  cluster:nodes:\n    - {id: a, host: 'unix:///nobody/a'}\n"
AB = A + "    - {id: b, host: 'unix:///nobody/b', address: b}\n"
NETWORK_B = "urn:pulumi:x::machineuse::docker:index/network:Network::b-network"
PROVIDER_B = "urn:pulumi:x::machineuse::pulumi:providers:docker::node-b"


class ListeningEngine:
    """Does what it is told at once, unless it is told to fail."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, ...]] = []
        self.excludes: tuple[str, ...] = ()
        self.fails: dict[str, str] | EngineError = {}

    def ensure_stack(self) -> bool:
        return False

    def update(
        self, program: Any, *, targets: Sequence[str] = (), excludes: Sequence[str] = (), refresh: bool = False
    ) -> UpdateResult:
        del program, refresh
        self.updates.append(tuple(targets))
        self.excludes = tuple(excludes)
        if isinstance(self.fails, EngineError):
            raise self.fails
        return UpdateResult(outputs={urn: {} for urn in targets if urn not in self.fails}, errors=self.fails)


class Cell:
    """One cluster whose file is edited."""

    def __init__(self, directory: Path, *, text: str) -> None:
        self.path = path_of(directory, cluster="x")
        self.path.write_text(text)
        self.ledger: Ledger = empty_ledger(directory)
        self.cluster = Cluster(read_cluster(directory, cluster="x"))
        self.engine = ListeningEngine()
        self.hosts = DockerHosts()
        settings = Settings(project_dir=directory, cluster="x")
        self.reload = Reload(self.ledger, cluster=self.cluster, settings=settings, hosts=self.hosts, changes=Changes())
        self.reload.sync()
        self.ledger.write_fact(APPLIED, fingerprint(self.cluster.spec))
        self.reload.apply_all(self.engine)  # type: ignore[arg-type]
        assert not self.engine.updates

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self.look()

    def look(self, times: int = 2) -> None:
        """Look at the file, taking no notice of how long a retry should wait."""
        for _ in range(times):
            self.reload._next_try.forget()
            self.reload._next_update.forget()
            self.reload.step()

    def nodes(self) -> tuple[list[str], list[str]]:
        """Return the ids of the nodes that the cluster has, and that the ledger has."""
        return [node.id for node in self.cluster.nodes], [node.id for node in self.ledger.nodes.list()]

    def events(self, kind: str) -> list[str]:
        return [event.message for event in self.ledger.events.list() if event.kind == kind]

    def add(self, **fields: Any) -> None:
        self.ledger.instances.create(lambda _: (make_record(id="mu-b", node_id="b", **fields), "test"))


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    cell = Cell(tmp_path, text=A)
    yield cell
    cell.ledger.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cell]:
    cell = Cell(tmp_path, text=AB)
    yield cell
    cell.ledger.close()


def test_a_new_node_joins_the_stack_before_the_cluster(cell: Cell) -> None:
    cell.write(AB)
    assert cell.nodes() == (["a", "b"], ["a", "b"])
    assert cell.engine.updates == [(PROVIDER_B, NETWORK_B)]
    assert cell.events("node_added") == ["node b was added: unix:///nobody/b"]
    assert cell.ledger.fact(APPLIED) == fingerprint(cell.cluster.spec)


def test_a_new_node_whose_network_can_not_be_made_yet_is_a_node_all_the_same(cell: Cell) -> None:
    cell.engine.fails = {NETWORK_B: "it does not answer [node_unreachable]"}
    cell.write(AB)
    assert cell.nodes() == (["a", "b"], ["a", "b"])


def test_a_new_node_that_the_stack_does_not_take_is_tried_again(cell: Cell) -> None:
    cell.engine.fails = EngineError("The Pulumi engine failed.")
    cell.write(AB)
    cell.look(3)
    assert cell.nodes() == (["a"], ["a"])
    assert len(cell.events("cluster_file_refused")) == 1
    cell.engine.fails = {}
    cell.look()
    assert cell.nodes() == (["a", "b"], ["a", "b"])


def test_what_changes_no_resource_costs_no_update(cell: Cell) -> None:
    cell.write(A.replace("}", ", availability: cordoned, max_instances: 3, labels: {zone: z}}"))
    assert not cell.engine.updates
    assert cell.events("node_changed") == [
        "node a: max_instances is 3, availability is cordoned, labels is zone=z",
    ]


def test_another_address_to_bind_to_is_a_full_update(cell: Cell) -> None:
    cell.write(A.replace("}", ", bind_ip: 127.0.0.2}"))
    assert cell.engine.updates == [()]


def test_a_full_update_leaves_out_what_would_wait_for_a_silent_node(cell: Cell) -> None:
    cell.write(AB)
    cell.ledger.nodes.observe("a", values={"status": NodeStatus.ONLINE})
    cell.write(AB.replace("}", ", bind_ip: 127.0.0.2}"))
    assert cell.engine.updates[-1] == ()
    assert [urn.rsplit("::", 1)[1] for urn in cell.engine.excludes] == ["b-network", "b-image-**"]


def test_a_file_is_not_believed_while_it_is_written(cell: Cell) -> None:
    for text in ("", A[:40], A, AB[:60]):
        cell.path.write_text(text)
        cell.look(1)
    assert cell.nodes() == (["a"], ["a"])
    assert not cell.events("cluster_file_refused")
    cell.write(AB)
    assert cell.nodes() == (["a", "b"], ["a", "b"])


def test_a_mistake_is_told_of_once_and_changes_nothing(cell: Cell) -> None:
    cell.write(AB.replace("host", "hots"))
    cell.look(5)
    assert cell.nodes() == (["a"], ["a"])
    (said,) = cell.events("cluster_file_refused")
    assert "line 3: node 'a': 'hots' is unknown" in said
    cell.path.unlink()
    cell.look()
    assert "can't be read" in cell.events("cluster_file_refused")[-1]
    cell.write(A)
    assert not cell.engine.updates


def test_ports_that_two_nodes_have_at_one_address_are_a_mistake_that_a_service_goes_on_with(two: Cell) -> None:
    two.write(AB.replace("address: b", "address: localhost"))
    two.look(3)
    (said,) = two.events("cluster_file_refused")
    assert "line 4: node 'b': its ports 21000-24999 overlap those of node 'a', 21000-24999" in said
    assert two.cluster.spec.node("b").address == "b"  # type: ignore[union-attr]
    two.write(A)
    assert two.nodes() == (["a"], ["a"])


def test_a_removed_node_leaves_the_stack_and_is_forgotten(two: Cell) -> None:
    two.write(A)
    assert two.nodes() == (["a"], ["a"])
    images = "urn:pulumi:x::machineuse::machineuse:index:NodeImage::b-image-**"
    assert two.engine.updates == [(f"{PROVIDER_B[:-9]}*::node-b", f"{NETWORK_B[:-12]}*::b-network", images)]
    assert two.events("node_removed") == ["node b was removed"]


def test_a_removed_node_that_the_stack_does_not_let_go_yet_is_tried_again(two: Cell) -> None:
    two.engine.fails = {NETWORK_B: "it has active endpoints [docker_error]"}
    two.write(A)
    two.look()
    assert two.nodes() == (["a"], ["a"])
    assert two.ledger.fact(APPLIED) != fingerprint(two.cluster.spec)
    two.engine.fails = {}
    two.look(3)
    assert two.ledger.fact(APPLIED) == fingerprint(two.cluster.spec)
    assert len(two.engine.updates) == 4


def test_the_engine_of_a_removed_node_is_let_go_of_with_the_last_update_that_needs_it(two: Cell) -> None:
    stays, goes = two.cluster.nodes
    kept, gone = two.hosts.of(stays), two.hosts.of(goes)
    two.engine.fails = {NETWORK_B: "it has active endpoints [docker_error]"}
    two.write(A)
    assert two.hosts.of(goes) is gone
    two.engine.fails = {}
    two.look()
    assert two.hosts.of(goes) is not gone
    assert two.hosts.of(stays) is kept


def test_a_node_that_is_reached_otherwise_is_not_reached_as_before_too(two: Cell) -> None:
    _, before = two.cluster.nodes
    host = two.hosts.of(before)
    two.write(AB.replace("nobody/b", "nobody/c"))
    assert two.nodes() == (["a", "b"], ["a", "b"])
    assert two.hosts.of(before) is not host


def test_a_node_with_a_running_instance_is_not_taken_away(two: Cell) -> None:
    two.add()
    two.write(A)
    two.look(3)
    assert two.nodes() == (["a", "b"], ["a", "b"])
    (said,) = two.events("cluster_file_refused")
    assert "does not name node 'b' any more, but instance mu-b is there" in said
    two.write(AB)
    assert not two.engine.updates


def test_a_node_goes_by_itself_once_the_last_instance_has_left(two: Cell) -> None:
    two.add()
    two.ledger.instances.change("mu-b", lambda r, _: lifecycle.wish_abandoned(r))
    two.write(A)
    assert two.nodes() == (["a", "b"], ["a", "b"])
    assert not two.events("cluster_file_refused")
    two.ledger.instances.change("mu-b", lambda r, _: lifecycle.note_gone(r))
    two.look()
    assert two.nodes() == (["a"], ["a"])


def test_snapshots_of_who_sleeps_there_forget_the_node(two: Cell) -> None:
    two.add(status=Status.DORMANT, wanted=Wanted.DORMANT, body=False, snapshot_generation=2, generation=2)
    two.ledger.instances.change("mu-b", lambda _, __: Update(put_snapshots=(verified(2),)))
    two.write(A)
    assert two.nodes() == (["a"], ["a"])
    assert two.engine.updates[0][-1].endswith("machineuse:index:Snapshot::mu-b-snapshot-2")


def test_nothing_new_comes_to_a_node_that_is_about_to_go(two: Cell) -> None:
    two.add()
    two.ledger.instances.change("mu-b", lambda r, _: lifecycle.wish_absent(r, force=True))
    two.write(A)
    assert two.nodes() == (["a", "b"], ["a", "b"])
    closed = two.cluster.spec.node("b")
    assert closed is not None
    assert closed.availability is two.ledger.nodes.get("b").availability is Availability.CORDONED
    two.write(AB)  # it is put back
    assert two.cluster.spec.node("b").availability is Availability.ACTIVE  # type: ignore[union-attr]
    two.write(A)
    two.ledger.instances.change("mu-b", lambda r, _: lifecycle.note_gone(r))
    two.look()
    assert two.nodes() == (["a"], ["a"])


def test_another_host_for_a_node_with_instances_needs_an_answer(two: Cell) -> None:
    two.add()
    two.write(AB.replace("nobody/b", "nobody/c"))
    (said,) = two.events("cluster_file_refused")
    assert "whether that is the same engine can't be told" in said
    assert two.cluster.spec.node("b").host == "unix:///nobody/b"  # type: ignore[union-attr]


def test_other_ways_through_ssh_may_lead_to_another_engine_too(tmp_path: Path) -> None:
    behind_a = A + "    - {id: b, host: 'ssh://nobody@127.0.0.1:1', address: b, ssh_opts: [-oBindAddress=127.0.0.1]}\n"
    cell = Cell(tmp_path, text=behind_a)
    cell.add()
    cell.write(behind_a.replace("0.0.1]", "0.0.2]"))
    (said,) = cell.events("cluster_file_refused")
    assert "Node 'b' can't become ssh://nobody@127.0.0.1:1 now: instance mu-b is there" in said
    asked = {ssh_opts for _, _, ssh_opts in cell.hosts._hosts}
    assert ("-oBindAddress=127.0.0.2",) not in asked, "an ssh runs on, to a machine that is no node"
    cell.ledger.close()


def test_a_node_with_homes_on_cloud_volumes_stays_a_cloud_machine(tmp_path: Path) -> None:
    aws = AB.replace("address: b", "address: b, volume: ebs, cloud: {instance_id: i-b, zone: us-east-1a}")
    cell = Cell(tmp_path, text=aws)
    cell.add(volume="ebs")
    cell.write(AB)
    (said,) = cell.events("cluster_file_refused")
    assert "Node 'b' has no `cloud` any more, but instance mu-b is on cloud volumes there" in said
    assert cell.cluster.spec.nodes[1].cloud is not None
    cell.write(aws.replace("volume: ebs, ", ""))  # what comes from now on is on its disk
    assert cell.cluster.spec.nodes[1].volume == "docker"
    cell.ledger.close()


def test_a_check_of_many_nodes_goes_through_the_instances_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    class Records(list[InstanceRecord]):
        def __iter__(self) -> Iterator[InstanceRecord]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    nodes = [f"    - {{id: n{number}, host: 'unix:///nobody/{number}', address: h{number}}}\n" for number in range(9)]
    cell = Cell(tmp_path, text="config:\n  cluster:nodes:\n" + "".join(nodes))
    records = Records([make_record(node_id="n0")])
    monkeypatch.setattr(cell.ledger.instances, "all", lambda: records)
    cell.reload.sync()
    assert passes == 1
    cell.ledger.close()


def test_a_service_does_not_start_on_another_engine_either(two: Cell) -> None:
    two.add()
    two.path.write_text(AB.replace("nobody/b", "nobody/c"))
    two.cluster.replace(read_cluster(two.path.parent, cluster="x"))
    with pytest.raises(Conflict, match="Node 'b' can't become"):
        two.reload.sync()


def test_a_service_does_not_start_without_a_node_that_has_an_instance(two: Cell) -> None:
    two.add()
    two.path.write_text(A)
    two.cluster.replace(read_cluster(two.path.parent, cluster="x"))
    with pytest.raises(Conflict, match="does not name node 'b' any more, but instance mu-b is there"):
        two.reload.sync()
    two.ledger.instances.change("mu-b", lambda r, _: lifecycle.wish_abandoned(r))
    two.reload.sync()
    assert two.nodes() == (["a"], ["a", "b"])
    two.look()
    two.ledger.instances.change("mu-b", lambda r, _: lifecycle.note_gone(r))
    two.look()
    assert two.nodes() == (["a"], ["a"])


def test_the_ledger_loses_no_node_that_has_an_instance(two: Cell) -> None:
    two.add()
    with pytest.raises(Conflict, match="Node 'b' has instances"):
        two.ledger.nodes.sync(two.cluster.nodes[:1], whole=True)
    two.ledger.nodes.sync(two.cluster.nodes[:1])
    assert two.nodes()[1] == ["a", "b"]


# ---- a node that is gone for good


def verified(generation: int) -> SnapshotRecord:
    return SnapshotRecord(
        instance_id="mu-b",
        generation=generation,
        node_id="b",
        state=SnapshotState.VERIFIED,
        bytes=1,
        created_at=0.0,
    )


@pytest.mark.parametrize("status", list(Status))
def test_an_instance_with_a_snapshot_is_given_up_to_it(two: Cell, status: Status) -> None:
    two.add(status=status)
    two.ledger.instances.change("mu-b", lambda _, __: Update(put_snapshots=(verified(0), verified(1))))
    record = two.ledger.instances.change("mu-b", lambda r, _: lifecycle.wish_abandoned(r))
    assert record is not None
    assert (record.status, record.wanted, record.snapshot_generation) == (Status.DORMANT, Wanted.DORMANT, 1)
    assert record.sleeps_safely
    assert record.force
    record = two.ledger.instances.change("mu-b", lambda r, _: lifecycle.note_dormant(r, generation=r.generation))
    assert record is not None
    assert not record.force
    assert not record.body


def test_an_instance_without_a_snapshot_is_lost(two: Cell) -> None:
    two.add()
    record = two.ledger.instances.change("mu-b", lambda r, _: lifecycle.wish_abandoned(r))
    assert record is not None
    assert (record.wanted, record.force) == (Wanted.ABSENT, True)
