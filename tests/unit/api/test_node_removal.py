"""`machineuse node remove` where file and ledger disagree; its everyday is in the acceptance tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from api import node_cli
from provisioner.errors import Conflict, NotFound, UnknownNode
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.records import NodeStatus
from provisioner.settings import Settings
from provisioner.states import Status, Wanted
from stacks.spec import NodeSpec
from tests.support.records import make_record


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a cluster with an instance on a node that the file does not name."""
    monkeypatch.setenv("MACHINEUSE_PROJECT_DIR", str(tmp_path))
    monkeypatch.setenv("MACHINEUSE_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "Pulumi.local.yaml").write_text(json.dumps({"config": {"cluster:nodes": [{"id": "a"}]}}))
    (tmp_path / "data").mkdir()
    ledger = Ledger.create(Settings().ledger_location)
    ledger.nodes.sync([NodeSpec(id="a"), NodeSpec(id="b", host="unix:///b")])
    ledger.nodes.observe("b", values={"status": NodeStatus.OFFLINE})
    ledger.instances.create(lambda _: (make_record(id="mu-b", node_id="b"), "test"))
    ledger.close()
    return tmp_path


def remove(*arguments: str) -> Result:
    return CliRunner().invoke(node_cli.app, ["remove", *arguments])


def test_what_is_on_a_node_that_left_the_file_can_be_given_up(project: Path) -> None:
    before = (project / "Pulumi.local.yaml").read_text()
    refused = remove("b")
    assert isinstance(refused.exception, Conflict)
    assert "remove b --force" in refused.exception.explain()

    done = remove("b", "--force", "--yes")
    assert done.exit_code == 0, done.output
    assert "mu-b is LOST" in done.output
    assert "It does not answer: what it has of this cluster (copies of profiles too) stays on its disk." in done.output
    ledger = Ledger.open(Settings().ledger_location)
    assert ledger.instances.get("mu-b").wanted is Wanted.ABSENT
    ledger.close()
    assert (project / "Pulumi.local.yaml").read_text() == before


def test_what_stays_on_a_node_is_said_of_one_that_does_not_answer_only(project: Path) -> None:
    (project / "Pulumi.local.yaml").write_text(
        json.dumps({"config": {"cluster:nodes": [{"id": "a"}, {"id": "b", "host": "unix:///b", "address": "b"}]}})
    )
    ledger = Ledger.open(Settings().ledger_location)
    ledger.instances.change("mu-b", lambda _, __: Update(values={"body": False, "status": Status.DORMANT}))
    ledger.nodes.observe("b", values={"status": NodeStatus.ONLINE})
    ledger.close()
    done = remove("b")
    assert done.exit_code == 0, done.output
    assert "1 dormant instance(s) slept there; they are revived elsewhere, from the snapshot store." in done.output
    assert "does not answer" not in done.output


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("arguments", [("c",), ("c", "--force", "--yes")])
def test_what_never_was_a_node_is_refused(arguments: tuple[str, ...]) -> None:
    assert isinstance(remove(*arguments).exception, NotFound | UnknownNode)
