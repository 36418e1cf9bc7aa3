"""Runs schemathesis against a service, as anybody could from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent.parent / "schemathesis.toml"


def run_schemathesis(
    url: str, *, directory: Path, max_examples: int, timeout_s: float, arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run every check on every operation; return what became of it. The same requests are sent every time."""
    return subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"),
            *("--config-file", str(CONFIG), "--no-color"),
            *("run", f"{url}/openapi.json"),
            *("--max-examples", str(max_examples), "--seed", "1", "--generation-deterministic"),
            *arguments,
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
