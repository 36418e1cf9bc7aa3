"""Runs Pulumi updates: the only user of the CLI and of `pulumi.automation`.

One update is one CLI process. The program is not run by a language host but here, by a language server that lives as
long as the engine object, so nothing has to start but the CLI itself; the CLI finds our plugins attached to this
process (`PULUMI_DEBUG_PROVIDERS`). What happened is read from the event log that the CLI writes.

State is saved once, at the end of an update. An update that is killed leaves its lock and an unchanged state: the next
one removes the lock of a process that is gone, and the plugins adopt what was made already.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import psutil
import structlog
from pulumi.automation._server import LanguageServer
from pulumi.runtime.proto import language_pb2, language_pb2_grpc

from provisioner.errors import EngineError, StackLocked
from provisioner.settings import Settings
from provisioner.toolchain.environment import environment
from provisioner.toolchain.pulumi_cli import require_pulumi
from stacks.names import PROJECT

log = structlog.get_logger(__name__)

Program = Callable[[], Awaitable[None]]

LOCK_WAIT_S = 120.0
"""How long an update waits for somebody else's (an operator's `pulumi up`) to end."""

CLOCK_SLACK_S = 5.0
"""How exactly the time of a lock and that of a process's start can be compared."""

_LOCKED = "the stack is currently locked"
_UPDATE_FAILED = "update failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What became of each resource in one update."""

    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """URN → outputs, for every resource that was created, changed or found unchanged."""
    deleted: frozenset[str] = frozenset()
    errors: dict[str, str] = field(default_factory=dict)
    """URN → what the plugin or engine said of its failure; "" holds what belongs to no resource."""
    changed: int = 0
    duration_s: float = 0.0


class Engine:
    """One stack's engine. One update at a time; callers queue."""

    def __init__(self, settings: Settings, *, debug_providers: str) -> None:
        self._settings = settings
        self._stack = settings.cluster
        self._cli = require_pulumi()
        self._lock = threading.Lock()
        self._environment = {
            **os.environ,
            **environment(settings),
            "PULUMI_DEBUG_PROVIDERS": debug_providers,
            "PULUMI_SKIP_CHECKPOINTS": "true",
            "PULUMI_EXPERIMENTAL": "true",  # which the setting above needs
            "PULUMI_DEBUG_COMMANDS": "true",  # which --event-log and --client need
            "GOGC": "400",  # the CLI lives for a second: memory for time
        }
        self._languages = _Languages(_no_program)
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4, thread_name_prefix="language"))
        language_pb2_grpc.add_LanguageRuntimeServicer_to_server(self._languages, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """Stop the language server, and the CLI if one still runs."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
        self._server.stop(grace=0).wait()

    def ensure_stack(self) -> bool:
        """Make passphrase, state and stack where they are missing; return whether the stack is new. Idempotent."""
        settings = self._settings
        for directory in (settings.data_dir, settings.state_dir, settings.pulumi_home):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not settings.passphrase_path.exists():
            # Written aside and renamed: a crash never leaves half a passphrase.
            draft = settings.passphrase_path.with_suffix(".new")
            draft.touch(mode=0o600)
            draft.write_text(secrets.token_urlsafe(32))
            draft.rename(settings.passphrase_path)
        if self._state_file.exists():
            return False
        done = self._call(["stack", "init", "--stack", self._stack, "--secrets-provider", "passphrase", "--no-select"])
        if done.returncode != 0 and "already exists" not in done.stderr:
            raise EngineError("The Pulumi stack could not be made.", detail=done.stderr.strip())
        self._call(["stack", "select", self._stack])  # so that a plain `pulumi preview` in the checkout finds it
        return True

    @property
    def _state_file(self) -> Path:
        return self._settings.state_dir / ".pulumi" / "stacks" / PROJECT / f"{self._stack}.json"

    def update(self, program: Program, *, targets: Sequence[str] = (), refresh: bool = False) -> UpdateResult:
        """Run one update of the stack with `program`, restricted to the `targets` where there are any.

        A resource's failure is in the result and stops no other resource. Raises StackLocked when somebody else's
        update does not end in time, and EngineError when there was no update at all.
        """
        with self._lock:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    return self._update(program, targets=targets, refresh=refresh)
                except StackLocked:
                    if self._break_dead_lock():
                        continue
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.25)

    def _update(self, program: Program, *, targets: Sequence[str], refresh: bool) -> UpdateResult:
        started = time.monotonic()
        self._languages.program = program
        with tempfile.TemporaryDirectory(prefix="machineuse-update-") as directory:
            events = Path(directory) / "events.json"
            arguments = ["up", "--yes", "--skip-preview", "--stack", self._stack]
            arguments += [f"--client=127.0.0.1:{self._port}", "--exec-kind", "auto.inline"]
            arguments += ["--continue-on-error", "--suppress-progress", "--event-log", str(events)]
            if refresh:
                arguments.append("--refresh")
            for urn in targets:
                arguments += ["--target", urn]
            done = self._call(arguments)
            result = read_events(events, duration_s=time.monotonic() - started)
        if _LOCKED in done.stderr:
            raise StackLocked(
                "Somebody else is updating the stack.",
                detail=done.stderr.strip(),
                resolution="If nobody is, remove the lock with `machineuse pulumi -- cancel`.",
            )
        # What goes wrong outside of the update itself is on stderr: that the state could not be saved, above all.
        unsaved = done.returncode < 0 or any(line.startswith("error:") for line in done.stderr.splitlines())
        if result is None or (done.returncode != 0 and (unsaved or not result.errors)):
            raise EngineError(
                "The Pulumi engine failed.",
                detail=f"exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}",
            )
        log.debug(
            "update done",
            targets=len(targets),
            changed=result.changed,
            errors=len(result.errors),
            duration_s=round(result.duration_s, 3),
        )
        return result

    def _call(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run the CLI to its end. It dies with us: a CLI without its plugins could only do harm."""
        die_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*die_with_us, str(self._cli), *arguments, "--non-interactive", "--color", "never"]
        self._process = subprocess.Popen(
            command,
            cwd=self._settings.project_dir,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; we let a running update end
        )
        out, err = self._process.communicate()
        return subprocess.CompletedProcess(command, self._process.returncode, out, err)

    def _break_dead_lock(self) -> bool:
        """Remove the locks that are abandoned; return whether there were any."""
        broken = False
        for path in (self._settings.state_dir / ".pulumi" / "locks").rglob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                owner = json.loads(path.read_text())
                if is_abandoned(owner):
                    path.unlink(missing_ok=True)
                    log.warning("removed the lock of an update that was killed", pid=owner["pid"])
                    broken = True
        return broken


class _Languages(LanguageServer):
    """A language server that takes it quietly when the CLI ends before the program does: a failed resource ends it."""

    def Run(self, request: Any, context: Any) -> Any:
        try:
            return super().Run(request, context)  # type: ignore[no-untyped-call]
        except grpc.RpcError:  # it tried to tell the CLI
            return language_pb2.RunResponse()


async def _no_program() -> None:
    raise EngineError("No program was set.")


def is_abandoned(lock: Mapping[str, Any]) -> bool:
    """Say whether a lock, as the CLI writes it, was taken by a process of this machine that is gone."""
    if lock["hostname"] != socket.gethostname():
        return False
    taken_at = datetime.fromisoformat(lock["timestamp"]).timestamp()
    try:
        # Numbers are given again, soon after a reboot above all: whoever began later did not take the lock.
        return psutil.Process(int(lock["pid"])).create_time() > taken_at + CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return True


def read_events(path: Path, *, duration_s: float) -> UpdateResult | None:
    """Return what the event log tells; None when there was no update, or it was cut off.

    The state is saved at an update's very end: of one that was cut off, what the log tells as done is not in the state.
    """
    if not path.exists():
        return None
    complete = False
    outputs: dict[str, dict[str, Any]] = {}
    deleted: set[str] = set()
    errors: dict[str, str] = {}
    changed = 0
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            return None
        complete |= "summaryEvent" in event
        if (done := event.get("resOutputsEvent")) is not None:
            step = done["metadata"]
            if step["op"] in ("delete", "delete-replaced", "discard"):
                deleted.add(step["urn"])
            else:
                outputs[step["urn"]] = (step.get("new") or {}).get("outputs") or {}
            changed += step["op"] != "same"
        elif (failed := event.get("resOpFailedEvent")) is not None:
            errors.setdefault(failed["metadata"]["urn"], "")
        elif (said := event.get("diagnosticEvent")) is not None and said.get("severity") == "error":
            urn = said.get("urn", "")
            words = said["message"].strip()
            errors[urn] = f"{errors[urn]}\n{words}" if errors.get(urn) else words
    if not complete:
        return None
    if errors.get("") == _UPDATE_FAILED and len(errors) > 1:
        del errors[""]  # said once more, of no resource
    return UpdateResult(
        outputs=outputs, deleted=frozenset(deleted), errors=errors, changed=changed, duration_s=duration_s
    )
