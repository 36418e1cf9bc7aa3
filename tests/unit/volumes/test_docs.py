"""What docs/cloud-volumes.md tells people to write is what the service takes, and needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from provisioner.clusterfile import parse_cluster
from provisioner.volumes import ec2

PAGE = (Path(__file__).parents[3] / "docs" / "cloud-volumes.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_its_nodes_are_taken() -> None:
    classes = []
    for block in blocks("yaml"):
        config = "".join(f"  {line}\n" for line in block.splitlines())
        classes.append([node.volume for node in parse_cluster(f"config:\n{config}", cluster="x", file="docs").nodes])
    assert classes == [["ebs"], ["ebs", "ebs", "docker"]]


def test_its_policy_allows_just_what_is_called() -> None:
    (policy,) = blocks("json")
    allowed = [statement["Action"] for statement in json.loads(policy)["Statement"]]
    actions = {action for each in allowed for action in ([each] if isinstance(each, str) else each)}
    source = Path(ec2.__file__).read_text()
    calls = re.findall(r"_client\.(\w+)\(", source) + re.findall(r'get_paginator\("(\w+)"\)', source)
    called = {"ec2:" + call.title().replace("_", "") for call in calls if call != "get_paginator"}
    assert actions == called
