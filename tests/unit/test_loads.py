"""What the nodes have promised: always what their instances add up to, however they came to be what they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from provisioner.errors import InvalidRequest
from provisioner.ledger import Ledger
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.loads import NodeState
from provisioner.ledger.records import InstanceRecord, NodeStatus
from provisioner.states import Wanted
from stacks.spec import Availability, NodeSpec
from tests.support.records import make_record, sum_up
from tests.support.world import empty_ledger

ids = st.sampled_from(["mu-a", "mu-b", "mu-c"])
sizes = st.fixed_dictionaries(
    {},
    optional={
        "node_id": st.sampled_from(["a", "b"]),
        "memory_gb": st.floats(0.125, 4),
        "cpu_cores": st.integers(1, 4),
        "disk_gb": st.floats(0.01, 4),
        "volume": st.sampled_from(["docker", "ebs"]),
        "wanted": st.sampled_from(list(Wanted)),
        "body": st.booleans(),
        "attempts": st.integers(0, 3),
    },
)
steps = st.tuples(st.sampled_from(["put", "put", "put", "remove", "fail"]), ids, sizes)


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(steps, max_size=25))
def test_sums_are_kept_in_step_with_the_instances(steps: list[tuple[str, str, dict[str, object]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        ledger = empty_ledger(Path(directory))
        for kind, instance_id, values in steps:
            if ledger.instances.find(instance_id) is None:
                record = make_record(id=instance_id, debug_port=None, stream_port=None, **values)
                ledger.instances.create(lambda _, record=record: (record, "made"))
            elif kind == "fail":
                twice = Update(values=values, take_ports=(1, 1))
                try:
                    ledger.instances.change(instance_id, lambda *_, twice=twice: twice)
                except sa.exc.IntegrityError:
                    pass
                else:
                    raise AssertionError("a port was given twice")
            else:
                update = Update(values=values, remove=kind == "remove")
                ledger.instances.change_many([instance_id], lambda *_, update=update: update)
            assert ledger.instances.loads() == sum_up(ledger.instances.all())
        ledger.close()


def test_a_placement_sees_what_nodes_have_and_have_promised(tmp_path: Path) -> None:
    ledger = empty_ledger(tmp_path)
    ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b", labels={"zone": "ü"})])
    ledger.nodes.observe("a", values={"status": NodeStatus.ONLINE, "cpu_cores": 4, "cpu_percent": 7.5})
    ledger.instances.create(lambda _: (make_record(node_id="a", memory_gb=0.0001, disk_gb=2), "made"))
    with ledger.instances.reader() as loads:
        first, second = sorted(loads.nodes())
        assert loads.ports("a") == {21000, 21001}
        assert loads.ports("b") == frozenset()
    assert (first.id, first.online, first.cpu_cores, first.cpu_percent) == ("a", True, 4, 7.5)
    assert (first.instances, first.promised_memory_mib, first.promised_cpu_cores, first.promised_disk_mib) == (
        *(1, 1, 1, 2048),
    )
    assert (second.online, second.labels, second.instances) == (False, {"zone": "ü"}, 0)
    assert ledger.nodes.online() == {"a"}
    ledger.close()


nodes = st.sampled_from(["a", "b", "c"])
moments = st.tuples(
    st.sampled_from(["put", "put", "remove", "beat", "file"]),
    ids,
    st.builds(
        lambda node_id, others, closed, busy: (node_id, {node_id, *others}, closed, busy),
        nodes,
        st.sets(nodes),
        st.sampled_from(list(Availability)),
        st.floats(0, 100),
    ),
    st.sets(st.sampled_from([0, 1])),
)


@settings(deadline=None, max_examples=60)
@given(moments=st.lists(moments, max_size=25))
def test_what_is_known_of_nodes_is_what_there_is_whoever_changed_it(moments: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        services = empty_ledger(Path(directory)), Ledger.open(Path(directory) / "ledger.db")
        for number, (kind, instance_id, (node_id, named, closed, busy), readers) in enumerate(moments):
            ledger = services[number % 2]
            known = ledger.instances.find(instance_id)
            if kind == "file":
                ledger.nodes.sync([NodeSpec(id=name, availability=closed) for name in sorted(named)])
            elif kind == "beat":
                ledger.nodes.observe(node_id, values={"status": NodeStatus.ONLINE, "cpu_percent": busy})
            elif known is not None:
                update = Update(values={"node_id": node_id}, remove=kind == "remove")
                ledger.instances.change(instance_id, lambda *_, update=update: update)
            else:
                record = make_record(id=instance_id, node_id=node_id, debug_port=None, stream_port=None)
                ledger.instances.create(lambda _, record=record: (record, "made"))
            for reader in readers:
                with services[reader].instances.reader() as loads:
                    assert sorted(map(in_short, loads.nodes())) == what_there_is(ledger)
        for ledger in services:
            with ledger.instances.reader() as loads:
                assert sorted(map(in_short, loads.nodes())) == what_there_is(ledger)
            ledger.close()


def in_short(state: NodeState) -> tuple[Any, ...]:
    said = (state.id, bool(state.online), state.availability, state.cpu_percent)
    return *said, state.instances, state.promised_cpu_cores


def what_there_is(ledger: Ledger) -> list[tuple[Any, ...]]:
    promised = {load.node_id: (load.instances, load.cpu_cores) for load in ledger.instances.loads()}
    return [
        (
            *(node.id, node.status is NodeStatus.ONLINE, node.availability.value, node.cpu_percent),
            *promised.get(node.id, (0, 0)),
        )
        for node in ledger.nodes.list()
    ]


def test_a_reader_that_began_before_sees_what_there_was_and_spoils_nothing(ledger_location: Path | SecretStr) -> None:
    ledger = empty_ledger(ledger_location)
    ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b")])

    def busy(loads: LoadReader) -> dict[str, float | None]:
        return {state.id: state.cpu_percent for state in loads.nodes()}

    with ledger.instances.reader() as earlier:
        earlier.ports("a")  # its state is that of its first question
        ledger.nodes.observe("a", values={"cpu_percent": 50.0})
        with ledger.instances.reader() as later:
            assert busy(later) == {"a": 50, "b": None}
        assert busy(earlier) == {"a": None, "b": None}
        with ledger.instances.reader() as later:
            assert busy(later) == {"a": 50, "b": None}
    ledger.close()


def test_what_a_transaction_took_back_does_not_stay_known(ledger_location: Path | SecretStr) -> None:
    ledger = empty_ledger(ledger_location)
    ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b")])
    for name in "ab":
        record = make_record(id=f"mu-{name}", node_id="a", debug_port=None, stream_port=None)
        ledger.instances.create(lambda _, record=record: (record, "made"))

    def decide(record: InstanceRecord, loads: LoadReader) -> Update:
        first, _ = sorted(loads.nodes())
        if record.id == "mu-b":
            assert first.promised_cpu_cores == 9
            raise InvalidRequest("no")
        return Update(values={"cpu_cores": 8})

    with pytest.raises(InvalidRequest):
        ledger.instances.change_many(["mu-a", "mu-b"], decide)
    for percent in (5.0, 6.0):  # these get the numbers that were taken back
        ledger.nodes.observe("b", values={"cpu_percent": percent})
    with ledger.instances.reader() as loads:
        assert [state.promised_cpu_cores for state in sorted(loads.nodes())] == [2, 0]
    ledger.close()
