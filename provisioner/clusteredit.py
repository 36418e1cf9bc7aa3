"""Changes `Pulumi.<cluster>.yaml` on disk: one edit at a time, and never half of one.

The new text is checked first, as whoever reads it next will check it, then written aside and renamed. Editors of ours
wait for each other; the file of somebody else who saved it meanwhile is not written over, but edited as it is by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from provisioner.clusterfile import parse_cluster, path_of, read_cluster, read_text
from provisioner.errors import SettingsError
from stacks.spec import ClusterSpec

Change = Callable[[str], str]
"""From the file's text to its new one; may raise, and then nothing is changed."""


def edit_cluster(project_dir: Path, *, cluster: str, change: Change) -> ClusterSpec:
    """Change the cluster's file; return what it says then. A file that is as wanted already is not touched.

    Raises SettingsError for a file that has, or would have, a mistake, or can't be written; and what `change` raises.
    """
    read_cluster(project_dir, cluster=cluster)  # writes a first one, refuses one with a mistake
    path = path_of(project_dir, cluster=cluster).resolve()  # a link stays a link
    try:
        with _locked(path):
            while True:
                before = read_text(path)
                after = change(before)
                spec = parse_cluster(after, cluster=cluster, file=path.name)
                if after == before or _replace(path, before=before, after=after):
                    return spec
    except OSError as error:
        raise SettingsError(f"{path.name} can't be written: {error.strerror}.", detail=str(error)) from error


def _replace(path: Path, *, before: str, after: str) -> bool:
    """Put the new text in the file's place, unless it is not `before` any more; return whether that was done."""
    status = path.stat()
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    draft = Path(name)
    try:
        with os.fdopen(number, "w", encoding="utf-8", newline="") as file:
            file.write(after)
            file.flush()
            os.fchmod(file.fileno(), status.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fsync(file.fileno())
        if read_text(path) != before:
            return False
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's own lock: nothing is left beside it, and the kernel lets go of it however its holder ends."""
    while True:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it before may have put another file in this one's place.
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield
                return
