"""Commands in containers, as a test's way to write what must be kept and to look whether it was."""

from __future__ import annotations

from typing import Any


def execute(container: Any, *command: str, user: str = "") -> str:
    """Run a command in a container; it must succeed. Return what it prints."""
    code, output = container.exec_run(list(command), user=user)
    assert code == 0, f"{' '.join(command)} ended with {code}: {output.decode()}"
    return str(output.decode())
