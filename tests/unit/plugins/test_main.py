"""A plugin as a process of its own, as the Pulumi CLI starts it for a plain `pulumi up`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from provisioner.plugins.__main__ import PACKAGES

_PROGRAM = """
import os
import sys
from provisioner.plugins.__main__ import main

class Loaded:
    def __init__(self):
        self.itself = self
    def __del__(self, tell=os.write):
        tell(1, b"collected\\n")

loaded = Loaded()
sys.exit(main([sys.argv[1], "127.0.0.1:1"]))
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_ends_with_its_engine_and_collects_nothing_before(tmp_path: Path, package: str) -> None:
    # Pulumi 3.256 ends the plugins one by one, with five seconds for all of them: those of many nodes must be quick.
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, package],
        stdin=subprocess.DEVNULL,  # which ends at once, as it does with an engine that was killed
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "MACHINEUSE_DATA_DIR": str(tmp_path)},
    )
    port, *more = ended.stdout.splitlines()
    assert port.isdigit()
    assert more == []
