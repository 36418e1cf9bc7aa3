"""Which images an engine can run, as far as it and they say."""

from __future__ import annotations

from typing import Any, cast

import pytest

from provisioner.docker_hosts.hosts import DockerHost
from provisioner.docker_hosts.images import ImageInfo, can_run


class FakeHost:
    """An engine that says what its machine is."""

    def __init__(self, **version: str) -> None:
        self._version = version

    def version(self) -> dict[str, Any]:
        return dict(self._version)


@pytest.mark.parametrize(
    ("image", "engine", "emulated", "runs"),
    [
        ("linux/amd64", ("linux", "amd64"), None, True),
        ("linux/amd64", ("linux", "x86_64"), None, True),
        ("linux/arm64", ("linux", "amd64"), None, False),
        ("linux/amd64", ("linux", "arm64"), None, False),
        ("linux/amd64", ("linux", "arm64"), "amd64", True),
        ("linux/arm64", ("linux", "arm64"), "amd64", True),
        ("linux/riscv64", ("linux", "arm64"), "amd64", False),
        ("linux/386", ("linux", "amd64"), None, True),
        ("linux/arm", ("linux", "arm64"), None, True),
        ("linux/arm64", ("linux", "arm"), None, False),
        ("windows/amd64", ("linux", "amd64"), None, False),
        ("", ("linux", "amd64"), None, True),
        ("linux/arm64", ("", ""), None, True),
    ],
)
def test_an_engine_runs_its_own_architecture_what_that_includes_and_what_it_is_said_to_emulate(
    image: str, engine: tuple[str, str], emulated: str | None, runs: bool
) -> None:
    host = cast("DockerHost", FakeHost(Os=engine[0], Arch=engine[1]))
    assert can_run(host, ImageInfo(id="sha256:1", platform=image), emulated=emulated) is runs
