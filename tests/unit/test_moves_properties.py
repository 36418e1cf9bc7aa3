"""Whichever node falls silent, and whenever it is back: an instance is in one place, and nothing is lost untold.

Random sequences of wishes, updates, kills, silences and returns over the real ledger, service, mover and converger,
with nodes in memory that keep what is in each home. What a user wrote last is followed to the end; only a move off a
lost node may take it back, to what is in the snapshot that the move tells of.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.converger import Step, Work
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import Conflict, NoCapacity, NodeUnreachable, NotFound, SnapshotFailed
from provisioner.guard import LedgerGuard
from provisioner.images import ImageCatalogue
from provisioner.ledger import Ledger
from provisioner.ledger.instances import Update
from provisioner.ledger.leftovers import Leftover
from provisioner.ledger.records import InstanceRecord, Moving, NodeStatus
from provisioner.moves import Mover
from provisioner.outcomes import error_of
from provisioner.service import QUICK_START, InstanceService
from provisioner.settings import Settings
from provisioner.states import UP, Status, Wanted
from stacks.spec import Availability, ClusterSpec, NodeSpec, OfflinePolicy
from tests.support.fake_engine import EMPTY, Died, instance_of, kind_of
from tests.support.fake_nodes import SILENT, FakeNodes
from tests.support.world import NAMES, World, empty_ledger

SLOTS = ("mu-a", "mu-b")
NODES = ("a", "b", "c")
MISSES = 2
EVENTS = (
    *("lose_and_move", "lose_and_move", "lose_and_move", "lose", "fall_silent"),
    *("come_back", "come_back", "come_back", "come_back_unheard", "remove_leftovers"),
    *("commute", "commute", "commute", "use", "use", "take_live_snapshot", "sleep", "wake", "delete", "kill"),
    *("drain", "drain", "uncordon"),
)
"""What happens, some of it more often than other things."""
WORKS = ("move", "update", "update", "die before", "die during", "die after", "beat")
"""What the service does about it, in whatever order it gets to it."""


class Nodes(World):
    """A world of several nodes, which the ledger knows from their heartbeats."""

    engine: FakeNodes

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.engine = FakeNodes(NAMES)
        self.engine.decide = lambda urn: LedgerGuard(ledger, stop_timeout_s=1).check_delete(
            urn=urn,
            labels={"machineuse.instance": instance_of(urn)},
            kind="snapshot" if "Snapshot" in urn else "restore" if "Restore" in urn else "volume",
            replacing=False,
        )
        self.engine.note_leftover = lambda node_id, urn: ledger.leftovers.add(node_id=node_id, urn=urn, name=urn)
        self.engine.is_away = self.is_away
        self.engine.node_of = lambda instance_id: ledger.instances.get(instance_id).node_id
        self.crash()

    def is_away(self, node_id: str) -> bool:
        return node_id not in self.ledger.nodes.online()

    def _prepare(self, work: Work) -> bool:
        """Prepare a step as provisioner/preparation.py does; copies that nodes keep are left out."""
        record = work.record
        if work.step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT):
            try:
                self.engine.capture(work.targets[0], instance_id=record.id)
            except Exception as error:
                raise error_of(str(error)) from error
        if work.step in (Step.DELETE, Step.SHED, Step.TIDY):
            for generation in record.obsolete_snapshots:
                self.engine.made.pop(NAMES.snapshot_urn(record.id, generation), None)
        return True

    def _is_captured(self, work: Work) -> bool:
        """Say so after a restart too, as an operator's update finds it, which a real service has forgotten."""
        return work.step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT) and work.targets[0] in self.engine.made

    def _sweep(self, record: InstanceRecord) -> None:
        """Remove an instance's body where the stack does not know it, as provisioner/preparation.py does."""
        away, silent = self.is_away(record.node_id), record.node_id in self.engine.silent
        if silent and not away and not record.force:
            raise NodeUnreachable(SILENT)
        for urn in (NAMES.container_urn(record.id), NAMES.volume_urn(record.id)):
            if away or silent:
                self.ledger.leftovers.add(node_id=record.node_id, urn=urn, name=urn)
            else:
                self.engine.bodies[record.node_id].pop(urn, None)


class Story:
    """Three nodes and two instances."""

    def __init__(self, *, action: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="machineuse-moves-")
        self.written: dict[str, str] = {}
        """What has to be in each instance's home."""
        self.ids: dict[str, str] = {}
        self.lives = 0
        self.world = Nodes(empty_ledger(Path(self._directory.name, "ledger.db")))
        self.ledger, self.engine = self.world.ledger, self.world.engine
        nodes = tuple(NodeSpec(id=node_id, host=f"unix:///{node_id}") for node_id in NODES)
        policy = OfflinePolicy.model_validate({"action": action, "after_minutes": 1})
        self.cluster = Cluster(ClusterSpec(name="unit", nodes=nodes, offline=policy))
        self.ledger.nodes.sync(nodes)
        for node_id in NODES:
            self.beat(node_id)
        self.service = InstanceService(
            self.ledger,
            cluster=self.cluster,
            settings=Settings(),
            catalogue=ImageCatalogue(self.cluster, hosts=DockerHosts()),
            changes=Changes(),
            port_free=lambda _node, _port: True,
        )
        self.restart()
        self.prosper()

    def restart(self) -> None:
        self.world.crash()
        self.mover = Mover(self.ledger, cluster=self.cluster, service=self.service, settings=Settings())

    def happen(self, event: str, instance_id: str, node_id: str, works: list[str]) -> None:
        """Let something happen to an instance or a node, and the service do some of its work."""
        instance_id = self.create(instance_id, node_id)
        {
            "lose": lambda: self.lose(instance_id),
            "lose_and_move": lambda: (self.lose(instance_id), self.move()),
            "come_back": lambda: (self.come_back(node_id), self.beat(node_id)),
            "come_back_unheard": lambda: self.come_back(node_id),
            "fall_silent": lambda: self.engine.silent.add(node_id),
            "remove_leftovers": self.remove_leftovers,
            "commute": lambda: self.commute(instance_id, node_id),
            "use": lambda: self.use(instance_id),
            "take_live_snapshot": lambda: self.take_live_snapshot(instance_id),
            "sleep": lambda: self.sleep(instance_id),
            "wake": lambda: self.wake(instance_id, node_id),
            "delete": lambda: self.delete(instance_id, force=False),
            "kill": lambda: self.delete(instance_id, force=True),
            "drain": lambda: self.mark(node_id, Availability.DRAINING),
            "uncordon": lambda: self.mark(node_id, Availability.ACTIVE),
        }[event]()
        for work in works:
            if work == "beat":
                for each in NODES:
                    self.beat(each)
            elif work == "move":
                self.move()
            else:
                self.update(work.partition(" ")[2] or None)
            self.check()

    # ---- what people do

    def create(self, slot: str, node_id: str) -> str:
        """See to it that there is an instance in a slot; return its id. No id comes twice."""
        instance_id = self.ids.get(slot, "")
        if self.ledger.instances.find(instance_id) is None:
            self.lives += 1
            instance_id = self.ids[slot] = f"{slot}{self.lives}"
            self.world.add(id=instance_id, node_id=min(self.ledger.nodes.online(), default=node_id))
            self.written[instance_id] = EMPTY
        return instance_id

    def use(self, instance_id: str) -> None:
        """Write something, wherever the browser is: a node that nobody hears of may have its users."""
        record = self.ledger.instances.find(instance_id)
        if record is not None and record.status in UP and record.wanted is Wanted.RUNNING and not record.moving:
            self.lives += 1
            home = self.engine.bodies[record.node_id]
            home[NAMES.volume_urn(instance_id)] = self.written[instance_id] = f"visit {self.lives}"

    def sleep(self, instance_id: str) -> None:
        with contextlib.suppress(Conflict, NotFound, SnapshotFailed):
            self.service.make_dormant(instance_id)

    def wake(self, instance_id: str, node_id: str | None) -> None:
        with contextlib.suppress(Conflict, NotFound, NoCapacity):
            self.service.revive(instance_id, method=QUICK_START, node_preference=node_id)

    def commute(self, instance_id: str, node_id: str) -> None:
        """Go to sleep on one node and wake on another."""
        self.sleep(instance_id)
        for _ in range(2):
            self.update(None)
        self.wake(instance_id, node_id)

    def delete(self, instance_id: str, force: bool) -> None:
        with contextlib.suppress(NotFound):
            self.service.delete(instance_id, force=force)
            self.written.pop(instance_id, None)

    def mark(self, node_id: str, availability: Availability) -> None:
        spec = self.cluster.spec
        nodes = tuple(n.model_copy(update={"availability": availability}) if n.id == node_id else n for n in spec.nodes)
        self.cluster.replace(spec.model_copy(update={"nodes": nodes}))
        self.ledger.nodes.sync(nodes)

    # ---- what happens to nodes

    def come_back(self, node_id: str) -> None:
        """Answer again; a heartbeat finds out."""
        self.engine.silent.discard(node_id)

    def lose(self, instance_id: str) -> None:
        """Lose an instance's node for longer than anybody waits."""
        node_id = self.ledger.instances.get(instance_id).node_id
        self.engine.silent.add(node_id)
        for _ in range(MISSES):
            self.beat(node_id)
        self.ledger.nodes.observe(node_id, values={"offline_since": time.time() - 3600})

    def beat(self, node_id: str) -> None:
        """Listen to a heartbeat, as provisioner/health.py does."""
        if node_id not in self.engine.silent:
            has = {"cpu_cores": 8.0, "memory_bytes": 2**34, "offline_since": None}
            self.ledger.nodes.observe(node_id, values={"status": NodeStatus.ONLINE, "misses": 0} | has)
            return
        known = self.ledger.nodes.get(node_id)
        values: dict[str, object] = {"misses": known.misses + 1}
        if known.misses + 1 >= MISSES:
            values |= {"status": NodeStatus.OFFLINE, "offline_since": known.offline_since or time.time()}
        self.ledger.nodes.observe(node_id, values=values)

    # ---- what the service does

    def take_live_snapshot(self, instance_id: str) -> None:
        with contextlib.suppress(NotFound):
            self.world.wish(lambda r: lifecycle.wish_live_snapshot(r, reason="test"), instance_id)

    def move(self) -> None:
        self.mover._pauses.clear()
        before = {record.id: record.moving for record in self.ledger.instances.all()}
        self.mover.step()
        for record in self.ledger.instances.moving():
            if record.moving is Moving.OFFLINE and before[record.id] is not Moving.OFFLINE:
                assert record.snapshot_generation is not None
                kept = self.engine.made[NAMES.snapshot_urn(record.id, record.snapshot_generation)]
                events = [e.message for e in self.ledger.events.list(instance_id=record.id) if e.kind == "move"]
                is_told = "what it did after that is lost" in events[-1]
                assert is_told or kept == self.written[record.id], "something is lost untold"
                self.written[record.id] = kept

    def update(self, die: str | None) -> None:
        self.engine.die = die
        for record in self.ledger.instances.unsettled():
            self.world.wish(lambda _: Update(values={"retry_at": 0.0}), record.id)
        try:
            self.world.converger.step()
        except Died:
            self.restart()
        finally:
            self.engine.die = None

    def work(self) -> None:
        """Do all of it for a while."""
        for _ in range(3):
            for node_id in NODES:
                self.beat(node_id)
            self.remove_leftovers()
            self.move()
            self.update(None)

    def prosper(self) -> None:
        """See to it that both instances run and have been used since their last snapshot."""
        instance_ids = [self.create(slot, NODES[0]) for slot in SLOTS]
        self.work()
        for instance_id in instance_ids:
            self.use(instance_id)
            self.take_live_snapshot(instance_id)
        self.work()
        for instance_id in instance_ids:
            self.use(instance_id)

    def remove_leftovers(self) -> None:
        """Remove what is noted on the nodes that answer, as provisioner/repair.py does."""
        for node_id in self.ledger.nodes.online() - self.engine.silent:
            for leftover in self.ledger.leftovers.list(node_id):
                self.engine.bodies[node_id].pop(leftover.urn, None)
                self.ledger.leftovers.remove(leftover.id)

    # ---- what must hold

    def check(self) -> None:
        records = {record.id: record for record in self.ledger.instances.all()}
        self.what_is_not_its_own_is_to_be_removed(records)
        self.no_profile_is_lost(records)
        self.what_is_settled_is_what_it_says(records)

    def what_is_not_its_own_is_to_be_removed(self, records: Mapping[str, InstanceRecord]) -> None:
        """An instance has a body on its node, and nowhere else but where it is noted as left over."""
        noted = {(leftover.node_id, leftover.urn) for leftover in self.leftovers()}
        for node_id, urn in self.bodies():
            record = records.get(instance_of(urn))
            is_noted = (node_id, urn) in noted
            if record is not None and (record.node_id != node_id or not record.body):
                assert is_noted, f"{urn} is on node {node_id}, and runs in two places once that is back"
            if record is not None and record.node_id == node_id and record.wanted is Wanted.RUNNING:
                assert not is_noted, f"{urn} on node {node_id} is in use, and to be removed"

    def no_profile_is_lost(self, records: Mapping[str, InstanceRecord]) -> None:
        for instance_id, written in self.written.items():
            record = records[instance_id]
            places = [content for urn, content in self.engine.made.items() if instance_of(urn) == instance_id]
            places.append(self.home_of(record))
            assert written in places or written == EMPTY, f"{written} of {instance_id} is lost"

    def what_is_settled_is_what_it_says(self, records: Mapping[str, InstanceRecord]) -> None:
        for record in records.values():
            if record.settled_generation < record.generation:
                continue
            if record.status in UP:
                assert self.home_of(record) == self.written[record.id]
            elif record.status is Status.DORMANT:
                assert record.snapshot_generation is not None
                kept = NAMES.snapshot_urn(record.id, record.snapshot_generation)
                assert self.engine.made[kept] == self.written[record.id]

    def end(self) -> None:
        """Have all nodes back: everything settles, in one place each. Delete everything: nothing is left anywhere."""
        self.engine.silent.clear()
        for node_id in NODES:
            self.mark(node_id, Availability.ACTIVE)
        self.settle()
        self.check()
        here = {(r.node_id, r.id) for r in self.ledger.instances.all() if r.status in UP}
        assert {(node_id, instance_of(urn)) for node_id, urn in self.bodies() if self.is_known(urn)} == here
        for record in self.ledger.instances.all():
            assert record.moving is None
            self.service.delete(record.id, force=False)
        self.settle()
        assert self.ledger.instances.all() == []
        assert list(self.bodies()) == []
        assert [urn for urn in self.engine.made if "Snapshot" in urn] == []

    def close(self) -> None:
        self.ledger.close()
        self._directory.cleanup()

    # ---- helpers

    def settle(self) -> None:
        """Work until nothing is left to do, and once more: what has settled stays as it is."""
        calm = 0
        for _ in range(8):
            self.work()
            busy = [*self.ledger.instances.unsettled(), *self.ledger.instances.moving(), *self.leftovers()]
            calm = 0 if busy else calm + 1
            if calm == 2:
                return

    def leftovers(self) -> list[Leftover]:
        return [leftover for node_id in NODES for leftover in self.ledger.leftovers.list(node_id)]

    def is_known(self, urn: str) -> bool:
        return self.ledger.instances.find(instance_of(urn)) is not None

    def home_of(self, record: InstanceRecord) -> str | None:
        return self.engine.bodies[record.node_id].get(NAMES.volume_urn(record.id))

    def bodies(self) -> Iterator[tuple[str, str]]:
        """Give what the nodes have, without what the fake makes for a restore."""
        for node_id, urns in self.engine.bodies.items():
            yield from ((node_id, urn) for urn in urns if kind_of(urn) in FakeNodes.ON_NODES)


happenings = st.tuples(
    st.sampled_from(EVENTS),
    st.sampled_from((SLOTS[0], *SLOTS)),
    st.sampled_from(NODES),
    st.lists(st.sampled_from(WORKS), min_size=1, max_size=6),
)


@given(action=st.sampled_from(["move", "move", "wait"]), story=st.lists(happenings, min_size=12, max_size=25))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_an_instance_is_in_one_place_and_nothing_is_lost_untold(
    action: str, story: list[tuple[str, str, str, list[str]]]
) -> None:
    told = Story(action=action)
    try:
        for event, instance_id, node_id, works in story:
            told.happen(event, instance_id, node_id, works)
        told.end()
    finally:
        told.close()
