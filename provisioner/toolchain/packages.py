"""Installs Debian packages, where we may: as root on Debian or Ubuntu."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from provisioner.errors import SetupError

if TYPE_CHECKING:
    from provisioner.toolchain.progress import Step

_UPDATE_TIMEOUT_S = 300
_INSTALL_TIMEOUT_S = 1800


def can_install_packages() -> bool:
    """Say whether this process may install packages: it is root, on Debian or something made from it."""
    return os.geteuid() == 0 and _is_debian() and shutil.which("apt-get") is not None


def install_command(names: Sequence[str]) -> str:
    """Return what a person would type to install the packages."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get update && {sudo}apt-get install -y --no-install-recommends {' '.join(names)}"


def install_packages(step: Step, names: Sequence[str], *, reason: str) -> None:
    """Install Debian packages, saying so; `reason` completes "... is missing".

    Raises SetupError, with the exact command to run as resolution, where we may not or where it fails.
    """
    if not can_install_packages():
        by_hand = f"Install {', '.join(names)} with your package manager and run this again."
        raise SetupError(
            f"{reason} is missing.", resolution=f"Run: {install_command(names)}" if _is_debian() else by_hand
        )
    step.say(f"{reason} is missing; running: {install_command(names)}")
    env = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    step.run(["apt-get", "update", "-q"], env=env, what="apt-get update", timeout_s=_UPDATE_TIMEOUT_S)
    step.run(
        ["apt-get", "install", "-q", "-y", "--no-install-recommends", *names],
        env=env,
        what=f"apt-get install {' '.join(names)}",
        timeout_s=_INSTALL_TIMEOUT_S,
    )


def _is_debian() -> bool:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return False
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    names = f"{fields.get('ID', '')} {fields.get('ID_LIKE', '')}".replace('"', "").split()
    return not {"debian", "ubuntu"}.isdisjoint(names)
