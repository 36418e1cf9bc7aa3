"""`machineuse node` without a service: what it shows of nodes that can't be reached, and what it refuses to add."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.cli import main
from provisioner.clusterfile import path_of
from provisioner.ledger import Ledger
from provisioner.ledger.records import NodeStatus
from provisioner.settings import Settings
from stacks.spec import NodeSpec
from tests.support.ports import free_port
from tests.support.records import make_record
from tests.support.world import empty_ledger

FAR = NodeSpec(id="b", host="tcp://[fd00::3]:2376", labels={"note": "[/bold]"})
WHY = "The Docker engine at tcp://[fd00::3]:2376 does not answer: " + "it refuses our client certificate. " * 5
Run = Callable[..., tuple[object, list[str], list[str]]]


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """Give the ledger of a cluster of two nodes, one of which did not answer."""
    monkeypatch.setenv("MACHINEUSE_PROJECT_DIR", str(tmp_path))
    monkeypatch.setenv("MACHINEUSE_CLUSTER", "x")
    nodes = [NodeSpec(id="a"), FAR]
    said = [f"    - {node.model_dump_json(exclude_defaults=True)}\n" for node in nodes]
    path_of(tmp_path, cluster="x").write_text("config:\n  cluster:nodes:\n" + "".join(said))
    location = Settings().ledger_location
    assert isinstance(location, Path)
    ledger = empty_ledger(location)
    ledger.nodes.sync(nodes)
    ledger.nodes.observe("b", values={"status": NodeStatus.OFFLINE, "error": WHY, "labels": FAR.labels})
    yield ledger
    ledger.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give a function that runs the command: exit code, lines of output, lines of errors."""

    def run(*arguments: str) -> tuple[object, list[str], list[str]]:
        command = () if arguments[0] == "instances" else ("node",)
        monkeypatch.setattr(sys, "argv", ["machineuse", *command, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out.splitlines(), err.splitlines()

    return run


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_node_that_can_not_be_reached_says_why_in_one_line(
    run: Run, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run("list")
    assert code == 0
    assert f"b: {WHY}" in out
    (row,) = [line for line in out if line.startswith("b ")]
    assert row.split() == ["b", FAR.host, "offline", "active", "none", "note=[/bold]"]


def test_instances_show_that_their_node_is_offline_and_that_nobody_looks(
    run: Run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ledger.nodes.observe("a", values={"status": NodeStatus.ONLINE})
    for record in (
        make_record(id="mu-near", node_id="a"),
        make_record(id="mu-far", node_id="b"),
        make_record(id="mu-asleep", node_id="b", body=False, debug_port=None, stream_port=None),
    ):
        ledger.instances.create(lambda _, record=record: (record, "test"))
    code, out, _ = run("instances")
    assert code == 0
    nodes = {words[0]: words[2:4] for words in map(str.split, out) if words[0].startswith("mu-")}
    assert nodes == {"mu-near": ["a", "21000"], "mu-far": ["b", "(offline)"], "mu-asleep": ["b", "ubuntu:22.04"]}
    assert "No service runs: the status is as it was last seen." in out
    ledger.nodes.observe("a", values={"last_heartbeat": time.time()})
    assert not any(line.startswith("No service runs") for line in run("instances")[1])


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize("command", [("list",), ("cordon", "a"), ("drain", "a"), ("remove", "a")])
def test_a_look_or_a_typing_error_begins_no_cluster(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    code, out, err = run(*command, "--cluster", "y")
    assert (code, out) == (1, [])
    assert err[0].startswith("machineuse: There is no Pulumi.y.yaml, so there is no cluster 'y' yet.")
    assert not path_of(tmp_path, cluster="y").exists()


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "unix:///nobody.sock"), "Node 'c' is not added: The Docker engine at unix:///nobody.sock"),
        (("--host", "unix:///nobody.sock"), "there is no such socket."),
        (("--host", f"tcp://127.0.0.1:{free_port()}"), "nothing listens there."),
        (("--host", "tcp://127.0.0.1:1", "--cert-path", "nowhere"), "/nowhere/ca.pem can't be read"),
        (("--host", "tcp://127.0.0.1:99999"), "node 'c': host: it should be "),
        (("--host", "tcp://[::1"), "node 'c': host: it should be "),
        (("--host", "unix:///var/run/docker.sock"), "node 'c': node 'a' has the host unix:///var/run/docker.sock"),
        (
            ("--host", "ssh://h", "--bind-ip", "::", "--address", "fd00::3"),
            "overlap those of node 'b', 21000-",
        ),
        (
            ("--host", "unix:///x", "--address", "localhost", "--ports", "24999-30000"),
            "overlap those of node 'a', 21000-24999, at",
        ),
    ],
)
def test_what_can_not_be_added_is_said_in_one_line_with_the_node(
    run: Run, arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = path_of(tmp_path, cluster="x").read_bytes()
    more = () if "--ports" in arguments or "fd00::3" in arguments else ("--ports", "30000-30999")
    code, _, err = run("add", "c", *arguments, *more)
    assert code == 1
    (line,) = err
    assert line.startswith("machineuse: ")
    assert "ode 'c'" in line
    assert said in line
    assert path_of(tmp_path, cluster="x").read_bytes() == before


@pytest.mark.usefixtures("ledger")
def test_certificates_are_found_from_wherever_the_command_was_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    certificates = ("--cert-path", "certs/c", "--ports", "30000-30999", "--unchecked")
    code, out, err = run("add", "c", "--host", "tcp://127.0.0.1:2376", *certificates)
    assert (code, err) == (0, [])
    assert "Node c is added." in out
    assert f"cert_path: {elsewhere}/certs/c" in path_of(tmp_path, cluster="x").read_text()
