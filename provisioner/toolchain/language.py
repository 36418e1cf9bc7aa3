"""Puts our Python language host on PATH, but only where the official one is missing.

The official one comes with the official CLI, beside it. Ours is a two-line launcher in the virtual environment, not in
the shared cache: it must start the very interpreter that has the project's dependencies. The CLI warns about every
language host that is on PATH but not in its own directory, so a hard link to the CLI goes beside the launcher.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "pulumi-language-python"
_MODULE = "provisioner.language_host"


def launcher_dir() -> Path:
    """Return the directory of our launcher; it is on nobody's PATH by itself."""
    return Path(sys.prefix) / "libexec" / "machineuse"


def find_official_language_host(cli: Path) -> Path | None:
    """Return the language host that the CLI would find without us: on PATH, or beside the CLI."""
    for directory in [*os.environ.get("PATH", "").split(os.pathsep), str(cli.resolve().parent)]:
        found = shutil.which(NAME, path=directory) if directory else None
        if found and not _is_ours(Path(found)):
            return Path(found).absolute()
    return None


def _is_ours(executable: Path) -> bool:
    """Say whether this is a launcher of ours, of this checkout or of another one that put it on our PATH."""
    with executable.open("rb") as file:
        return _MODULE.encode() in file.read(4096)


def provide_language_host(cli: Path) -> Path | None:
    """Return our launcher, made first if need be, or None where the official language host is there. Idempotent."""
    if find_official_language_host(cli) is not None:
        return None
    launcher = launcher_dir() / NAME
    launcher.parent.mkdir(parents=True, exist_ok=True)
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {_MODULE} "$@"\n'
    if not launcher.exists() or launcher.read_text() != script:
        with _replacing(launcher) as partial:
            partial.write_text(script)
            partial.chmod(0o755)
    linked = launcher.parent / "pulumi"
    if not linked.exists() or not linked.samefile(cli):
        # Where the cache is on another file system there is no link, and the CLI's warning stays: it does no harm.
        with suppress(OSError), _replacing(linked) as partial:
            partial.hardlink_to(cli.resolve())
    return launcher


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a free name in the same directory; what the block makes there takes the place of `path`, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
