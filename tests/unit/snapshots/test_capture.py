"""Taking a snapshot: whatever fails or dies, there is a whole snapshot, or the instance runs and has lost nothing."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from provisioner.errors import DockerError, NodeUnreachable, SnapshotFailed, SnapshotMissing
from provisioner.snapshots.capture import Capture, CaptureResult
from provisioner.snapshots.changes import RECORD_PATH, Record
from provisioner.snapshots.manifest import PartName
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import restore
from provisioner.snapshots.store import verify_snapshot
from tests.unit.snapshots.conftest import PLAIN_AND_ENCRYPTED, SNAPSHOT, Scene
from tests.unit.snapshots.fakes import Frozen, Killed, Trouble, content

CALLS = 40
"""More calls than a capture makes."""


def take(scene: Scene, trouble: Trouble | None = None) -> CaptureResult:
    machine = trouble.wrap(scene.machine) if trouble else scene.machine
    store = trouble.wrap(scene.store, returns=("begin",)) if trouble else scene.store
    return Capture(scene.capture, machine=machine, store=store).run()


def assert_whole(scene: Scene) -> None:
    manifest = scene.store.read_manifest(SNAPSHOT)
    verify_snapshot(scene.store, manifest)
    request = scene.restore(Method.FULL_RESTORE)
    restore(request, machine=scene.machine, store=scene.store)
    restored = content(scene.machine.volume("new-home"))
    expected = content(scene.home)
    expected.pop("profile/SingletonLock", None)
    assert restored == expected
    assert scene.machine.read_stamp("copy") == manifest.home.sha256
    assert not scene.machine.containers["browser-1"].running
    assert not list(scene.store_root.rglob("*.tmp"))


def assert_untouched(scene: Scene, before: dict[str, str]) -> None:
    assert scene.machine.containers["browser-1"].running
    assert content(scene.home) == before
    assert not scene.machine.volume("copy").exists()
    assert not [path for path in scene.store_root.rglob("*") if path.is_file()]
    with pytest.raises(SnapshotMissing):
        scene.store.read_manifest(SNAPSHOT)


def test_a_snapshot_holds_the_home_directory_and_what_changed_above_the_image(scene: Scene) -> None:
    result = take(scene)
    assert result.copied
    assert [part.name for part in result.manifest.parts] == [PartName.HOME, PartName.ROOTFS]
    assert result.manifest.home.entries == 6
    assert result.manifest.deleted_paths == ("/etc/gone",)
    assert_whole(scene)


def test_without_changes_above_the_image_there_is_one_archive_only(scene: Scene) -> None:
    scene.machine.containers["browser-1"].changes.clear()
    assert [part.name for part in take(scene).manifest.parts] == [PartName.HOME]


def test_every_step_can_be_done_twice(scene: Scene) -> None:
    capture = Capture(scene.capture, machine=scene.machine, store=scene.store)
    for step in capture.steps:
        step.run()
        step.run()
    assert_whole(scene)


@PLAIN_AND_ENCRYPTED
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_call_it_succeeds_when_run_again(scene: Scene, after: bool) -> None:
    trouble = Trouble()
    for at in range(CALLS):
        trouble.plan(at, after=after, error=Killed)
        try:
            take(scene, trouble)
        except Killed:
            trouble.calm()
            take(scene, trouble)
        else:
            assert trouble.calls <= at
            break
        assert_whole(scene)
        scene.store.delete(SNAPSHOT)
        scene.machine.start_container("browser-1")
    else:
        pytest.fail("more calls than expected")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [DockerError, NodeUnreachable, SnapshotFailed])
def test_failing_at_any_call_it_leaves_the_instance_running_and_nothing_behind(
    scene: Scene, after: bool, error: type[DockerError]
) -> None:
    before = content(scene.home)
    trouble = Trouble()
    for at in range(CALLS):
        trouble.plan(at, after=after, error=lambda: error("Something is broken."))
        try:
            result = take(scene, trouble)
        except SnapshotFailed:
            assert_untouched(scene, before)
            continue
        if trouble.calls <= at:
            break
        assert result.copy_error == "Something is broken.", trouble.names[at]  # the one step that may fail
        scene.store.delete(SNAPSHOT)
        scene.machine.start_container("browser-1")
    else:
        pytest.fail("more calls than expected")


@PLAIN_AND_ENCRYPTED
@pytest.mark.parametrize("gone", [False, True])
def test_frozen_at_any_call_while_another_takes_the_snapshot_it_does_no_harm(scene: Scene, gone: bool) -> None:
    trouble = Frozen()
    for at in range(CALLS):
        container = scene.machine.containers["browser-1"]

        def meanwhile() -> None:
            take(scene)
            if gone:  # and the instance is asleep
                del scene.machine.containers["browser-1"]
                scene.home.rename(scene.home.with_name("gone"))

        trouble.plan_freeze(at, meanwhile)
        with contextlib.suppress(SnapshotFailed):
            take(scene, trouble)
        if trouble.calls <= at:
            break
        if gone:
            scene.home.with_name("gone").rename(scene.home)
            scene.machine.containers["browser-1"] = container
        verify_snapshot(scene.store, scene.store.read_manifest(SNAPSHOT))
        restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store)
        assert content(scene.machine.volume("new-home"))["notes.txt"] == "kept"
        assert not list(scene.store_root.rglob("*.tmp"))
        scene.store.delete(SNAPSHOT)
        scene.machine.start_container("browser-1")
    else:
        pytest.fail("more calls than expected")


def test_the_reason_is_one_sentence_for_the_user(scene: Scene) -> None:
    scene.store_root.mkdir()
    scene.store_root.joinpath(SNAPSHOT.instance_id).write_text("in the way")
    with pytest.raises(SnapshotFailed, match="No snapshot was taken, the instance goes on running: The snapshot store"):
        take(scene)
    assert scene.machine.containers["browser-1"].starts == 1, "it was not stopped for a store that can't be written"


def test_an_instance_that_can_not_be_started_again_is_told(scene: Scene) -> None:
    trouble = Trouble()

    class Broken:
        def __getattr__(self, name: str) -> object:
            if name in ("list_changes", "start_container"):
                raise DockerError(f"No {name}.")
            return getattr(scene.machine, name)

    with pytest.raises(SnapshotFailed, match="could not be started again: No start_container"):
        Capture(scene.capture, machine=trouble.wrap(Broken()), store=scene.store).run()


def test_a_cut_archive_is_no_snapshot(scene: Scene) -> None:
    before = content(scene.home)

    @contextmanager
    def cut(container: str, path: str) -> Iterator[Iterator[bytes]]:
        with scene.machine.read_path(container, path) as chunks:
            yield iter([next(chunks)])

    class Cut:
        def __getattr__(self, name: str) -> object:
            return cut if name == "read_path" else getattr(scene.machine, name)

    with pytest.raises(SnapshotFailed):
        Capture(scene.capture, machine=Cut(), store=scene.store).run()  # type: ignore[arg-type]
    assert_untouched(scene, before)


def test_an_archive_with_fewer_entries_than_the_directory_is_no_snapshot(scene: Scene) -> None:
    class Miscounting:
        def __getattr__(self, name: str) -> object:
            if name == "make_copy":
                return lambda *args, **kwargs: scene.machine.make_copy(*args, **kwargs) + 1
            return getattr(scene.machine, name)

    before = content(scene.home)
    with pytest.raises(SnapshotFailed, match="has 6 entries, the directory 7"):
        Capture(scene.capture, machine=Miscounting(), store=scene.store).run()  # type: ignore[arg-type]
    assert_untouched(scene, before)


def test_a_complete_snapshot_is_returned_not_taken_again(scene: Scene) -> None:
    first = take(scene).manifest
    (scene.home / "notes.txt").write_text("changed by nobody: it does not run")
    assert take(scene).manifest == first


def test_a_complete_snapshot_is_returned_when_the_container_is_gone(scene: Scene) -> None:
    first = take(scene).manifest
    del scene.machine.containers["browser-1"]
    assert take(scene).manifest == first


def test_a_snapshot_is_taken_anew_if_the_instance_has_run_since(scene: Scene) -> None:
    take(scene)
    scene.machine.start_container("browser-1")
    (scene.home / "notes.txt").write_text("written since")
    take(scene)
    assert_whole(scene)


def test_an_old_snapshot_is_found_again_though_the_instance_was_revived_from_it(scene: Scene) -> None:
    first = take(scene).manifest
    container = scene.machine.containers["browser-1"]
    container.id = "container-2"
    scene.machine.start_container("browser-1")
    assert take(scene).manifest == first
    assert container.running, "asking for an old snapshot disturbs nobody"


def test_an_old_snapshot_that_is_gone_is_not_taken_from_the_revived_instance(scene: Scene) -> None:
    take(scene)
    restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store)
    container = scene.machine.containers["browser-1"]
    container.volume, container.running, starts = "new-home", True, container.starts
    scene.store.delete(SNAPSHOT)
    with pytest.raises(SnapshotFailed, match="has been revived from snapshot 3 since"):
        take(scene)
    assert (container.running, container.starts) == (True, starts)


def test_a_second_snapshot_is_relative_to_the_original_image(scene: Scene) -> None:
    take(scene)
    image = restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store).image
    container = scene.machine.containers["browser-1"]
    container.image = container.image.model_copy(update={"reference": image, "id": image})
    container.changes.clear()
    (container.root / "etc" / "added").unlink()
    scene.store.delete(SNAPSHOT)

    result = take(scene)

    restored = restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store)
    files = scene.machine.images[restored.image]["files"]
    assert files["/opt/tool/run"] == b"tool"
    assert "/etc/added" not in files
    assert Record.model_validate_json(files[RECORD_PATH]).original.reference == "browser"
    assert result.manifest.image.id == "sha256:original"
    assert scene.machine.images[restored.image]["base"] == "sha256:original"


def test_progress_is_told_in_readable_lines(scene: Scene) -> None:
    said = io.StringIO()
    Capture(
        scene.capture, machine=scene.machine, store=scene.store, progress=lambda line: said.write(line + "\n") and None
    ).run()
    assert "saved the home directory: 6 entries" in said.getvalue()
