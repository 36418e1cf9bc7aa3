"""What the nodes have promised: always what their instances add up to, however they came to be what they are."""

from __future__ import annotations

import tempfile
from pathlib import Path

import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from provisioner.ledger.instances import Update
from provisioner.ledger.records import NodeStatus
from provisioner.states import Wanted
from stacks.spec import NodeSpec
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


def test_a_placement_sees_what_nodes_have_and_have_promised(ledger_location: Path | SecretStr) -> None:
    ledger = empty_ledger(ledger_location)
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
