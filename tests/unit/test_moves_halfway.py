"""What is seen of a move between its two halves, when the instance is asleep and not yet on its way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.ledger.records import Moving
from provisioner.service import QUICK_START
from provisioner.states import Status
from stacks.spec import Availability
from tests.support.moves import Moves
from tests.support.world import ID


@pytest.fixture
def moves(tmp_path: Path) -> Iterator[Moves]:
    moves = Moves(tmp_path)
    yield moves
    moves.ledger.close()


@pytest.mark.parametrize("reason", list(Moving))
def test_a_move_is_under_way_until_both_its_halves_are_done(moves: Moves, reason: Moving) -> None:
    moves.add()
    if reason is Moving.OFFLINE:
        moves.lose("a")
    else:
        moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    moves.world.settle()
    between = moves.record
    assert (between.status, between.settled_generation) == (Status.DORMANT, between.generation)
    assert (between.moving, between.operation) == (reason, "moving")
    moves.run()
    assert (moves.record.status, moves.record.node_id, moves.record.operation) == (Status.RUNNING, "b", None)


@pytest.mark.parametrize(
    ("ask", "operation"),
    [("revive", "moving"), ("make_dormant", None), ("delete", "deleting")],
)
def test_between_the_halves_of_a_move_a_caller_may_ask_for_what_it_likes(
    moves: Moves, ask: str, operation: str | None
) -> None:
    moves.add()
    moves.mark("a", Availability.DRAINING)
    moves.mover.step()
    moves.world.settle()
    more = {"revive": {"method": QUICK_START}, "delete": {"force": False}}.get(ask, {})
    assert getattr(moves.service, ask)(ID, **more).operation == operation
    moves.run()
    found = moves.ledger.instances.find(ID)
    expected = {"revive": Status.RUNNING, "make_dormant": Status.DORMANT, "delete": None}[ask]
    assert (found and found.status) == expected
    assert found is None or (found.operation, found.moving) == (None, None)
