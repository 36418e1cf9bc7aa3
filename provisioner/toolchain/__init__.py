"""What Machineuse needs on a machine, and how it gets there: `make run` and `make test` on a bare Debian 12 work.

In this order, each a step that does nothing when its thing is already there:

1. `venv`: the virtual environment with exactly the locked dependencies,
2. `pulumi_cli`: the Pulumi CLI (on PATH, in the cache, downloaded, or built with Go),
3. `language`: the Python language host, only where the official one is missing,
4. `docker_engine`: a Docker engine that answers,
5. `test_tools`, for tests only: what their clients need beyond Python packages,
6. the browser image.

Everything here runs on the standard library alone, because the first step runs before there are any dependencies.
"""

from __future__ import annotations

from provisioner.toolchain.docker_engine import find_docker_socket, provide_docker_engine
from provisioner.toolchain.environment import environment
from provisioner.toolchain.packages import can_install_packages, install_packages
from provisioner.toolchain.progress import Reporter, Step, StepResult
from provisioner.toolchain.pulumi_cli import PULUMI_VERSION, cache_dir, find_pulumi, require_pulumi
from provisioner.toolchain.setup import ensure
from provisioner.toolchain.test_tools import puppeteer_dir

__all__ = [
    "PULUMI_VERSION",
    "Reporter",
    "Step",
    "StepResult",
    "cache_dir",
    "can_install_packages",
    "ensure",
    "environment",
    "find_docker_socket",
    "find_pulumi",
    "install_packages",
    "provide_docker_engine",
    "puppeteer_dir",
    "require_pulumi",
]
