"""A Pulumi stack of its own, run by the real CLI with a program that is a function of the test."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from pulumi.automation._server import LanguageServer
from pulumi.runtime.proto import language_pb2_grpc

from provisioner.settings import Settings
from provisioner.toolchain.environment import environment

Program = Callable[[], None]
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the CLI, from its event log."""

    status: int
    text: str
    events: tuple[dict[str, Any], ...]

    @property
    def ops(self) -> dict[str, int]:
        """Return how many resources of the docker package got which operation, without the ones left as they are."""
        steps = [event["resourcePreEvent"]["metadata"] for event in self.events if "resourcePreEvent" in event]
        return dict(
            Counter(step["op"] for step in steps if step["type"].startswith("docker:") and step["op"] != "same")
        )

    @property
    def errors(self) -> str:
        """Return what was shown as errors."""
        said = [event["diagnosticEvent"] for event in self.events if "diagnosticEvent" in event]
        return "\n".join(one["message"] for one in said if one["severity"].startswith("error"))


class ProgramServer(LanguageServer):
    """The SDK's server, which also ends what is left of a program whose resource was refused.

    For each call that fails then the SDK stops its event loop; done while it ends the program's coroutines, that leaves
    them where they are, to complain when they are collected. Once is enough.
    """

    def Run(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._is_stopped = False
        return super().Run(request, context)  # type: ignore[no-untyped-call]

    def _exception_handler(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self._is_stopped:
            super()._exception_handler(loop, context)  # type: ignore[no-untyped-call]
        self._is_stopped = True


class InlineStack:
    """Set `program`, then `up` or `preview`. Plugins are attached (`debug_providers`) or started from a directory."""

    def __init__(
        self, directory: Path, *, debug_providers: str = "", plugin_directory: Path | None = None, name: str = "test"
    ) -> None:
        self.program: Program = lambda: None
        self.name = name
        settings = Settings(project_dir=directory, data_dir=directory / "data")
        self._directory = directory
        self._events = directory / "events.json"
        project: dict[str, Any] = {"name": "plugintest", "runtime": "python"}
        if plugin_directory is not None:
            project["plugins"] = {"providers": [{"name": "docker", "path": str(plugin_directory)}]}
        (directory / "Pulumi.yaml").write_text(json.dumps(project))
        self._environment = {
            **os.environ,
            **environment(settings),
            "PULUMI_CONFIG_PASSPHRASE": "test",
            "PULUMI_DEBUG_PROVIDERS": debug_providers,
            "PULUMI_DEBUG_COMMANDS": "true",
        }
        self._environment.pop("PULUMI_CONFIG_PASSPHRASE_FILE", None)
        settings.state_dir.mkdir(parents=True)
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        servicer = ProgramServer(lambda: self.program())
        language_pb2_grpc.add_LanguageRuntimeServicer_to_server(servicer, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self._cli("stack", "init", name)

    def close(self) -> None:
        """Stop the language server."""
        self._server.stop(0)

    def up(self, *arguments: str) -> Run:
        """Run `pulumi up`."""
        return self._run("up", "--yes", "--skip-preview", *arguments)

    def preview(self, *arguments: str) -> Run:
        """Run `pulumi preview`."""
        return self._run("preview", *arguments)

    def state(self) -> list[dict[str, Any]]:
        """Return the resources of the docker package in the stack's state."""
        exported = json.loads(self._cli("stack", "export", "--stack", self.name).stdout)
        resources = exported["deployment"].get("resources") or []
        return [one for one in resources if one["type"].startswith("docker:")]

    def forget(self) -> None:
        """Forget all resources, as if the run that made them had been killed before it could save its state."""
        exported = json.loads(self._cli("stack", "export", "--stack", self.name).stdout)
        exported["deployment"]["resources"] = []
        path = self._directory / "empty.json"
        path.write_text(json.dumps(exported))
        self._cli("stack", "import", "--stack", self.name, "--file", str(path))

    def _run(self, command: str, *arguments: str) -> Run:
        self._events.unlink(missing_ok=True)
        done = self._cli(
            command,
            f"--client=127.0.0.1:{self._port}",
            "--exec-kind",
            "auto.inline",
            "--stack",
            self.name,
            "--event-log",
            str(self._events),
            *arguments,
            check=False,
        )
        lines = self._events.read_text().splitlines() if self._events.exists() else []
        return Run(
            status=done.returncode, text=done.stdout + done.stderr, events=tuple(json.loads(line) for line in lines)
        )

    def _cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["pulumi", *arguments, "--non-interactive", "--color", "never"],
            cwd=self._directory,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
