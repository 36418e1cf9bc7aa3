"""Says which of several services on one ledger leads: the one that may change the nodes.

The lease is a row of the ledger with a time at which it is over, by the ledger's clock. Whoever leads renews it five
times as often as need be. It counts its own time from the moment before it asked, and ends it a little earlier: it has
stopped before anybody else can begin. A leader that is frozen can't look at a clock; what it started, the CLI, is ended
by its watchdog, and it looks at its lease before it starts the next.

A clean stop gives the lease back, and the lease of a process of this machine that is gone is taken at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from provisioner.errors import LeaseLost, LedgerUnavailable
from provisioner.ledger import Ledger
from provisioner.watchdog import Watchdog, clock

log = structlog.get_logger(__name__)

LEASE = "leader"
RENEWALS = 5
"""How often a lease is renewed while it lasts."""
RESERVE = 0.2
"""The part of its lease that a leader doesn't use: clocks go differently, and to stop takes a moment."""
RUNS = "cli_runs"
"""The fact that says which CLI each of the latest leaders started last, so that its lock can be told from others."""
KEPT_RUNS = 8


class Lease:
    """This process's part in the lease; `seek` it, and look whether it `is_held`."""

    def __init__(self, ledger: Ledger, *, duration_s: float) -> None:
        self._ledger = ledger
        self._duration_s = duration_s
        self._holder = make_holder()
        self._watchdog = Watchdog()
        self._asking = threading.Lock()
        self._lock = threading.Lock()
        self._seeking = False
        self._held = False
        self._until = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machineuse-lease", daemon=True)
        self.changed = threading.Event()
        """Set when the lease was won or lost."""

    @property
    def name(self) -> str:
        """Return what this process is called: host and process id."""
        return name_of(self._holder)

    @property
    def is_held(self) -> bool:
        """Say whether this process leads, at this moment."""
        with self._lock:
            return self._held and clock() < self._until

    @property
    def is_sought(self) -> bool:
        """Say whether this process asks for the lease again and again until it has it."""
        with self._lock:
            return self._seeking

    def check(self) -> None:
        """Raise LeaseLost unless this process leads."""
        if not self.is_held:
            raise LeaseLost("This process does not lead any more.")

    def seek(self) -> bool:
        """Want the lease: ask for it now, and again and again until it is won. Return whether it is won already.

        Raises LedgerUnavailable.
        """
        with self._lock:
            self._seeking, self._held = True, False
        self._ask()
        if not self._thread.is_alive():
            self._thread.start()
        return self.is_held

    def resign(self) -> None:
        """Give the lease back and don't seek it; does nothing where it can't be reached: it ends by itself."""
        with self._asking:
            with self._lock:
                self._seeking = self._held = False
            with contextlib.suppress(LedgerUnavailable):
                self._ledger.leases.release(LEASE, holder=self._holder)

    def close(self) -> None:
        """Give the lease back and end."""
        self._stopping.set()
        self.resign()
        if self._thread.is_alive():
            self._thread.join(self._duration_s)
        self._watchdog.close()

    @contextmanager
    def running(self, pid: int, *, noted: bool) -> Iterator[None]:
        """Have the CLI with this process id ended with the lease; `noted` where its lock may be seen on other hosts."""
        self._watchdog.watch(pid)
        try:
            if noted:
                self._note_run(pid)
            yield
        finally:
            self._watchdog.watch(None)

    def was_run_before(self, *, host: str, pid: int) -> bool:
        """Say whether this is a CLI of a leader whose lease is over: its watchdog has ended it then."""
        self.check()
        return any(
            holder != self._holder and run == [host, pid]
            for holder, run in json.loads(self._ledger.fact(RUNS) or "{}").items()
        )

    def _note_run(self, pid: int) -> None:
        runs = json.loads(self._ledger.fact(RUNS) or "{}")
        runs.pop(self._holder, None)
        runs[self._holder] = [socket.gethostname(), pid]
        self._ledger.write_fact(RUNS, json.dumps(dict(list(runs.items())[-KEPT_RUNS:])))

    def _run(self) -> None:
        away = False
        while not self._stopping.wait(self._duration_s / RENEWALS):
            try:
                self._ask()
            except LedgerUnavailable as error:
                if not away:
                    log.warning("lease not renewed", error=error.message, detail=error.detail)
                away = True
            except Exception as error:  # the outermost frame of the thread: it must survive anything
                log.error("lease not renewed", error=str(error), exc_info=error)
            else:
                away = False

    def _ask(self) -> None:
        with self._asking:
            with self._lock:
                if self._held and clock() >= self._until:
                    self._held = False
                    self.changed.set()
                if not (self._held or self._seeking):
                    return
            began = clock()
            lease = self._ledger.leases.take(LEASE, holder=self._holder, duration_s=self._duration_s)
            if lease.holder != self._holder and is_gone(lease.holder):
                lease = self._ledger.leases.take(
                    LEASE, holder=self._holder, duration_s=self._duration_s, instead_of=lease.holder
                )
            until = began + self._duration_s * (1 - RESERVE)
            with self._lock:
                held = lease.holder == self._holder and clock() < until
                if held != self._held:
                    self.changed.set()
                self._held, self._seeking = held, self._seeking and not held
                self._until = until if held else 0.0
            if held:
                self._watchdog.extend(until)


def leader_of(ledger: Ledger) -> str | None:
    """Return who leads, by host and process id; None when nobody does."""
    lease = ledger.leases.get(LEASE)
    return None if lease is None or lease.is_over else name_of(lease.holder)


def make_holder() -> str:
    """Return what this process is called in the lease: host, process id, machine, and when it began."""
    return f"{socket.gethostname()[:60]}|{os.getpid()}|{_machine()}|{_began(os.getpid())}"


def name_of(holder: str) -> str:
    """Return the part of a holder that tells people who it is."""
    return ":".join(holder.split("|")[:2])


def is_gone(holder: str) -> bool:
    """Say whether a holder was a process of this machine, and is there no more. False where that can't be known."""
    parts = holder.split("|")
    if len(parts) != 4 or not parts[3] or parts[2] != _machine():
        return False
    return _began(int(parts[1])) != parts[3]


def _machine() -> str:
    """Return what only processes have in common that can see each other: this boot, and this set of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot}{Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _began(pid: int) -> str:
    """Return when a process began, in ticks since the boot; "" when there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
