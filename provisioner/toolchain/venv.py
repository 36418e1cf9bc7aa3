"""The virtual environment: the locked dependencies, and this checkout installed into it.

A stamp in it says for which lock, project file, interpreter and place it was made, so a second run costs a few reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from provisioner.errors import SetupError
from provisioner.toolchain.packages import install_packages

if TYPE_CHECKING:
    from provisioner.toolchain.progress import Step

LOCK = "requirements.lock"
_VENV_TIMEOUT_S = 300
_PIP_TIMEOUT_S = 1800


def venv_python(project_dir: Path) -> Path:
    """Return the interpreter of the checkout's virtual environment."""
    return project_dir / ".venv" / "bin" / "python"


def is_current(project_dir: Path) -> bool:
    """Say whether the virtual environment is the one that the lock and the project file ask for."""
    try:
        return _stamp(project_dir).read_text() == _fingerprint(project_dir) and venv_python(project_dir).exists()
    except FileNotFoundError:
        return False


def provide_venv(step: Step, *, project_dir: Path) -> None:
    """Make or update the virtual environment with exactly the versions and hashes of the lock. Idempotent.

    Killed half-way, it is simply done again: the stamp comes last. Raises SetupError when pip fails.
    """
    if is_current(project_dir):
        step.outcome = "as locked"
        return
    _stamp(project_dir).unlink(missing_ok=True)
    python = str(venv_python(project_dir))
    if not _runs(python):
        _make(step, project_dir)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--progress-bar", "off"]
    step.run(
        [*pip, "--require-hashes", "-r", LOCK],
        cwd=project_dir,
        what="pip install of the locked dependencies",
        timeout_s=_PIP_TIMEOUT_S,
    )
    # setuptools is among the locked packages; with build isolation pip would fetch an unlocked one.
    step.run(
        [*pip, "--no-deps", "--no-build-isolation", "-e", "."],
        cwd=project_dir,
        what="pip install of the checkout",
        timeout_s=_PIP_TIMEOUT_S,
    )
    _stamp(project_dir).write_text(_fingerprint(project_dir))
    step.outcome = "dependencies installed as locked"


def _make(step: Step, project_dir: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        install_packages(step, ["python3-venv"], reason="Python's venv module")
    step.say(f"making .venv with {sys.executable}")
    step.run(
        [sys.executable, "-m", "venv", "--clear", ".venv"],
        cwd=project_dir,
        what="python -m venv",
        timeout_s=_VENV_TIMEOUT_S,
    )
    if not _runs(str(venv_python(project_dir))):
        raise SetupError("The new virtual environment does not work.", detail=str(venv_python(project_dir)))


def _runs(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _stamp(project_dir: Path) -> Path:
    return project_dir / ".venv" / "machineuse.stamp"


def _fingerprint(project_dir: Path) -> str:
    """Return a digest of everything that decides what the virtual environment contains."""
    digest = hashlib.sha256()
    for name in (LOCK, "pyproject.toml", ".venv/pyvenv.cfg"):
        digest.update((project_dir / name).read_bytes())
    digest.update(str(project_dir).encode())
    return digest.hexdigest() + "\n"
