"""What the tests need beyond the virtual environment: clients that must work with our browsers, and servers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from provisioner.errors import SetupError
from provisioner.toolchain.locks import locked
from provisioner.toolchain.packages import can_install_packages, install_packages
from provisioner.toolchain.pulumi_cli import cache_dir

if TYPE_CHECKING:
    from provisioner.toolchain.progress import Step

PUPPETEER_VERSION = "24.10.0"
VERSITYGW_VERSION = "1.8.0"
_CREATE_CLUSTER = Path("/etc/postgresql-common/createcluster.conf")
_NPM_TIMEOUT_S = 600
_GO_TIMEOUT_S = 1800


def puppeteer_dir() -> Path:
    """Return the directory whose `node_modules` has puppeteer-core; use it as NODE_PATH or as working directory."""
    return cache_dir() / f"puppeteer-{PUPPETEER_VERSION}"


def versitygw_path() -> Path:
    """Return the S3 server that the snapshot store's tests run against."""
    return cache_dir() / f"versitygw-{VERSITYGW_VERSION}" / "versitygw"


def postgresql_programs() -> Path:
    """Return the directory of PostgreSQL's server programs, which are not on PATH; raise SetupError without any."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    found = versions[-1] if versions else shutil.which("postgres")
    if found is None:
        raise SetupError("There is no PostgreSQL server for the tests.", resolution="Run `make setup-tests`.")
    return Path(found).parent


def provide_postgresql(step: Step) -> None:
    """Make sure that a PostgreSQL server's programs are there; no server is started.

    Raises SetupError with the command to run where we may not install.
    """
    try:
        programs = postgresql_programs()
    except SetupError:
        if can_install_packages() and not _CREATE_CLUSTER.exists():
            # Debian's package would make a database cluster of its own, and start it.
            _CREATE_CLUSTER.parent.mkdir(exist_ok=True)
            _CREATE_CLUSTER.write_text("create_main_cluster = false\n")
        install_packages(step, ["postgresql"], reason="PostgreSQL, which the ledger's tests use,")
        programs = postgresql_programs()
    step.outcome = str(programs)


def provide_versitygw(step: Step) -> None:
    """Make sure that the S3 server is there, built with Go. Raises SetupError where there is no Go, or it fails."""
    program = versitygw_path()
    with locked(program.parent.with_name(f"{program.parent.name}.lock"), step=step, waiting_for="building versitygw"):
        if not program.exists():
            go = shutil.which("go")
            if go is None:
                raise SetupError(
                    "There is no Go to build versitygw with, the S3 server that the tests use.",
                    resolution="Install Go 1.25 or newer and run this again.",
                )
            partial = program.parent.with_name(f"{program.parent.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            step.say(f"building versitygw {VERSITYGW_VERSION} with Go: two to five minutes on two cores, once per user")
            step.run(
                [go, "install", "-v", f"github.com/versity/versitygw/cmd/versitygw@v{VERSITYGW_VERSION}"],
                cwd=partial,
                env={"GOBIN": str(partial)},
                timeout_s=_GO_TIMEOUT_S,
                what="building versitygw",
                count="packages",
            )
            partial.rename(program.parent)
    step.outcome = f"versitygw {VERSITYGW_VERSION}"


def provide_sshd(step: Step) -> None:
    """Make sure that there is an SSH server to run on a test's own address. Raises SetupError where we may not install.

    What the package starts by itself is the system's affair; the tests start their own.
    """
    if _find_sshd() is None:
        install_packages(step, ["openssh-server", "openssh-client"], reason="sshd, behind which a test's node is,")
    step.outcome = _find_sshd() or "sshd installed"


def _find_sshd() -> str | None:
    return shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


def provide_selenium_driver(step: Step) -> None:
    """Make sure that `chromedriver` is on PATH. Raises SetupError with the command to run where we may not install."""
    if shutil.which("chromedriver") is None:
        install_packages(step, ["chromium-driver"], reason="chromedriver, which the Selenium test uses,")
    step.outcome = shutil.which("chromedriver") or "chromedriver installed"


def provide_puppeteer(step: Step) -> None:
    """Make sure that Node and puppeteer-core are there. Raises SetupError where npm fails."""
    missing = [package for package, program in (("nodejs", "node"), ("npm", "npm")) if shutil.which(program) is None]
    if missing:
        install_packages(step, missing, reason="Node, which the Puppeteer test uses,")
    target = puppeteer_dir()
    with locked(target.with_suffix(".lock"), step=step, waiting_for="installing puppeteer-core"):
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            step.run(
                [
                    *("npm", "install", "--prefix", str(partial), "--no-audit", "--no-fund", "--ignore-scripts"),
                    *("--no-package-lock", f"puppeteer-core@{PUPPETEER_VERSION}"),
                ],
                cwd=partial,
                env={"CI": os.environ.get("CI", "true")},
                what="npm install puppeteer-core",
                timeout_s=_NPM_TIMEOUT_S,
            )
            partial.rename(target)
    step.outcome = f"puppeteer-core {PUPPETEER_VERSION}"
