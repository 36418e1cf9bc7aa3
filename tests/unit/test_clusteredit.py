"""Editing a cluster's file: what an edit is not about stays as its writer left it, to the byte."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from provisioner.clusteredit import edit_cluster
from provisioner.clusterfile import load, parse_cluster, path_of, read_cluster
from provisioner.clustertext import add_node, remove_node, set_availability
from provisioner.errors import Conflict, NotFound, SettingsError
from stacks.spec import Availability

GOLDEN = """\
# Reviewed by two people.
encryptionsalt: v1:abc=   # Pulumi's own

config:
  aws:region: eu-west-1
  cluster:nodes:
  # the first one
  - id: a         # in the cellar
    host: unix:///var/run/docker.sock
    ports: { first: 21000,   last: 22000 }
    labels:
      zone: "one"   # quoted
    # a's last word

  # the second one
  -   host: "tcp://10.0.0.2:2376"
      id: 'b'
      cert_path: |-
        /etc/certificates
      # b's last word
  # images, after the nodes

  cluster:images:
    ubuntu:22.04: machineuse/browser:latest
# the end
"""
BLOCK_B = """\
  -   host: "tcp://10.0.0.2:2376"
      id: 'b'
      cert_path: |-
        /etc/certificates
      # b's last word
"""
BLOCK_C = """\
  -   id: c
      host: ssh://root@10.0.0.3
      ports: {first: 30000, last: 30999}
      labels:
        zone: two
"""
C: dict[str, Any] = {
    "id": "c",
    "host": "ssh://root@10.0.0.3",
    "ports": {"first": 30000, "last": 30999},
    "labels": {"zone": "two"},
}


def test_an_added_node_is_all_that_changes() -> None:
    assert add_node(GOLDEN, C) == GOLDEN.replace(BLOCK_B, BLOCK_B + BLOCK_C)


def test_a_removed_node_takes_its_own_lines_along_and_no_others() -> None:
    assert remove_node(GOLDEN, "b") == GOLDEN.replace(BLOCK_B, "")
    rest = remove_node(GOLDEN, "a")
    assert "# the first one" in rest
    assert "cellar" not in rest
    assert "a's last word" not in rest
    assert parse_cluster(rest, cluster="x", file="x").nodes[0].id == "b"


def test_availability_is_one_line() -> None:
    drained = set_availability(GOLDEN, "a", Availability.DRAINING)
    assert drained == GOLDEN.replace('"one"   # quoted\n', '"one"   # quoted\n    availability: draining\n')
    cordoned = set_availability(drained, "a", Availability.CORDONED)
    assert cordoned == drained.replace("draining", "cordoned")
    assert set_availability(cordoned, "a", Availability.ACTIVE) == GOLDEN
    behind_block_scalar = set_availability(GOLDEN, "b", Availability.CORDONED)
    assert "        /etc/certificates\n      availability: cordoned\n" in behind_block_scalar


def test_a_comment_beside_availability_stays_while_there_is_one() -> None:
    text = "config:\n  cluster:nodes:\n    - id: a\n      availability: 'cordoned' # its disk\n      max_instances: 3\n"
    drained = set_availability(text, "a", Availability.DRAINING)
    assert drained == text.replace("'cordoned'", "'draining'")
    assert set_availability(text, "a", Availability.ACTIVE) == (
        "config:\n  cluster:nodes:\n    - id: a\n      max_instances: 3\n"
    )


def test_availability_that_comes_first_can_go() -> None:
    text = "config:\n  cluster:nodes:\n    - availability: cordoned\n      id: a\n"
    assert set_availability(text, "a", Availability.ACTIVE) == "config:\n  cluster:nodes:\n    - id: a\n"


@pytest.mark.parametrize(
    "text", ["", "# nothing yet\n", "encryptionsalt: v1:x", "config:\n  aws:region: x\n", "config: {}\n"]
)
def test_a_file_that_names_no_nodes_keeps_its_default_one(text: str) -> None:
    spec = parse_cluster(add_node(text, C), cluster="x", file="x")
    assert [node.id for node in spec.nodes] == ["local", "c"]
    assert add_node(text, C).startswith(text[:20].rstrip("{}\n"))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_written_as_json_is_edited_too(indent: int | None) -> None:
    text = json.dumps(
        {"config": {"cluster:nodes": [{"id": "a", "ports": {"first": 2000, "last": 3000}}]}}, indent=indent
    )
    added = add_node(text, C)
    assert json.loads(added)["config"]["cluster:nodes"][1] == C
    drained = set_availability(added, "a", Availability.DRAINING)
    assert json.loads(drained)["config"]["cluster:nodes"][0]["availability"] == "draining"
    assert json.loads(remove_node(drained, "a"))["config"]["cluster:nodes"] == [C]
    assert remove_node(set_availability(drained, "a", Availability.ACTIVE), "c") == text


def test_what_an_edit_can_not_be_done_to() -> None:
    with pytest.raises(Conflict, match="a node 'a' already"):
        add_node(GOLDEN, {"id": "a", "host": "ssh://elsewhere"})
    with pytest.raises(NotFound, match="no node 'z' in the cluster's file; it has a, b"):
        remove_node(GOLDEN, "z")
    with pytest.raises(NotFound):
        set_availability(GOLDEN, "z", Availability.CORDONED)
    with pytest.raises(Conflict, match="last node"):
        remove_node(remove_node(GOLDEN, "b"), "a")


def test_a_file_that_can_not_be_edited_safely_is_left_to_its_writer() -> None:
    shared = "base: &base\n  - id: a\n  - id: b\nconfig:\n  cluster:nodes: *base\n"
    with pytest.raises(SettingsError, match="change safely"):
        remove_node(shared, "b")
    text = "x: &a {id: a}\nconfig:\n  cluster:nodes:\n    - *a\n    - id: b\n"
    for edit in (lambda: set_availability(text, "a", Availability.CORDONED), lambda: remove_node(text, "a")):
        with pytest.raises(SettingsError, match="change safely"):
            edit()


# ---- any file

SPACES = st.integers(min_value=1, max_value=3)
COMMENT = st.sampled_from(["", " # said", "   # two words"])
LINES = st.lists(st.sampled_from(["", "# a comment", "      # deeper", "  # less deep"]), max_size=3)
NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9]{0,4}", fullmatch=True), min_size=1, max_size=4, unique=True)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a cluster's file as a person might have written it, and the ids of its nodes."""
    ids = [f"n{name}" for name in draw(NAMES)]
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    dash, inner = draw(st.integers(2, 6)), draw(SPACES)
    lines = ["# top", *(["encryptionsalt: v1:x"] if draw(st.booleans()) else []), "config:", "  cluster:nodes:"]
    for number, node_id in enumerate(ids):
        lines += draw(LINES)
        if draw(st.booleans()):
            lines.append(f"{' ' * dash}- {{ id: {node_id}, host: 'ssh://h{number}' }}{draw(COMMENT)}")
            continue
        rest = " " * (dash + 1 + inner)
        lines.append(f"{' ' * dash}-{' ' * inner}id: {node_id}{draw(COMMENT)}")
        lines.append(f'{rest}host: "ssh://h{number}"{draw(COMMENT)}')
        if draw(st.booleans()):
            lines += [f"{rest}labels:{draw(COMMENT)}", f"{rest}  zone: 'z'{draw(COMMENT)}"]
        if draw(st.booleans()):
            lines.append(f"{rest}ports: {{ first: 21000,  last: 22000 }}{draw(COMMENT)}")
    lines += draw(LINES)
    if draw(st.booleans()):
        lines += ["  cluster:images:", "    a: b"]
    return newline.join(lines) + (newline if draw(st.booleans()) else ""), ids


@settings(max_examples=40, deadline=None)
@given(files())
def test_what_is_added_and_removed_again_leaves_the_same_bytes(drawn: tuple[str, list[str]]) -> None:
    text, ids = drawn
    added = add_node(text, C)
    assert [node["id"] for node in load(added, file="x")["config"]["cluster:nodes"]] == [*ids, "c"]
    assert remove_node(added, "c") == text


@settings(max_examples=40, deadline=None)
@given(files(), st.data())
def test_what_is_cordoned_and_uncordoned_again_leaves_the_same_bytes(
    drawn: tuple[str, list[str]], data: st.DataObject
) -> None:
    text, ids = drawn
    node_id = data.draw(st.sampled_from(ids))
    cordoned = set_availability(text, node_id, Availability.CORDONED)
    spec = parse_cluster(cordoned, cluster="x", file="x").node(node_id)
    assert spec is not None
    assert spec.availability is Availability.CORDONED
    assert set_availability(cordoned, node_id, Availability.ACTIVE) == text


@settings(max_examples=40, deadline=None)
@given(files(), st.data())
def test_a_removed_node_leaves_all_others(drawn: tuple[str, list[str]], data: st.DataObject) -> None:
    text, ids = drawn
    node_id = data.draw(st.sampled_from(ids))
    before = load(text, file="x")["config"]["cluster:nodes"]
    if len(ids) == 1:
        with pytest.raises(Conflict):
            remove_node(text, node_id)
        return
    after = load(remove_node(text, node_id), file="x")["config"]["cluster:nodes"]
    assert after == [node for node in before if node["id"] != node_id]


# ---- on disk


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "Pulumi.x.yaml").write_text(GOLDEN)
    return tmp_path


def test_mode_and_link_of_the_file_stay(project: Path) -> None:
    real = project / "kept" / "cluster.yaml"
    real.parent.mkdir()
    path_of(project, cluster="x").rename(real)
    real.chmod(0o640)
    path_of(project, cluster="x").symlink_to(real)
    spec = edit_cluster(project, cluster="x", change=lambda text: add_node(text, C))
    assert [node.id for node in spec.nodes] == ["a", "b", "c"]
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert path_of(project, cluster="x").is_symlink()
    assert {path.name for path in real.parent.iterdir()} == {"cluster.yaml"}


def test_an_edit_that_would_make_a_mistake_changes_nothing(project: Path) -> None:
    with pytest.raises(SettingsError, match=r"node 'C': id: .*'C'"):
        edit_cluster(project, cluster="x", change=lambda text: add_node(text, {"id": "C"}))
    assert path_of(project, cluster="x").read_text() == GOLDEN
    assert [path.name for path in project.iterdir()] == ["Pulumi.x.yaml"]


def test_an_edit_of_a_file_with_a_mistake_is_refused(project: Path) -> None:
    path_of(project, cluster="x").write_text(GOLDEN.replace("21000", "21"))
    with pytest.raises(SettingsError, match="line 10"):
        edit_cluster(project, cluster="x", change=lambda text: add_node(text, C))


def test_two_editors_at_once_lose_nothing(project: Path) -> None:
    names = [f"n{number}" for number in range(20)]

    def add(name: str) -> None:
        edit_cluster(project, cluster="x", change=lambda text: add_node(text, {"id": name, "host": f"ssh://{name}"}))

    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {node.id for node in read_cluster(project, cluster="x").nodes} == {"a", "b", *names}


def test_what_an_editor_without_a_lock_saved_meanwhile_is_kept(project: Path) -> None:
    path = path_of(project, cluster="x")
    texts: list[str] = []

    def change(text: str) -> str:
        if not texts:
            path.write_text(text.replace("eu-west-1", "eu-west-9"))
        texts.append(text)
        return add_node(text, C)

    edit_cluster(project, cluster="x", change=change)
    assert len(texts) == 2
    assert "eu-west-9" in path.read_text()
    assert "id: c" in path.read_text()


def test_the_first_file_can_be_edited_and_keeps_its_comments(tmp_path: Path) -> None:
    edit_cluster(tmp_path, cluster="y", change=lambda text: add_node(text, C))
    text = path_of(tmp_path, cluster="y").read_text()
    assert "# where clients reach the instances' ports" in text
    assert "ports: { first: 21000, last: 24999 }" in text
    assert YAML(typ="safe", pure=True).load(text)["config"]["cluster:nodes"][1] == C
