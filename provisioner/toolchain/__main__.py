"""`python3 -m provisioner.toolchain setup [--tests]`: what the Makefile calls, with any Python 3.11 there is.

Started outside the checkout's virtual environment, it makes that first and goes on inside it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from provisioner.errors import MachineuseError, SetupError
from provisioner.toolchain.progress import Reporter
from provisioner.toolchain.setup import PROJECT_DIR, ensure
from provisioner.toolchain.venv import is_current, provide_venv, venv_python

_DETAIL_LINES = 15
_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Set up; return the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m provisioner.toolchain", description="Set up what is missing.")
    parser.add_argument("command", choices=["setup"])
    parser.add_argument("--tests", action="store_true", help="also what only the tests need")
    options = parser.parse_args(arguments)
    try:
        _enter_venv(arguments)
        _quiet_log()
        ensure(Reporter(), project_dir=PROJECT_DIR, tests=options.tests)
    except MachineuseError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)  # noqa: T201 - a command's own words
        return _INTERRUPTED
    return 0


def _enter_venv(arguments: list[str]) -> None:
    """Make the virtual environment current and go on in its interpreter, unless that is where we are."""
    python = venv_python(PROJECT_DIR)
    inside = sys.prefix == str(python.parent.parent)
    if inside and is_current(PROJECT_DIR):
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever `python3` is runs this
        raise SetupError(
            f"Machineuse needs Python 3.11 or newer; {sys.executable} is older.",
            resolution="Name another one: make PYTHON=python3.11 run",
        )
    with Reporter().step("Python packages") as step:
        provide_venv(step, project_dir=PROJECT_DIR)
    sys.stdout.flush()
    os.execv(python, [str(python), "-m", "provisioner.toolchain", *arguments])


def _quiet_log() -> None:
    """Keep the parts that the set-up calls from logging between its lines: the steps say what matters to a person."""
    import structlog  # there now that we are inside the virtual environment

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def _complain(error: MachineuseError) -> None:
    """Print the error as one message: what, the end of what the failed command said, what to do."""
    lines = [f"error: {error.message}"]
    if error.detail:
        lines += [f"  | {line}" for line in error.detail.splitlines()[-_DETAIL_LINES:]]
    if error.resolution:
        lines.append(error.resolution)
    print("\n".join(lines), file=sys.stderr)  # noqa: T201 - a command's own words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
