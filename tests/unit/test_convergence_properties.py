"""Whatever is wished, in whatever order, and whatever fails or dies meanwhile: no profile is lost, nothing is left.

Random sequences of wishes, updates, failures, kills and restarts, over a real ledger and an engine in memory that keeps
what is in each volume and each archive. A user writes something new whenever a browser can be used; what was written
last is followed to the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from provisioner import lifecycle, readiness
from provisioner.errors import Conflict, EngineError, NotFound
from provisioner.ledger.instances import Update
from provisioner.ledger.records import InstanceRecord
from provisioner.specs import specs_of
from provisioner.states import UP, Status, Wanted
from tests.support.fake_engine import EMPTY, Died, declared_urns, instance_of
from tests.support.records import sum_up
from tests.support.world import NAMES, World, empty_ledger

IDS = ("mu-a", "mu-b")
ids = st.sampled_from((IDS[0], IDS[0], IDS[1]))
PARTS = ("Snapshot", "Restore", "volume:", "container:")
TROUBLES = (
    *(f"fail {part}" for part in PARTS),
    *(f"fail_delete {part}" for part in PARTS),
    *(f"die {when}" for when in ("before", "during", "after")),
    f"late {IDS[0]}",
    "down",
)
CODES = ("docker_error", "port_taken", "snapshot_corrupt")


class Convergence(RuleBasedStateMachine):
    """One cluster with up to two instances, used and abused."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="machineuse-world-")
        self.written: dict[str, str] = {}
        """What was written last by each instance's user."""
        self.lives = 0

    @initialize(attempts=st.integers(1, 2))
    def begin(self, attempts: int) -> None:
        self.world = World(empty_ledger(Path(self._directory.name, "ledger.db")), attempts=attempts)
        self.world.answering = False

    # ---- what people do

    @rule(instance_id=ids, trouble=st.sampled_from(TROUBLES), code=st.sampled_from(CODES))
    def wish_in_vain(self, instance_id: str, trouble: str, code: str) -> None:
        """Wish what usually comes next, and have the first step towards it go wrong."""
        self.wish_next(instance_id)
        self.step(trouble, code=code)

    @rule(instance_id=ids)
    def wish_next(self, instance_id: str) -> None:
        """Wish what usually comes next."""
        record = self.world.ledger.instances.find(instance_id)
        if record is None:
            self.wish("create", instance_id)
        else:
            self.wish("revive" if record.status is Status.DORMANT else "dormant", instance_id)

    @rule(instance_id=ids, force=st.booleans())
    def delete(self, instance_id: str, force: bool) -> None:
        self.wish("kill" if force else "delete", instance_id)

    @rule(instance_id=ids)
    def use(self, instance_id: str) -> None:
        record = self.world.ledger.instances.find(instance_id)
        if record is None or record.status not in UP or record.wanted is not Wanted.RUNNING:
            return
        if NAMES.container_urn(instance_id) in self.made:
            self.lives += 1
            self.made[NAMES.volume_urn(instance_id)] = self.written[instance_id] = f"visit {self.lives}"

    # ---- what the service does

    @rule(trouble=st.sampled_from(TROUBLES), code=st.sampled_from(CODES))
    def stumble(self, trouble: str, code: str) -> None:
        """Take a step that goes wrong."""
        self.step(trouble, code=code)

    @rule(trouble=st.sampled_from(["", *TROUBLES]), code=st.sampled_from(CODES), instance_id=ids)
    def be_overtaken(self, trouble: str, code: str, instance_id: str) -> None:
        """Take a step while whose update runs somebody wishes something else."""
        self.step(trouble, code=code, meanwhile=lambda: self.wish("delete", instance_id))

    def step(self, trouble: str, *, code: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Take one step; its update may fail in part or as a whole, its process die, a wish come while it runs."""
        engine = self.world.engine
        kind, _, what = trouble.partition(" ")
        if kind == "fail":
            engine.fail = {what: f"It fails. [{code}]"}
        elif kind == "fail_delete":
            engine.fail_delete = {what: f"It fails. [{code}]"}
        elif kind == "die":
            engine.die = what
        elif kind == "down":
            engine.down = EngineError("It is down.")
        elif kind == "late":
            self.world.preparing = {what}
        engine.meanwhile = meanwhile
        self.forget_retries()
        try:
            self.world.converger.step()
        except Died:
            self.world.crash()
        finally:
            self.heal()

    @rule()
    def calm(self) -> None:
        """Nothing goes wrong for a while."""
        self.world.answering = True
        self.settle()
        self.world.answering = False

    @rule(instance_id=ids)
    def live(self, instance_id: str) -> None:
        """The next thing is wished, and done."""
        self.wish_next(instance_id)
        self.calm()

    @rule(instance_id=ids, ready=st.booleans())
    def hear_of_browser(self, instance_id: str, ready: bool) -> None:
        """A browser that is waited for answers, or is given up."""
        record = self.world.ledger.instances.find(instance_id)
        if record is None or not readiness.is_awaited(record):
            return
        if ready and NAMES.container_urn(instance_id) in self.made:
            self.change(record, lambda r: lifecycle.note_ready(r, generation=record.generation))
        elif not ready:
            self.change(record, lambda r: readiness.give_up(r, generation=record.generation, reason="It is silent."))

    @rule(instance_id=ids)
    @precondition(lambda self: self.made)
    def lose_container(self, instance_id: str) -> None:
        """Somebody removes a container behind the service's back; the sweep finds out."""
        record = self.world.ledger.instances.find(instance_id)
        if record is None or self.made.pop(NAMES.container_urn(instance_id), None) is None:
            return
        self.change(record, lambda r: lifecycle.wish_repaired(r, reason="its container is gone"))

    # ---- what must hold

    @invariant()
    def no_profile_is_lost(self) -> None:
        for instance_id, written in self.written.items():
            places = [urn for urn, content in self.made.items() if content == written]
            assert any(instance_of(urn) == instance_id for urn in places), f"{written} of {instance_id} is lost"

    @invariant()
    def what_is_settled_is_what_it_says(self) -> None:
        for record in self.world.ledger.instances.all():
            volume, container = NAMES.volume_urn(record.id), NAMES.container_urn(record.id)
            written = self.written.get(record.id, EMPTY)
            if record.settled_generation < record.generation:
                continue
            if record.status in UP:
                assert self.made[volume] == written
                assert {volume, container} <= self.world.engine.resources
            elif record.status is Status.DORMANT:
                assert record.snapshot_generation is not None
                assert self.made[NAMES.snapshot_urn(record.id, record.snapshot_generation)] == written
                assert not {volume, container, NAMES.restore_urn(record.id)} & self.world.engine.resources
                assert not {volume, container} & self.made.keys()
                assert self.ports_of(record) == set()
            elif written != EMPTY:
                assert self.made[volume] == written, "it failed, but its profile is there"

    @invariant()
    def ports_are_promised_to_who_has_them(self) -> None:
        with self.world.ledger.instances.reader() as loads:
            promised = loads.ports("local")
        assert promised == {port for record in self.world.ledger.instances.all() for port in self.ports_of(record)}

    @invariant()
    def the_node_has_promised_what_its_instances_take(self) -> None:
        assert sum_up(self.world.ledger.instances.all()) == self.world.ledger.instances.loads()

    @invariant()
    def a_full_program_changes_nothing_that_is_settled(self) -> None:
        """`pulumi preview` shows no change for what is as it should be."""
        settled = {
            r.id: r
            for r in self.world.ledger.instances.all()
            if r.settled_generation >= r.generation and r.status is not Status.FAILED and not r.obsolete_snapshots
        }
        declared = declared_urns(specs_of(settled.values()), names=NAMES)
        assert {urn for urn in self.world.engine.resources if instance_of(urn) in settled} == declared

    def teardown(self) -> None:
        """Heal everything: all of it settles. Delete everything: nothing is left."""
        try:
            self.heal()
            self.world.answering = True
            self.settle()
            self.no_profile_is_lost()
            self.what_is_settled_is_what_it_says()
            self.a_full_program_changes_nothing_that_is_settled()
            for record in self.world.ledger.instances.all():
                self.world.wish_step("delete", record.id)
            self.settle()
            assert self.world.ledger.instances.all() == []
            assert self.world.ledger.instances.loads() == ()
            assert self.world.engine.resources == set()
            assert self.left() == set()
        finally:
            self.world.ledger.close()
            self._directory.cleanup()

    # ---- helpers

    def wish(self, wish: str, instance_id: str) -> None:
        """Wish something; who may not is told so."""
        try:
            self.world.wish_step(wish, instance_id)
        except (Conflict, NotFound):
            return
        if wish in ("delete", "kill"):
            self.written.pop(instance_id, None)

    @property
    def made(self) -> dict[str, str]:
        return self.world.engine.made

    def heal(self) -> None:
        engine = self.world.engine
        engine.fail, engine.fail_delete, engine.down, engine.die = {}, {}, None, None
        engine.meanwhile = lambda: None
        self.world.preparing = set()

    def forget_retries(self) -> None:
        for record in self.world.ledger.instances.unsettled():
            self.change(record, lambda _: Update(values={"retry_at": 0.0}))

    def settle(self) -> None:
        for record in self.world.ledger.instances.unsettled():
            self.world.await_ready(record)
        self.world.settle()

    def change(self, record: InstanceRecord, decide: Callable[[InstanceRecord], Update | None]) -> None:
        self.world.ledger.instances.change(record.id, lambda r, _: decide(r))

    def ports_of(self, record: InstanceRecord) -> set[int]:
        return {port for port in (record.debug_port, record.stream_port) if port is not None}

    def left(self) -> set[str]:
        """Return what is left once the sweep (provisioner/repair.py) has removed volumes and containers of nobody."""
        return {urn for urn in self.made if "Snapshot" in urn}


Convergence.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
TestConvergence = Convergence.TestCase
