"""What an instance's resources are given."""

from __future__ import annotations

import pytest

from stacks.instance import volume_arguments
from stacks.spec import ClusterSpec, InstanceSpec


@pytest.mark.parametrize(("quota_gib", "size"), [(10, "10240m"), (0.5, "512m"), (0.0001, "1m")])
def test_a_limit_of_the_home_is_never_no_limit(quota_gib: float, size: str) -> None:
    spec = InstanceSpec(id="mu-a", node_id="a", image="i", memory_mib=512, cpus=1, disk_quota_gib=quota_gib)
    arguments = volume_arguments(spec, cluster=ClusterSpec(name="c"), ledger_id="l")
    assert arguments["driver_opts"] == {"size": size}
