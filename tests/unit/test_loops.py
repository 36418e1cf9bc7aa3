"""The loop that runs everything in the background."""

from __future__ import annotations

import threading

from provisioner.errors import DockerError
from provisioner.loops import Loop


def test_a_loop_survives_whatever_its_step_raises() -> None:
    errors: list[Exception] = [DockerError("refused"), ZeroDivisionError("unexpected")]
    done = threading.Event()

    def step() -> None:
        if errors:
            raise errors.pop()
        done.set()

    loop = Loop("test", step, every_s=0.01)
    loop.start()
    assert done.wait(10)
    assert loop.stop()


def test_a_loop_that_waits_for_its_next_turn_stops_at_once() -> None:
    ran = threading.Event()
    loop = Loop("test", ran.set, every_s=3600)
    loop.start()
    assert ran.wait(10)
    assert loop.stop(timeout_s=10)


def test_stopping_tells_when_a_step_is_still_under_way() -> None:
    entered, let_go = threading.Event(), threading.Event()

    def step() -> None:
        entered.set()
        let_go.wait(10)

    loop = Loop("test", step, every_s=3600)
    loop.start()
    assert entered.wait(10)
    assert not loop.stop(timeout_s=0.01)
    let_go.set()
    assert loop.stop()


def test_a_loop_that_never_started_stops() -> None:
    assert Loop("test", lambda: None, every_s=1).stop()


def test_a_loop_passes_over_the_steps_that_may_not_run() -> None:
    may_run, asked, ran = threading.Event(), threading.Event(), threading.Event()

    def ask() -> bool:
        asked.set()
        return may_run.is_set()

    loop = Loop("test", ran.set, every_s=0.01)
    loop.only_while(ask)
    loop.start()
    assert asked.wait(10)
    assert not ran.is_set()
    may_run.set()
    assert ran.wait(10)
    assert loop.stop()
