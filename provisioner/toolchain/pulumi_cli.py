"""Finds the Pulumi CLI, or puts it into the user's cache directory: official download first, else built with Go.

The cache is `$XDG_CACHE_HOME/machineuse/pulumi-<version>/`, shared by all checkouts of a user. Both ways fill a
temporary directory beside it, which is renamed when it is whole, under a lock file: a directory with the final name is
a CLI that runs, whatever was killed while it was made.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from provisioner.errors import SetupError
from provisioner.toolchain.locks import locked

if TYPE_CHECKING:
    from provisioner.toolchain.progress import Step

PULUMI_VERSION = "3.256.0"
"""The version that is downloaded or built; any newer one of the same major version on PATH is taken as it is."""

_GO_PACKAGE = "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
_GO_VERSION_VARIABLE = "github.com/pulumi/pulumi/sdk/v3/go/common/version.Version"
_DOWNLOAD_TIMEOUT_S = 600
_BUILD_TIMEOUT_S = 3600


def cache_dir() -> Path:
    """Return the directory in which all checkouts of this user keep what takes long to get."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "machineuse"


def find_pulumi() -> Path | None:
    """Return the Pulumi CLI to use: one on PATH that is new enough, else the one in the cache, else None."""
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        candidate = shutil.which("pulumi", path=directory) if directory else None
        if candidate and _is_usable(Path(candidate)):
            return Path(candidate).absolute()
    cached = _cached_cli()
    return cached if os.access(cached, os.X_OK) else None


def require_pulumi() -> Path:
    """Return the Pulumi CLI to use; raise SetupError, saying how to get one, where there is none."""
    found = find_pulumi()
    if found is None:
        raise SetupError("The Pulumi CLI is not on this machine.", resolution="Run `make run` in the checkout once.")
    return found


def provide_pulumi(step: Step, *, project_dir: Path) -> Path:
    """Return the Pulumi CLI to use; get it first where there is none. Idempotent, safe to run in two checkouts at once.

    Raises SetupError where it can be neither downloaded nor built.
    """
    found = find_pulumi()
    if found is not None:
        return found
    lock = cache_dir() / f"pulumi-{PULUMI_VERSION}.lock"
    with locked(lock, step=step, waiting_for="getting the Pulumi CLI"):
        found = find_pulumi()  # another checkout may have made it while we waited
        if found is not None:
            return found
        refusal = _download(step)
        if refusal is not None:
            step.say(f"the official download of Pulumi is out of reach ({refusal}); building it with Go instead")
            _build(step, toolchain_dir=project_dir / "toolchain", refusal=refusal)
    return require_pulumi()


def _cached_cli() -> Path:
    return cache_dir() / f"pulumi-{PULUMI_VERSION}" / "bin" / "pulumi"


def _is_usable(cli: Path) -> bool:
    if cli.exists() and _cached_cli().exists() and cli.samefile(_cached_cli()):
        return True  # a file with that name was tried when it was made
    version = _read_version(cli, cli.stat().st_mtime_ns) if cli.exists() else None
    wanted = _parse_version(PULUMI_VERSION)
    return version is not None and wanted is not None and version[0] == wanted[0] and version >= wanted


@functools.lru_cache(maxsize=8)
def _read_version(cli: Path, _mtime_ns: int) -> tuple[int, ...] | None:
    """Return what `pulumi version` prints (0.24 s), remembered for as long as the file stays the same."""
    try:
        printed = subprocess.run(
            [cli, "version"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "PULUMI_SKIP_UPDATE_CHECK": "true"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _parse_version(printed.stdout) if printed.returncode == 0 else None


def _parse_version(text: str) -> tuple[int, ...] | None:
    match = re.match(r"\s*v?(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else None


def _download(step: Step) -> str | None:
    """Download the official build into the cache; return None, or why that is not to be had here."""
    try:
        with _new_cache_entry() as root:
            step.run(
                [sys.executable, "-m", "provisioner.toolchain.official_cli", PULUMI_VERSION, str(root)],
                timeout_s=_DOWNLOAD_TIMEOUT_S,
                what="downloading the official Pulumi CLI",
            )
    except SetupError as error:
        lines = (error.detail or error.message).strip().splitlines()
        return lines[-1] if lines else error.message
    return None


def _build(step: Step, *, toolchain_dir: Path, refusal: str) -> None:
    """Build the CLI from the Go modules that toolchain/go.mod pins into the cache."""
    go = shutil.which("go")
    if go is None:
        raise SetupError(
            "The Pulumi CLI is missing; its download is out of reach, and there is no Go to build it with.",
            detail=refusal,
            resolution=f"Install Pulumi {PULUMI_VERSION} or newer, or Go 1.25.11 or newer, and run this again.",
        )
    with _new_cache_entry() as root:
        step.say(f"building Pulumi {PULUMI_VERSION} with Go: three to five minutes on two cores, once per user")
        step.run(
            [
                *(go, "build", "-v", "-trimpath"),
                *("-ldflags", f"-s -w -X {_GO_VERSION_VARIABLE}={PULUMI_VERSION}"),
                *("-o", str(root / "bin" / "pulumi"), _GO_PACKAGE),
            ],
            cwd=toolchain_dir,
            timeout_s=_BUILD_TIMEOUT_S,
            what="building the Pulumi CLI",
            count="packages",
        )


@contextmanager
def _new_cache_entry() -> Iterator[Path]:
    """Yield an empty directory that becomes the cache entry when the block ends well and left a CLI that runs."""
    final = cache_dir() / f"pulumi-{PULUMI_VERSION}"
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{final.name}.partial-", dir=final.parent))
    try:
        yield partial
        if not _is_usable(partial / "bin" / "pulumi"):
            raise SetupError(
                "The Pulumi CLI that was just made does not run.",
                detail=str(partial / "bin" / "pulumi"),
                resolution="Install Pulumi by its own installer and run this again.",
            )
        partial.chmod(0o755)
        shutil.rmtree(final, ignore_errors=True)  # an entry without a CLI that runs, else we would not be here
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
