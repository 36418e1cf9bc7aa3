"""Leases in the ledger, on both kinds of database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from provisioner.ledger import Ledger
from tests.support.watched import wait_until
from tests.support.world import empty_ledger


@pytest.fixture
def ledger(ledger_location: Path | SecretStr) -> Iterator[Ledger]:
    ledger = empty_ledger(ledger_location)
    yield ledger
    ledger.close()


def take(ledger: Ledger, holder: str, *, duration_s: float = 60, instead_of: str | None = None) -> str:
    return ledger.leases.take("test", holder=holder, duration_s=duration_s, instead_of=instead_of).holder


def is_over(ledger: Ledger) -> bool:
    lease = ledger.leases.get("test")
    assert lease is not None
    return lease.is_over


def test_one_holds_it_until_it_is_over(ledger: Ledger) -> None:
    assert ledger.leases.get("test") is None
    assert take(ledger, "a") == "a"
    assert not is_over(ledger)
    assert take(ledger, "b") == "a"
    assert take(ledger, "a", duration_s=0.01) == "a"
    wait_until(lambda: is_over(ledger), what="it is over")
    assert take(ledger, "b") == "b"
    assert take(ledger, "a") == "b"


def test_whoever_renews_in_time_keeps_it(ledger: Ledger) -> None:
    first = ledger.leases.take("test", holder="a", duration_s=60)
    again = ledger.leases.take("test", holder="a", duration_s=120)
    assert again.taken_at == first.taken_at
    assert again.expires_at > first.expires_at + 50


def test_only_the_holder_gives_it_back(ledger: Ledger) -> None:
    take(ledger, "a")
    ledger.leases.release("test", holder="b")
    assert take(ledger, "b") == "a"
    ledger.leases.release("test", holder="a")
    assert take(ledger, "b") == "b"


def test_it_is_taken_from_one_that_is_dead_only_if_that_one_has_it(ledger: Ledger) -> None:
    take(ledger, "a")
    assert take(ledger, "c", instead_of="b") == "a"
    assert take(ledger, "b", instead_of="a") == "b"


def test_of_many_at_once_one_gets_it(ledger: Ledger) -> None:
    got: dict[str, str] = {}

    def run(name: str) -> None:
        got[name] = take(ledger, name)

    threads = [threading.Thread(target=run, args=(f"h{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(got.values())) == 1
