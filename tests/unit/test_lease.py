"""Who leads: one at a time, not longer than the lease, and nothing that a leader started outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from provisioner import lease as module
from provisioner.errors import LeaseLost, LedgerUnavailable
from provisioner.lease import LEASE, Lease, is_gone, leader_of, make_holder, name_of
from provisioner.ledger import Ledger
from provisioner.watchdog import Watchdog, clock
from tests.support.watched import PATIENCE_S, wait_until
from tests.support.world import empty_ledger

LONG_S = 60.0


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = empty_ledger(ledger_location)
    yield ledger
    ledger.close()


@pytest.fixture
def file_ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = empty_ledger(tmp_path)
    yield ledger
    ledger.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def other_holder(ledger: Ledger, name: str = "elsewhere|1|m|2", *, duration_s: float = LONG_S) -> str:
    return ledger.leases.take(LEASE, holder=name, duration_s=duration_s).holder


def expires_at(ledger: Ledger) -> float:
    row = ledger.leases.get(LEASE)
    assert row is not None
    return row.expires_at


def test_whoever_gets_it_leads_until_it_gives_it_back(ledger: Ledger) -> None:
    lease = Lease(ledger, duration_s=LONG_S)
    assert not lease.is_held
    with pytest.raises(LeaseLost):
        lease.check()
    assert lease.seek()
    lease.check()
    assert leader_of(ledger) == lease.name == f"{socket.gethostname()}:{os.getpid()}"
    lease.close()
    assert not lease.is_held
    assert leader_of(ledger) is None


def test_whoever_seeks_it_gets_it_once_the_other_s_is_over(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWALS", LONG_S / 0.1)
    other = other_holder(ledger)
    lease = Lease(ledger, duration_s=LONG_S)
    assert not lease.seek()
    assert leader_of(ledger) == "elsewhere:1"
    other_holder(ledger, other, duration_s=0.0)
    wait_until(lambda: lease.is_held, what="the lease")
    for _ in range(3):
        end = expires_at(ledger)
        wait_until(lambda e=end: expires_at(ledger) > e, what="it is renewed, again and again")
    assert lease.is_held
    lease.close()


def test_it_is_not_used_for_as_long_as_it_lasts(file_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was frozen for long finds it over, though the ledger's row may say otherwise."""
    lease = Lease(file_ledger, duration_s=LONG_S)
    assert lease.seek()
    now = clock()
    monkeypatch.setattr(module, "clock", lambda: now + LONG_S * 0.85)
    assert not lease.is_held
    with pytest.raises(LeaseLost):
        lease.check()
    lease._ask()  # renewing it does not bring it back behind the back of who has to stop first
    assert not lease.is_held
    assert not lease.is_sought
    assert lease.seek()
    lease.close()


def test_a_ledger_that_is_away_ends_it_in_time(file_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        asked.set()
        answers.wait()
        raise LedgerUnavailable("away")

    monkeypatch.setattr(module, "RENEWALS", LONG_S / 0.1)
    lease = Lease(file_ledger, duration_s=LONG_S)
    assert lease.seek()
    with monkeypatch.context() as away:
        away.setattr(file_ledger.leases, "take", hang)
        assert asked.wait(PATIENCE_S)
        assert lease.is_held
        now = clock()
        away.setattr(module, "clock", lambda: now + LONG_S)
        assert not lease.is_held
        answers.set()
    lease.close()


def test_the_lease_of_a_process_of_this_machine_that_is_gone_is_taken_at_once(
    file_ledger: Ledger, sleeper: subprocess.Popen[bytes]
) -> None:
    mine = make_holder().split("|")
    theirs = "|".join([mine[0], str(sleeper.pid), mine[2], module._began(sleeper.pid)])
    other_holder(file_ledger, theirs)
    lease = Lease(file_ledger, duration_s=LONG_S)
    assert not is_gone(theirs)
    assert not lease.seek()
    sleeper.kill()  # not waited for: what is left of it in the list of processes does nothing any more
    wait_until(lambda: is_gone(theirs), what="its end is seen")
    assert lease.seek()
    lease.close()


def test_nothing_is_known_of_a_process_elsewhere() -> None:
    host, _, machine, began = make_holder().split("|")
    assert not is_gone(make_holder())
    assert not is_gone(f"{host}|{2**22 + 1}|another|1")
    assert is_gone(f"{host}|{2**22 + 1}|{machine}|1")
    assert is_gone(f"{host}|{os.getpid()}|{machine}|{int(began) + 1}")  # another process has its number now
    assert not is_gone("whatever")
    assert name_of(make_holder()) == f"{host}:{os.getpid()}"


def test_only_a_cli_of_an_earlier_leader_was_run_before(ledger: Ledger) -> None:
    first, second = Lease(ledger, duration_s=LONG_S), Lease(ledger, duration_s=LONG_S)
    first._holder, second._holder = "a|1|m|1", "b|2|m|1"
    host = socket.gethostname()
    assert first.seek()
    with first.running(2**22 + 1, noted=True):
        assert not first.was_run_before(host=host, pid=2**22 + 1)
    with pytest.raises(LeaseLost):
        second.was_run_before(host=host, pid=2**22 + 1)  # who does not lead can't say so
    first.resign()
    assert second.seek()
    assert second.was_run_before(host=host, pid=2**22 + 1)
    assert not second.was_run_before(host=host, pid=5)  # an operator's
    assert not second.was_run_before(host="elsewhere", pid=2**22 + 1)
    first.close()
    second.close()


def test_of_several_one_leads_at_any_time(ledger: Ledger) -> None:
    leases = [Lease(ledger, duration_s=2.0) for _ in range(3)]
    for number, lease in enumerate(leases):
        lease._holder = f"host{number}|{number}|m|1"
        lease.seek()
    seen: set[str] = set()
    most = 0
    deadline = time.monotonic() + PATIENCE_S
    while len(seen) < 3:
        leading = [lease for lease in leases if lease.is_held]
        leading = [lease for lease in leading if lease.is_held]  # still, though the next one had been seen with it
        most = max(most, len(leading))
        for lease in leading:
            if lease.name not in seen:
                seen.add(lease.name)
                lease.resign()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert most == 1
    for lease in leases:
        lease.close()


class TestWatchdog:
    def test_it_ends_what_outlives_the_lease(self, sleeper: subprocess.Popen[bytes]) -> None:
        watchdog = Watchdog()
        watchdog.extend(clock() + LONG_S)
        watchdog.watch(sleeper.pid)
        watchdog.extend(clock() + 0.5)
        assert sleeper.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        watchdog.close()

    def test_it_ends_at_once_what_is_begun_too_late(self, sleeper: subprocess.Popen[bytes]) -> None:
        watchdog = Watchdog()
        watchdog.extend(clock() - 1)
        watchdog.watch(sleeper.pid)
        assert sleeper.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        watchdog.close()

    def test_it_leaves_alone_what_it_was_told_to_forget(self, sleeper: subprocess.Popen[bytes]) -> None:
        watchdog = Watchdog()
        watchdog.extend(clock() + LONG_S)
        watchdog.watch(sleeper.pid)
        watchdog.watch(None)
        watchdog.extend(clock())
        watchdog.close()  # ends whatever is still watched
        assert sleeper.poll() is None

    def test_it_acts_for_a_process_that_is_frozen_or_gone(self, sleeper: subprocess.Popen[bytes]) -> None:
        script = (
            "import sys, time\nfrom provisioner.watchdog import Watchdog, clock\nw = Watchdog()\n"
            "w.extend(clock() + float(sys.argv[1]))\nw.watch(int(sys.argv[2]))\n"
            "print('ready', flush=True)\ntime.sleep(99)"
        )
        for duration_s, how in (("1.5", signal.SIGSTOP), ("60", signal.SIGKILL)):
            victim = sleeper if how is signal.SIGSTOP else subprocess.Popen(["sleep", "300"])
            owner = subprocess.Popen(
                [sys.executable, "-c", script, duration_s, str(victim.pid)], stdout=subprocess.PIPE
            )
            assert owner.stdout is not None
            owner.stdout.readline()
            owner.send_signal(how)
            assert victim.wait(timeout=PATIENCE_S) == -signal.SIGKILL
            owner.kill()
            owner.wait()
            owner.stdout.close()

    def test_one_that_was_killed_is_replaced(self, sleeper: subprocess.Popen[bytes]) -> None:
        watchdog = Watchdog()
        watchdog.extend(clock() + LONG_S)
        assert watchdog._process is not None
        watchdog._process.kill()
        watchdog._process.wait()
        watchdog.watch(sleeper.pid)
        watchdog.extend(clock())
        assert sleeper.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        watchdog.close()


def test_threads_end_with_the_lease(file_ledger: Ledger) -> None:
    lease = Lease(file_ledger, duration_s=LONG_S)
    lease.seek()
    lease.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "machineuse-lease"]
