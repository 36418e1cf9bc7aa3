"""What an instance can be, and what may happen to it: one table.

A status is what an instance *is*; what it *should be* is `Wanted`. The converger moves the first towards the second.
A pair of status and event that the table does not have is a conflict, whoever sends it.
"""

from __future__ import annotations

from enum import StrEnum

from provisioner.errors import Conflict


class Status(StrEnum):
    """What an instance is; the API's words."""

    CREATING = "creating"
    RUNNING = "running"
    IDLE = "idle"
    DORMANT = "dormant"
    FAILED = "failed"


class Wanted(StrEnum):
    """What an instance should be."""

    RUNNING = "running"
    DORMANT = "dormant"
    ABSENT = "absent"


class Event(StrEnum):
    """What can happen to an instance."""

    READY = "ready"  # its browser answers (or, without one, its container runs); a failed one's may yet
    QUIET = "quiet"  # nobody used it for a while
    ACTIVE = "active"  # somebody uses it again
    SLEEP = "sleep"  # somebody, or the idle timeout, asks for dormancy
    SLEPT = "slept"  # snapshot verified, container and volume gone
    SLEEP_FAILED = "sleep_failed"  # no snapshot: it goes on running
    REVIVE = "revive"  # somebody asks for it back
    REVIVE_FAILED = "revive_failed"  # could not be restored: the snapshot is kept
    FAIL = "fail"  # cannot be made what it should be
    MOVE = "move"  # its node is lost: it is given back from its last snapshot on another one
    LOST = "lost"  # its container is gone or stopped behind our back; being made again
    DELETE = "delete"  # somebody asks for its end
    ABANDON = "abandon"  # its node was removed from the cluster for good: its snapshot is all there is


TRANSITIONS: dict[tuple[Status, Event], Status] = {
    (Status.CREATING, Event.READY): Status.RUNNING,
    (Status.CREATING, Event.FAIL): Status.FAILED,
    (Status.CREATING, Event.REVIVE_FAILED): Status.DORMANT,
    (Status.CREATING, Event.LOST): Status.CREATING,
    (Status.CREATING, Event.MOVE): Status.CREATING,
    (Status.CREATING, Event.SLEPT): Status.DORMANT,  # halfway through a move
    (Status.CREATING, Event.DELETE): Status.CREATING,
    (Status.RUNNING, Event.READY): Status.RUNNING,
    (Status.RUNNING, Event.QUIET): Status.IDLE,
    (Status.RUNNING, Event.ACTIVE): Status.RUNNING,
    (Status.RUNNING, Event.SLEEP): Status.RUNNING,
    (Status.RUNNING, Event.SLEPT): Status.DORMANT,
    (Status.RUNNING, Event.SLEEP_FAILED): Status.RUNNING,
    (Status.RUNNING, Event.FAIL): Status.FAILED,
    (Status.RUNNING, Event.LOST): Status.CREATING,
    (Status.RUNNING, Event.MOVE): Status.CREATING,
    (Status.RUNNING, Event.DELETE): Status.RUNNING,
    (Status.IDLE, Event.READY): Status.IDLE,
    (Status.IDLE, Event.QUIET): Status.IDLE,
    (Status.IDLE, Event.ACTIVE): Status.RUNNING,
    (Status.IDLE, Event.SLEEP): Status.IDLE,
    (Status.IDLE, Event.SLEPT): Status.DORMANT,
    (Status.IDLE, Event.SLEEP_FAILED): Status.RUNNING,
    (Status.IDLE, Event.FAIL): Status.FAILED,
    (Status.IDLE, Event.LOST): Status.CREATING,
    (Status.IDLE, Event.MOVE): Status.CREATING,
    (Status.IDLE, Event.DELETE): Status.IDLE,
    (Status.DORMANT, Event.SLEPT): Status.DORMANT,
    (Status.DORMANT, Event.REVIVE): Status.CREATING,
    (Status.DORMANT, Event.DELETE): Status.DORMANT,
    (Status.FAILED, Event.DELETE): Status.FAILED,
    (Status.FAILED, Event.READY): Status.RUNNING,
    (Status.FAILED, Event.LOST): Status.CREATING,  # its repair was given up: what it still had is gone now
    (Status.CREATING, Event.ABANDON): Status.DORMANT,
    (Status.RUNNING, Event.ABANDON): Status.DORMANT,
    (Status.IDLE, Event.ABANDON): Status.DORMANT,
    (Status.DORMANT, Event.ABANDON): Status.DORMANT,
    (Status.FAILED, Event.ABANDON): Status.DORMANT,
}

UP = frozenset({Status.RUNNING, Status.IDLE})
"""Statuses in which a client can connect."""


def next_status(status: Status, event: Event) -> Status:
    """Return the status that `event` leads to; raise `Conflict` when the table does not know the pair."""
    try:
        return TRANSITIONS[status, event]
    except KeyError:
        raise Conflict(f"An instance that is {status.value} can't take the event '{event.value}'.") from None
