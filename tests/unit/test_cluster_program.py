"""What the program refuses to declare: an instance whose node can't have it any more."""

from __future__ import annotations

import asyncio

import pulumi
import pytest

from stacks.cluster import declare
from stacks.spec import CloudVolumeSpec, ClusterSpec, InstanceSpec, NodeSpec

SPEC = ClusterSpec(name="unit", nodes=(NodeSpec(id="local"),))


@pytest.mark.parametrize(
    ("node_id", "volume", "words"),
    [
        ("gone", None, "is on node 'gone', which the cluster's file does not name"),
        ("local", CloudVolumeSpec(size_gib=1, generation=1), "on node 'local', which has no `cloud`"),
    ],
)
def test_an_instance_whose_node_can_not_have_it_is_told_of_in_one_line(
    node_id: str, volume: CloudVolumeSpec | None, words: str
) -> None:
    instance = InstanceSpec(id="mu-1", node_id=node_id, image="i", memory_mib=512, cpus=1, cloud_volume=volume)
    with pytest.raises(pulumi.RunError, match=words) as raised:
        asyncio.run(declare(SPEC, ledger_id="l", instances=[instance], claim=False))
    assert "machineuse node drain" in str(raised.value)
    assert "\n" not in str(raised.value)
