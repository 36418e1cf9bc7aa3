"""schemathesis against the live service, with real browsers behind it: 0 failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import StartService
from tests.support.conformance import run_schemathesis


@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing(start_service: StartService, tmp_path: Path) -> None:
    # Little room and short patience: what is checked is the answers, not how many browsers fit on this machine.
    service = start_service(memory_overcommit=0.2, create_attempts=1, ready_timeout_s=10)
    done = run_schemathesis(
        f"http://127.0.0.1:{service.port}",
        directory=tmp_path,
        max_examples=5,
        timeout_s=850,
        arguments=("--no-shrink",),
    )
    assert done.returncode == 0, done.stdout + done.stderr + service.log()[-4000:]
