"""The steps of the set-up, in order."""

from __future__ import annotations

from pathlib import Path

from provisioner.toolchain.docker_engine import provide_docker_engine
from provisioner.toolchain.language import find_official_language_host, provide_language_host
from provisioner.toolchain.progress import Reporter, StepResult
from provisioner.toolchain.pulumi_cli import provide_pulumi
from provisioner.toolchain.test_tools import (
    provide_postgresql,
    provide_puppeteer,
    provide_selenium_driver,
    provide_sshd,
    provide_versitygw,
)

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent


def ensure(
    reporter: Reporter | None = None, *, project_dir: Path = PROJECT_DIR, tests: bool = False
) -> list[StepResult]:
    """Set up whatever is missing, but for the virtual environment that we run in. Idempotent; well under a second
    when nothing is missing.

    Raises SetupError, with what to do about it, at the first step that can't be done.
    """
    reporter = reporter or Reporter()
    with reporter.step("Pulumi CLI") as step:
        cli = provide_pulumi(step, project_dir=project_dir)
        step.outcome = str(cli)
    with reporter.step("Pulumi's Python language host") as step:
        ours = provide_language_host(cli)
        step.outcome = f"ours, {ours}" if ours else f"the official one, {find_official_language_host(cli)}"
    with reporter.step("Docker engine") as step:
        provide_docker_engine(step)
    if tests:
        with reporter.step("Selenium's driver") as step:
            provide_selenium_driver(step)
        with reporter.step("Puppeteer") as step:
            provide_puppeteer(step)
        with reporter.step("PostgreSQL server for tests") as step:
            provide_postgresql(step)
        with reporter.step("S3 server for tests") as step:
            provide_versitygw(step)
        with reporter.step("SSH server for tests") as step:
            provide_sshd(step)
    with reporter.step("Browser image") as step:
        from provisioner.browser_image import ensure_browser_image  # needs the Docker library: slow to import

        step.outcome = ensure_browser_image(on_progress=step.on_progress)
    return reporter.results
