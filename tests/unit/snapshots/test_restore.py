"""Giving a snapshot back: nothing half-restored, nothing overwritten that somebody uses."""

from __future__ import annotations

import pytest

from provisioner.errors import Conflict, DockerError, DockerNotFound, SnapshotCorrupt, SnapshotMissing
from provisioner.snapshots.capture import Capture
from provisioner.snapshots.mark import MARK_NAME, Method
from provisioner.snapshots.restore import RestoreResult, restore, restored_tag
from tests.unit.snapshots.conftest import SNAPSHOT, Scene
from tests.unit.snapshots.fakes import Killed, Trouble, content

CALLS = 30
"""More calls than a restore makes."""


@pytest.fixture
def asleep(scene: Scene) -> Scene:
    Capture(scene.capture, machine=scene.machine, store=scene.store).run()
    return scene


def give_back(scene: Scene, method: Method) -> RestoreResult:
    return restore(scene.restore(method), machine=scene.machine, store=scene.store)


def kept(scene: Scene) -> dict[str, str]:
    return {name: text for name, text in content(scene.home).items() if not name.endswith("SingletonLock")}


def flip_byte(scene: Scene, part: str) -> None:
    path = scene.store_root / SNAPSHOT.instance_id / str(SNAPSHOT.generation) / part
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


def test_full_restore_gives_back_all_but_the_browsers_locks(asleep: Scene) -> None:
    result = give_back(asleep, Method.FULL_RESTORE)
    assert (result.method_used, result.fallback_reason) == (Method.FULL_RESTORE, None)
    assert content(asleep.machine.volume("new-home")) == kept(asleep)


def test_quick_start_uses_the_nodes_copy_and_does_not_read_the_home_archive(asleep: Scene) -> None:
    flip_byte(asleep, "home.tar.zst")
    result = give_back(asleep, Method.QUICK_START)
    assert result == RestoreResult(Method.QUICK_START, None, restored_tag(SNAPSHOT), result.bytes)
    assert content(asleep.machine.volume("new-home")) == kept(asleep)


def test_without_a_copy_quick_start_falls_back_and_says_why(asleep: Scene) -> None:
    asleep.machine.remove_copy("copy")
    result = give_back(asleep, Method.QUICK_START)
    assert result.method_used is Method.FULL_RESTORE
    assert result.fallback_reason == "The node has no copy of the snapshot."
    assert content(asleep.machine.volume("new-home")) == kept(asleep)


def test_a_copy_of_another_snapshot_is_not_used(asleep: Scene) -> None:
    (asleep.machine.volume("copy") / ".complete").write_text("0" * 64)
    assert give_back(asleep, Method.QUICK_START).fallback_reason == "The node's copy is not of this snapshot."


def test_a_copy_that_can_not_be_used_is_not_the_end(asleep: Scene) -> None:
    trouble = Trouble()

    class Broken:
        def __getattr__(self, name: str) -> object:
            if name == "fill_home":
                raise DockerError("The disk is full.")
            return getattr(asleep.machine, name)

    result = restore(asleep.restore(Method.QUICK_START), machine=trouble.wrap(Broken()), store=asleep.store)
    assert result.fallback_reason == "The node's copy could not be used: The disk is full."


@pytest.mark.parametrize("part", ["home.tar.zst", "rootfs.tar.zst"])
def test_a_flipped_byte_is_told_and_nothing_is_restored(asleep: Scene, part: str) -> None:
    flip_byte(asleep, part)
    with pytest.raises(SnapshotCorrupt):
        give_back(asleep, Method.FULL_RESTORE)
    assert content(asleep.machine.volume("new-home")) == {}
    assert restored_tag(SNAPSHOT) not in asleep.machine.images
    assert asleep.store.read_manifest(SNAPSHOT), "the snapshot is kept"


def test_a_quick_start_reads_the_changes_above_the_image_and_tells_when_they_are_damaged(asleep: Scene) -> None:
    flip_byte(asleep, "rootfs.tar.zst")
    with pytest.raises(SnapshotCorrupt):
        give_back(asleep, Method.QUICK_START)
    assert content(asleep.machine.volume("new-home")) == {}


def test_without_changes_above_the_image_a_quick_start_reads_no_archive_and_builds_no_image(asleep: Scene) -> None:
    asleep.store.delete(SNAPSHOT)
    asleep.machine.containers["browser-1"].changes.clear()
    Capture(asleep.capture, machine=asleep.machine, store=asleep.store).run()
    flip_byte(asleep, "home.tar.zst")
    assert give_back(asleep, Method.QUICK_START).image == "browser"


def test_a_snapshot_that_is_not_there_is_told(scene: Scene) -> None:
    with pytest.raises(SnapshotMissing):
        give_back(scene, Method.FULL_RESTORE)


def test_without_a_volume_there_is_nothing_to_restore_into(asleep: Scene) -> None:
    request = asleep.restore(Method.FULL_RESTORE)
    asleep.machine.volume("new-home").rmdir()
    with pytest.raises(DockerNotFound):
        restore(request, machine=asleep.machine, store=asleep.store)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("error", [Killed, lambda: DockerError("Something is broken.")])
def test_cut_off_at_any_call_it_succeeds_when_run_again(
    asleep: Scene, after: bool, method: Method, error: type[BaseException]
) -> None:
    trouble = Trouble()
    for at in range(CALLS):
        volume = f"new-home-{at}"
        request = asleep.restore(method, volume=volume)
        trouble.plan(at, after=after, error=error)
        try:
            restore(request, machine=trouble.wrap(asleep.machine), store=trouble.wrap(asleep.store))
        except (Killed, DockerError):
            restore(request, machine=asleep.machine, store=asleep.store)
        assert content(asleep.machine.volume(volume)) == kept(asleep)
        if trouble.calls <= at:
            break
    else:
        pytest.fail("more calls than expected")


def test_what_a_crash_left_in_the_volume_is_removed_first(asleep: Scene) -> None:
    request = asleep.restore(Method.FULL_RESTORE)
    (asleep.machine.volume("new-home") / "half-written").write_text("half")
    restore(request, machine=asleep.machine, store=asleep.store)
    assert content(asleep.machine.volume("new-home")) == kept(asleep)


def test_done_once_it_is_not_done_again(asleep: Scene) -> None:
    first = give_back(asleep, Method.QUICK_START)
    (asleep.machine.volume("new-home") / "notes.txt").write_text("written since")
    assert give_back(asleep, Method.QUICK_START) == first
    assert content(asleep.machine.volume("new-home"))["notes.txt"] == "written since"


def test_a_volume_that_the_instance_uses_is_never_written_to(asleep: Scene) -> None:
    give_back(asleep, Method.FULL_RESTORE)
    home = asleep.machine.volume("new-home")
    (home / MARK_NAME).unlink()
    (home / "notes.txt").write_text("written since")
    asleep.machine.add_container("browser-2", volume="new-home", instance=SNAPSHOT.instance_id)
    give_back(asleep, Method.FULL_RESTORE)
    assert content(home)["notes.txt"] == "written since"


def test_a_container_that_never_ran_does_not_prove_that_its_home_was_restored(asleep: Scene) -> None:
    request = asleep.restore(Method.FULL_RESTORE)
    asleep.machine.add_container("browser-2", volume="new-home", instance=SNAPSHOT.instance_id).starts = 0
    restore(request, machine=asleep.machine, store=asleep.store)
    assert content(asleep.machine.volume("new-home")) == kept(asleep)


def test_a_volume_that_a_stranger_uses_is_refused(asleep: Scene) -> None:
    request = asleep.restore(Method.FULL_RESTORE)
    asleep.machine.add_container("stranger", volume="new-home", instance="mu-other")
    with pytest.raises(Conflict, match="stranger"):
        restore(request, machine=asleep.machine, store=asleep.store)


def test_a_mark_that_came_with_the_archive_is_not_believed(asleep: Scene) -> None:
    request = asleep.restore(Method.FULL_RESTORE)
    home = asleep.machine.volume("new-home")
    (home / MARK_NAME).write_text(
        '{"generation": 3, "home_sha256": "' + "0" * 64 + '", "method_used": "quick_start", "fallback_reason": null}'
    )
    restore(request, machine=asleep.machine, store=asleep.store)
    assert content(home) == kept(asleep)


def test_a_newer_image_of_that_name_is_used_when_the_original_is_gone(asleep: Scene) -> None:
    del asleep.machine.images["sha256:original"]
    image = give_back(asleep, Method.FULL_RESTORE).image
    assert asleep.machine.images[image]["base"] == "browser"


def test_without_any_image_to_build_on_nothing_is_restored(asleep: Scene) -> None:
    asleep.machine.images.clear()
    with pytest.raises(SnapshotMissing, match="does not have the image browser"):
        give_back(asleep, Method.FULL_RESTORE)
    assert content(asleep.machine.volume("new-home")) == {}
