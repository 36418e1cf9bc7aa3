"""Whose lock on the stack's state may be removed."""

from __future__ import annotations

import dataclasses
import os
import socket
import time

from provisioner.stack_locks import StackLock, is_abandoned, read_locks

SAID = """error: the stack is currently locked by 2 lock(s). Either wait for the other process(es) to end or delete \
the lock file with `pulumi cancel`.
  file:///a%20b/.pulumi/locks/o/m/l/0f.json: created by root@here (pid 12) at 2026-01-02T03:04:05Z
  postgres://****:****@db/x/.pulumi/locks/o/m/l/1.json?sslmode=disable: created by a b@there (pid 3) at \
2026-01-02T03:04:05+01:00
"""
MINE = StackLock(url="file:///x", host=socket.gethostname(), pid=os.getpid(), taken_at=time.time())


def test_the_locks_are_read_from_what_the_cli_says() -> None:
    first, second = read_locks(SAID)
    assert (first.host, first.pid) == ("here", 12)
    assert str(first.path) == "/a b/.pulumi/locks/o/m/l/0f.json"
    assert (second.host, second.pid) == ("there", 3)
    assert first.taken_at - second.taken_at == 3600
    assert read_locks("error: no") == []


def test_only_a_lock_whose_owner_is_gone_is_abandoned() -> None:
    gone = dataclasses.replace(MINE, pid=2**22 + 1)
    assert not is_abandoned(MINE)
    assert is_abandoned(gone)
    assert not is_abandoned(dataclasses.replace(gone, host="another-machine"))


def test_a_process_that_began_after_the_lock_was_taken_is_not_its_owner() -> None:
    # The number was given to another process since, after a reboot say.
    assert is_abandoned(dataclasses.replace(MINE, taken_at=time.time() - 86400))
