"""Which changes above the image are kept."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from provisioner.snapshots import changes as changes_module
from provisioner.snapshots.changes import EPHEMERAL, MANAGED, RECORD_PATH, ChangesTar, Record, select_changes
from provisioner.snapshots.machine import Change, ChangeKind
from provisioner.snapshots.manifest import ImageIdentity
from tests.unit.snapshots.fakes import FakeMachine

IMAGE = ImageIdentity(reference="browser", id="sha256:original")
SKIP = (*EPHEMERAL, *MANAGED, "/home/machine")


def diff(text: str) -> list[Change]:
    kinds = {"C": ChangeKind.MODIFIED, "A": ChangeKind.ADDED, "D": ChangeKind.DELETED}
    return [Change(line.split()[1], kinds[line.split()[0]]) for line in text.strip().splitlines()]


def select(text: str, earlier: Record | None = None) -> Record:
    return select_changes(diff(text), image=IMAGE, skip=SKIP, earlier=earlier)


def test_an_untouched_browser_has_changed_nothing() -> None:
    record = select("C /tmp\nA /tmp/.X11-unix\nC /home\nA /home/machine\nC /run\nA /run/lock\nC /etc\nC /etc/hosts")
    assert record.empty


def test_added_directories_are_carried_once_with_all_that_is_in_them() -> None:
    record = select("C /opt\nA /opt/a\nA /opt/a/b\nA /opt/a/b/c")
    assert (record.trees, record.entries) == (("/opt/a",), ("/opt",))


def test_a_directory_whose_mode_changed_is_carried_without_its_content() -> None:
    assert select("C /srv").entries == ("/srv",)


def test_parents_of_what_is_left_out_are_left_out() -> None:
    assert select("C /var\nC /var/run\nA /var/run/x\nC /home\nA /home/machine/x").empty


def test_only_the_topmost_deleted_path_is_named() -> None:
    assert select("D /usr/share/doc\nD /usr/share/doc/x").deleted == ("/usr/share/doc",)


def test_a_path_that_only_looks_like_a_left_out_one_is_kept() -> None:
    assert select("A /tmpfiles\nA /home/machine2").trees == ("/home/machine2", "/tmpfiles")


def test_changes_are_joined_with_those_of_the_image() -> None:
    other = ImageIdentity(reference="older", id="sha256:older")
    earlier = Record(original=other, trees=("/opt/a", "/opt/b/c"), entries=("/etc/passwd",), deleted=("/etc/x",))
    record = select("A /opt/b\nC /etc/passwd\nC /etc/group\nD /etc/y", earlier)
    assert record.trees == ("/opt/a", "/opt/b")
    assert record.entries == ("/etc/group", "/etc/passwd")
    assert record.deleted == ("/etc/x", "/etc/y")
    assert record.original == other


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    machine = FakeMachine(tmp_path)
    container = machine.add_container("c", volume="v", instance="mu-1")
    container.running = False
    (container.root / "opt/a/deep").mkdir(parents=True)
    (container.root / "opt/a/deep/file").write_text("deep")
    os.link(container.root / "opt/a/deep/file", container.root / "opt/a/link")
    (container.root / "etc").mkdir()
    (container.root / "etc/passwd").write_text("root")
    (container.root / "etc/other").write_text("not changed")
    (container.root / "tmp").mkdir()
    (container.root / "tmp/x").write_text("not kept")
    return machine


@pytest.mark.parametrize("max_fetches", [0, 100])
def test_the_tar_holds_what_the_record_names_under_its_full_name(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, max_fetches: int
) -> None:
    monkeypatch.setattr(changes_module, "MAX_FETCHES", max_fetches)
    record = Record(
        original=IMAGE, trees=("/opt/a", "/vanished"), entries=("/etc", "/etc/passwd"), deleted=("/usr/gone",)
    )
    tar = ChangesTar(machine, "c", record, SKIP)
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar.chunks()))) as archive:
        names = sorted(archive.getnames())
        assert names == [
            "etc",
            RECORD_PATH.lstrip("/"),
            "etc/passwd",
            "opt/a",
            "opt/a/deep",
            "opt/a/deep/file",
            "opt/a/link",
        ]
        linked = [archive.getmember(name) for name in ("opt/a/deep/file", "opt/a/link")]
        assert {member.linkname for member in linked if member.islnk()} < {"opt/a/deep/file", "opt/a/link"}
        stored = archive.extractfile(RECORD_PATH.lstrip("/"))
        assert stored is not None
        assert Record.model_validate_json(stored.read()) == record
    assert tar.paths == 6
    assert machine.exports == (1 if max_fetches == 0 else 0)


def test_a_deleted_directory_that_came_back_is_carried(machine: FakeMachine) -> None:
    tar = ChangesTar(machine, "c", Record(original=IMAGE, deleted=("/opt/a",)), SKIP)
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar.chunks()))) as archive:
        assert "opt/a/deep/file" in archive.getnames()
