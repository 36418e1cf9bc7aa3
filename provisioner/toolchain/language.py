"""Puts our Python language host on PATH, but only where the official one is missing.

The official one comes with the official CLI, beside it. Ours is a two-line launcher in the virtual environment, not in
the shared cache: it must start the very interpreter that has the project's dependencies.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
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
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {_MODULE} "$@"\n'
    try:
        if launcher.read_text() == script:
            return launcher
    except FileNotFoundError:
        pass
    launcher.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=launcher.parent, delete=False) as partial:
        partial.write(script)
    Path(partial.name).chmod(0o755)
    Path(partial.name).replace(launcher)
    return launcher
