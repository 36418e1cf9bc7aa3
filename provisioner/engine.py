"""Runs Pulumi updates: the only user of the CLI and of `pulumi.automation`.

One update is one CLI process. The program is not run by a language host but here, by a language server that lives as
long as the engine object, so nothing has to start but the CLI itself; the CLI finds our plugins attached to this
process (`PULUMI_DEBUG_PROVIDERS`). What happened is read from the event log that the CLI writes.

State is saved once, at the end of an update. An update that is killed leaves its lock and an unchanged state: the next
one removes the lock of a process that is gone, and the plugins adopt what was made already. Nothing is started without
the lease, and an update that outlives it is killed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from pulumi.automation._server import LanguageServer
from pulumi.runtime.proto import language_pb2, language_pb2_grpc

from provisioner.errors import EngineError, SettingsError, StackLocked
from provisioner.lease import Lease
from provisioner.settings import Settings
from provisioner.stack_locks import StackLock, is_abandoned, read_locks
from provisioner.toolchain.environment import environment
from provisioner.toolchain.pulumi_cli import require_pulumi
from stacks.names import PROJECT

log = structlog.get_logger(__name__)

Program = Callable[[], Awaitable[None]]

LOCK_WAIT_S = 120.0
"""How long an update waits for somebody else's (an operator's `pulumi up`) to end."""

_NOT_KNOWN = "PULUMI_ACCESS_TOKEN"
"""A URL that it knows nothing of, the CLI takes for that of a Pulumi Cloud."""
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

    def __init__(self, settings: Settings, *, debug_providers: str, lease: Lease) -> None:
        """Run updates with the plugins at `debug_providers`, as long as the `lease` is held."""
        self._settings = settings
        self._lease = lease
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
        self.abort()
        self._server.stop(grace=0).wait()

    def abort(self) -> None:
        """Kill the CLI if one runs: the lease is over."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    def ensure_stack(self) -> bool:
        """Make passphrase, state and stack where they are missing; return whether the stack is new. Idempotent.

        Raises EngineError, and SettingsError for a passphrase file that should be there and is not.
        """
        settings = self._settings
        directories = [settings.data_dir, settings.pulumi_home]
        for directory in [*directories, settings.state_dir] if settings.state_is_local else directories:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if settings.needs_passphrase:
            _ensure_passphrase(settings)
        if self._has_stack():
            return False
        done = self._call(
            [
                *("stack", "init", "--stack", self._stack),
                *("--secrets-provider", settings.secrets_provider, "--no-select"),
            ]
        )
        if done.returncode != 0 and "already exists" not in done.stderr:
            raise EngineError("The Pulumi stack could not be made.", detail=done.stderr.strip())
        self._call(["stack", "select", self._stack])  # so that a plain `pulumi preview` in the checkout finds it
        return True

    def _has_stack(self) -> bool:
        """Say whether there is a stack already. `stack init` would say so too, but not while the stack is locked."""
        if self._settings.state_is_local:
            return self._state_file.exists()
        done = self._call(["stack", "ls", "--json"])
        kind = self._settings.state_url.partition(":")[0]
        if done.returncode != 0 and kind != "https" and _NOT_KNOWN in done.stderr:
            raise EngineError(
                f"This Pulumi CLI can't keep state at {kind}:// URLs.",
                detail=f"{self._cli}: {done.stderr.strip()}",
                resolution="Choose another MACHINEUSE_STATE, or put a newer `pulumi` on PATH.",
            )
        if done.returncode != 0:
            raise EngineError(
                "The Pulumi state can't be read.",
                detail=done.stderr.strip(),
                resolution="Look at MACHINEUSE_STATE, and at the credentials that it needs.",
            )
        return any(stack["name"] == self._stack for stack in json.loads(done.stdout))

    @property
    def _state_file(self) -> Path:
        return self._settings.state_dir / ".pulumi" / "stacks" / PROJECT / f"{self._stack}.json"

    def update(
        self, program: Program, *, targets: Sequence[str] = (), excludes: Sequence[str] = (), refresh: bool = False
    ) -> UpdateResult:
        """Run one update of the stack with `program`, restricted to the `targets` where there are any.

        Where there are none, `excludes` are left as they are, whatever the program says: URNs, or patterns of them.
        A resource's failure is in the result and stops no other resource. Raises StackLocked when somebody else's
        update does not end in time, and EngineError when there was no update at all.
        """
        with self._lock:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    return self._update(program, targets=targets, excludes=excludes, refresh=refresh)
                except StackLocked as error:
                    if self._break_dead_locks(error.detail or ""):
                        continue
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.25)

    def _update(
        self, program: Program, *, targets: Sequence[str], excludes: Sequence[str], refresh: bool
    ) -> UpdateResult:
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
            for urn in excludes:
                arguments += ["--exclude", urn]
            done = self._call(arguments)
            self._lease.check()  # another one may lead by now: what became of this update is no news any more
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
        self._lease.check()
        process = self._process = subprocess.Popen(
            command,
            cwd=self._settings.project_dir,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; we let a running update end
        )
        try:
            with self._lease.running(process.pid, noted=not self._settings.state_is_local):
                out, err = process.communicate()
        except BaseException:  # the ledger could not be told of it: it must not go on, watched by nobody
            process.kill()
            process.communicate()
            raise
        out, err = _without_passwords(out), _without_passwords(err)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _break_dead_locks(self, said: str) -> bool:
        """Remove the locks that are abandoned; return whether there were any."""
        locks = read_locks(said)
        dead = [lock for lock in locks if self._is_dead(lock)]
        if self._settings.state_is_local:
            for lock in dead:
                lock.path.unlink(missing_ok=True)
        elif not dead or len(dead) < len(locks):
            return False  # the CLI can only remove all of them
        else:
            self._call(["cancel", "--yes", "--stack", self._stack])
        for lock in dead:
            log.warning("removed the lock of an update that was killed", host=lock.host, pid=lock.pid)
        return bool(dead)

    def _is_dead(self, lock: StackLock) -> bool:
        return is_abandoned(lock) or self._lease.was_run_before(host=lock.host, pid=lock.pid)


class _Languages(LanguageServer):
    """A language server that takes it quietly when the CLI ends before the program does: a failed resource ends it."""

    def Run(self, request: Any, context: Any) -> Any:
        try:
            return super().Run(request, context)  # type: ignore[no-untyped-call]
        except grpc.RpcError:  # it tried to tell the CLI
            return language_pb2.RunResponse()


def _ensure_passphrase(settings: Settings) -> None:
    path = settings.passphrase_path
    if path.exists():
        return
    if settings.passphrase_file is not None:
        raise SettingsError(
            f"MACHINEUSE_PASSPHRASE_FILE: there is no file {path}.",
            resolution="Put one line with a long secret there, the same one for all services on this cluster.",
        )
    # Written aside and renamed: a crash never leaves half a passphrase.
    draft = path.with_suffix(".new")
    draft.touch(mode=0o600)
    draft.write_text(secrets.token_urlsafe(32))
    draft.rename(path)


def _without_passwords(said: str) -> str:
    said = re.sub(r"(\w://[^/\s:@]*):[^/\s@]+@", r"\1:****@", said)
    return re.sub(r"([?&](?:ssl)?password=)[^&\s\"']+", r"\1****", said)


async def _no_program() -> None:
    raise EngineError("No program was set.")


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
