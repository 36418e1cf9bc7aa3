"""Taking a snapshot of an instance that goes on running: whatever fails or dies, it runs, and is not left paused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from provisioner.errors import DockerError, NodeUnreachable, SnapshotFailed, SnapshotMissing
from provisioner.snapshots.capture import Capture, CaptureResult
from provisioner.snapshots.manifest import Manifest
from provisioner.snapshots.mark import Method
from provisioner.snapshots.restore import restore
from provisioner.snapshots.store import verify_snapshot
from tests.unit.snapshots.conftest import SNAPSHOT, Scene
from tests.unit.snapshots.fakes import Killed, Trouble, content

CALLS = 40
"""More calls than a capture makes."""


@pytest.fixture
def scene(scene: Scene) -> Scene:
    return replace(scene, capture=replace(scene.capture, live=True))


def take(scene: Scene, trouble: Trouble | None = None) -> CaptureResult:
    machine = trouble.wrap(scene.machine) if trouble else scene.machine
    store = trouble.wrap(scene.store, returns=("begin",)) if trouble else scene.store
    return Capture(scene.capture, machine=machine, store=store).run()


def assert_undisturbed(scene: Scene) -> None:
    container = scene.machine.containers["browser-1"]
    assert (container.running, container.paused, container.starts) == (True, False, 1)


def assert_whole(scene: Scene) -> None:
    manifest = scene.store.read_manifest(SNAPSHOT)
    verify_snapshot(scene.store, manifest)
    expected = content(scene.home)
    expected.pop("profile/SingletonLock")
    for method in Method:
        restored = restore(scene.restore(method, volume=method.value), machine=scene.machine, store=scene.store)
        assert restored.method_used is method
        assert content(scene.machine.volume(method.value)) == expected
    assert not list(scene.store_root.rglob("*.tmp"))


def test_the_instance_goes_on_running_and_the_manifest_says_so(scene: Scene) -> None:
    result = take(scene)
    assert result.copied
    assert (result.manifest.live, result.manifest.stopped_cleanly) == (True, False)
    assert scene.machine.containers["browser-1"].pauses == 1
    assert_undisturbed(scene)
    assert_whole(scene)


def test_the_archive_holds_what_there_was_when_the_container_was_paused(scene: Scene) -> None:
    taking = Capture(scene.capture, machine=scene.machine, store=scene.store)
    for step in taking.steps:
        step.run()
        if step.name == "copy":
            (scene.home / "notes.txt").write_text("written since")
    restore(scene.restore(Method.FULL_RESTORE), machine=scene.machine, store=scene.store)
    assert content(scene.machine.volume("new-home"))["notes.txt"] == "kept"


def test_every_step_can_be_done_twice(scene: Scene) -> None:
    for step in Capture(scene.capture, machine=scene.machine, store=scene.store).steps:
        step.run()
        step.run()
    assert_undisturbed(scene)
    assert_whole(scene)


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
        assert_undisturbed(scene)
        assert_whole(scene)
        scene.store.delete(SNAPSHOT)
    else:
        pytest.fail("more calls than expected")


def _die() -> None:
    raise Killed


def test_killed_while_the_container_is_paused_the_next_attempt_lets_it_go_on(scene: Scene) -> None:
    scene.machine.while_paused = _die
    with pytest.raises(Killed):
        take(scene)
    container = scene.machine.containers["browser-1"]
    assert container.paused
    scene.machine.while_paused = lambda: None
    resumed: list[bool] = []

    @contextmanager
    def read_copy(*args: object) -> Iterator[Iterator[bytes]]:
        resumed.append(not container.paused)
        with scene.machine.read_copy(*args) as chunks:  # type: ignore[arg-type]
            yield chunks

    class Watched:
        def __getattr__(self, name: str) -> object:
            return read_copy if name == "read_copy" else getattr(scene.machine, name)

    Capture(scene.capture, machine=Watched(), store=scene.store).run()  # type: ignore[arg-type]
    assert resumed == [True]
    assert_undisturbed(scene)
    assert_whole(scene)


def test_a_next_attempt_that_fails_lets_it_go_on_as_well(scene: Scene) -> None:
    scene.machine.while_paused = _die
    with pytest.raises(Killed):
        take(scene)
    scene.store_root.joinpath(SNAPSHOT.instance_id).rename(scene.store_root / "away")
    scene.store_root.joinpath(SNAPSHOT.instance_id).write_text("in the way")
    with pytest.raises(SnapshotFailed, match="the instance goes on running"):
        take(scene)
    assert_undisturbed(scene)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [DockerError, NodeUnreachable, SnapshotFailed])
def test_failing_at_any_call_it_leaves_the_instance_running_and_nothing_behind(
    scene: Scene, after: bool, error: type[DockerError]
) -> None:
    trouble = Trouble()
    for at in range(CALLS):
        trouble.plan(at, after=after, error=lambda: error("Something is broken."))
        try:
            take(scene, trouble)
        except SnapshotFailed:
            pass
        else:
            assert trouble.calls <= at
            break
        assert_undisturbed(scene)
        assert not scene.machine.volume("copy").exists()
        assert not [path for path in scene.store_root.rglob("*") if path.is_file()]
        with pytest.raises(SnapshotMissing):
            scene.store.read_manifest(SNAPSHOT)
    else:
        pytest.fail("more calls than expected")


def test_an_instance_that_can_not_be_resumed_is_told(scene: Scene) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            if name in ("copy_running", "resume_container"):
                raise DockerError(f"No {name}.")
            return getattr(scene.machine, name)

    with pytest.raises(SnapshotFailed, match="could not be resumed: No resume_container"):
        Capture(scene.capture, machine=Broken(), store=scene.store).run()  # type: ignore[arg-type]


def test_a_container_that_does_not_run_is_not_started_for_a_live_snapshot(scene: Scene) -> None:
    container = scene.machine.containers["browser-1"]
    container.running = False
    with pytest.raises(SnapshotFailed, match="does not run"):
        take(scene)
    assert not container.running


def test_changes_above_the_image_that_change_while_they_are_read_are_read_again(scene: Scene) -> None:
    reads: list[str] = []

    @contextmanager
    def cut_at_first(container: str, path: str) -> Iterator[Iterator[bytes]]:
        reads.append(path)
        with scene.machine.read_path(container, path) as chunks:
            yield iter([next(chunks)[:600]]) if len(reads) == 1 else chunks

    class Changing:
        def __getattr__(self, name: str) -> object:
            return cut_at_first if name == "read_path" else getattr(scene.machine, name)

    Capture(scene.capture, machine=Changing(), store=scene.store).run()  # type: ignore[arg-type]
    assert len(reads) > len(set(reads))
    assert_whole(scene)


def test_a_live_snapshot_is_found_again_though_its_container_was_started_again(scene: Scene) -> None:
    first = take(scene).manifest
    container = scene.machine.containers["browser-1"]
    container.starts += 1
    assert take(scene).manifest == first
    assert container.pauses == 1


def test_a_live_snapshot_is_none_to_sleep_on(scene: Scene) -> None:
    take(scene)
    (scene.home / "notes.txt").write_text("written since")
    scene = replace(scene, capture=replace(scene.capture, live=False))
    assert not take(scene).manifest.live
    assert_whole(scene)


def test_a_manifest_that_is_not_live_is_written_as_it_always_was(scene: Scene) -> None:
    live = take(scene).manifest
    assert Manifest.model_validate_json(live.to_json()) == live
    asleep = live.model_copy(update={"live": False})
    assert b'"live"' not in asleep.to_json()
    assert Manifest.model_validate_json(asleep.to_json()) == asleep
