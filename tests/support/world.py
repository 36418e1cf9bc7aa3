"""A converger with everything around it in memory but the ledger, which is real."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pydantic import SecretStr

from provisioner import lifecycle
from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.converger import Converger
from provisioner.errors import EngineError
from provisioner.guard import LedgerGuard
from provisioner.ledger import Ledger
from provisioner.ledger.instances import LoadReader, Update
from provisioner.ledger.records import InstanceRecord
from provisioner.outcomes import error_of
from provisioner.readiness import is_awaited
from provisioner.settings import Settings
from provisioner.states import Status
from provisioner.work import Step, Work
from stacks.names import Names
from stacks.spec import ClusterSpec
from tests.support.fake_engine import FakeEngine, instance_of
from tests.support.records import make_record

NAMES = Names("unit")
ID = "mu-test"


@cache
def _template() -> Path:
    path = Path(tempfile.mkdtemp(prefix="machineuse-ledger-")) / "ledger.db"
    atexit.register(shutil.rmtree, path.parent)
    Ledger.create(path).close()
    return path


def empty_ledger(location: Path | SecretStr) -> Ledger:
    """Return an empty ledger there, or in that directory: as a file, a copy of one that was migrated once."""
    if isinstance(location, Path):
        location = location / "ledger.db" if location.is_dir() else location
        location.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_template(), location)
    return Ledger.open(location)


class World:
    """One cluster; `crash` throws the converger away like a kill -9 does."""

    def __init__(self, ledger: Ledger, *, attempts: int = 2) -> None:
        self.ledger = ledger
        self.attempts = attempts
        self.engine = FakeEngine(NAMES)
        self.preparing: set[str] = set()
        """Instances whose step is being prepared."""
        self.captured: set[str] = set()
        """Instances whose snapshot is whole, though it is not in the stack yet."""
        self.unprepared: dict[str, Exception] = {}
        """What the preparation of an instance's step fails with."""
        self.unswept: dict[str, Exception] = {}
        """What removing the rest of a deleted instance fails with."""
        self.answering = True
        """Whether browsers answer at once."""
        self.engine.before_delete = self._guard
        self.cluster = Cluster(ClusterSpec(name="unit"))
        self.crash()

    def crash(self) -> None:
        """Begin anew with what is in the ledger."""
        self.converger = Converger(
            self.ledger,
            cluster=self.cluster,
            settings=Settings(create_attempts=self.attempts),
            engine=self.engine,
            changes=Changes(),
            await_ready=self.await_ready,
            prepare=self._prepare,
            sweep=self._sweep,
            is_captured=self._is_captured,
        )

    def _prepare(self, work: Work) -> bool:
        """Prepare a step as provisioner/preparation.py does: snapshots are captured, and captured ones thrown away."""
        record = work.record
        if record.id in self.preparing:
            return False
        if (error := self.unprepared.get(record.id)) is not None:
            raise error
        if work.step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT):
            try:
                self.engine.capture(work.targets[0], instance_id=record.id)
            except EngineError as said:
                raise error_of(said.message) from said
        if work.step in (Step.DELETE, Step.SHED, Step.TIDY):
            for generation in record.obsolete_snapshots:
                self.engine.made.pop(NAMES.snapshot_urn(record.id, generation), None)
        return True

    def _is_captured(self, work: Work) -> bool:
        return work.record.id in self.captured

    def _sweep(self, record: InstanceRecord) -> None:
        """Remove a deleted instance's body, as provisioner/preparation.py does."""
        if (error := self.unswept.get(record.id)) is not None:
            raise error
        for urn in (NAMES.container_urn(record.id), NAMES.volume_urn(record.id)):
            self.engine.made.pop(urn, None)

    def await_ready(self, record: InstanceRecord) -> None:
        """Wait for an instance's browser, as provisioner/readiness.py does."""
        if self.answering and is_awaited(record):
            self.wish(lambda r: lifecycle.note_ready(r, generation=r.generation), record.id)

    def _guard(self, urn: str) -> None:
        """Every delete is asked for as the plugins do."""
        kind = next((k for k in ("volume", "container", "Snapshot") if f"{k}:" in urn or k in urn), "other").lower()
        decision = LedgerGuard(self.ledger, stop_timeout_s=1).check_delete(
            urn=urn, labels={"machineuse.instance": instance_of(urn)}, kind=kind, replacing=False
        )
        assert decision.allowed, decision.reason

    def add(self, **fields: object) -> InstanceRecord:
        """Create an instance, as InstanceService does."""

        def draft(loads: LoadReader) -> tuple[InstanceRecord, str]:
            debug_port, stream_port = _free_ports(loads, node_id=str(fields.get("node_id", "local")))
            defaults = {"status": Status.CREATING, "applied_generation": 0, "settled_generation": 0}
            return make_record(**defaults | {"debug_port": debug_port, "stream_port": stream_port} | fields), "test"

        return self.ledger.instances.create(draft)

    def wish(self, decide: Callable[[InstanceRecord], Update | None], instance_id: str = ID) -> None:
        """Change an instance's record."""
        self.ledger.instances.change(instance_id, lambda r, _: decide(r))

    def wish_step(self, wish: str, instance_id: str = ID) -> None:
        """Wish by name; `create` adds the instance."""
        if wish == "create":
            self.add(id=instance_id)
        elif wish == "dormant":
            self.wish(lambda r: lifecycle.wish_dormant(r, reason="test"), instance_id)
        elif wish == "revive":
            self.ledger.instances.change(instance_id, _revive)
        else:
            self.wish(lambda r: lifecycle.wish_absent(r, force=wish == "kill"), instance_id)

    def settle(self, *, rounds: int = 20) -> None:
        """Step until nothing is due, taking no notice of how long a retry should wait."""
        for _ in range(rounds):
            for record in self.ledger.instances.unsettled():
                self.wish(lambda _: Update(values={"retry_at": 0.0}), record.id)
            if self.converger.step() is None:
                return
        raise AssertionError(f"still unsettled: {self.ledger.instances.unsettled()}")

    @property
    def record(self) -> InstanceRecord:
        """Return the one instance."""
        return self.ledger.instances.get(ID)


def _revive(record: InstanceRecord, loads: LoadReader) -> Update:
    return lifecycle.wish_revived(
        record,
        method="quick_start",
        node_id="local",
        ports=_free_ports(loads, node_id="local"),
        volume="docker",
        disk_enforced=False,
    )


def _free_ports(loads: LoadReader, *, node_id: str) -> tuple[int, int]:
    taken = loads.ports(node_id)
    first, second, *_ = (port for port in range(21000, 21100) if port not in taken)
    return first, second
