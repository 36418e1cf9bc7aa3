"""What makes the wishes in the ledger come true: joins plugins, engine, converger and watchers, and runs them.

One process at a time has it, the one that holds the lease (see replica.py); no step begins without that.

Start, in this order: first heartbeat (so nodes are known), plugins, engine, the stack's own resources, loops. Stop, in
the reverse order; an update under way is waited for. A kill at any point loses nothing: everything that was wished is
in the ledger, and the next start goes on from there.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import structlog

from provisioner.changes import RECHECK_S, Changes
from provisioner.cloud_orphans import CloudOrphans
from provisioner.cloud_preparation import CloudPreparation
from provisioner.cluster import Cluster
from provisioner.converger import GATHER_S, Converger
from provisioner.disk import DiskWatch
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.engine import Engine
from provisioner.errors import LeaseLost
from provisioner.guard import LedgerGuard
from provisioner.health import NodeHealth
from provisioner.idle import IdleWatch
from provisioner.image_gc import ImageGc
from provisioner.image_supply import ImageSupply
from provisioner.lease import Lease
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord, SnapshotState
from provisioner.live_snapshots import LiveSnapshots
from provisioner.loops import Loop
from provisioner.metrics import Sampler
from provisioner.moves import Mover
from provisioner.node_disk import NodeDisks
from provisioner.plugins.docker.provider import DockerProvider
from provisioner.plugins.host import PluginHost
from provisioner.plugins.machineuse.servicer import MachineusePlugin
from provisioner.preparation import Preparation
from provisioner.prepull import LOOK_EVERY_S as PREPULL_EVERY_S
from provisioner.prepull import Prepull
from provisioner.readiness import Readiness
from provisioner.reload import LOOK_EVERY_S, Reload
from provisioner.repair import Repair
from provisioner.service import InstanceService
from provisioner.settings import Settings
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.store import SnapshotStore
from provisioner.states import Wanted
from provisioner.volumes.location import open_regions
from provisioner.work import Work

log = structlog.get_logger(__name__)

RECOVER_S = 1.0
PRUNE_EVERY_S = 3600.0
IMAGE_GC_EVERY_S = 600.0
ABANDONED_AFTER = timedelta(days=1)
"""Age at which a half-written snapshot is nobody's any more: a capture that is run again begins anew anyway."""


class ControlPlane:
    """One cluster's control plane in this process, for as long as it leads: made and started once."""

    def __init__(
        self,
        settings: Settings,
        *,
        cluster: Cluster,
        ledger: Ledger,
        hosts: DockerHosts,
        store: SnapshotStore,
        instances: InstanceService,
        changes: Changes,
        lease: Lease,
    ) -> None:
        """Work with the parts that the process has anyway, while the `lease` is held."""
        self.settings = settings
        self.cluster = cluster
        self.ledger = ledger
        self.hosts = hosts
        self.store = store
        self.instances = instances
        self.changes = changes
        self._lease = lease
        self._reload = Reload(
            self.ledger, cluster=self.cluster, settings=settings, hosts=self.hosts, changes=self.changes
        )
        self._reload.sync()
        guard = LedgerGuard(self.ledger, stop_timeout_s=settings.stop_timeout_s)
        docker = DockerProvider(hosts=self.hosts, policy=guard)
        regions = open_regions(settings)
        machineuse = MachineusePlugin(store=self.store, hosts=self.hosts, policy=guard, regions=regions)
        self._plugins = PluginHost([docker, machineuse])
        self._preparation = Preparation(
            self.ledger,
            cluster=self.cluster,
            hosts=self.hosts,
            store=self.store,
            settings=settings,
            changes=self.changes,
            docker=docker,
            cloud=CloudPreparation(
                self.ledger, cluster=self.cluster, hosts=self.hosts, store=self.store, regions=regions
            ),
        )
        self._nodes = NodeHealth(
            self.ledger, cluster=self.cluster, hosts=self.hosts, settings=settings, changes=self.changes
        )
        self._readiness = Readiness(
            self.ledger, cluster=self.cluster, hosts=self.hosts, settings=settings, changes=self.changes
        )
        self._engine: Engine | None = None
        self._converger: Converger | None = None
        self._repair = Repair(self.ledger, cluster=self.cluster, hosts=self.hosts, changes=self.changes)
        idle = IdleWatch(
            self.ledger, service=self.instances, cluster=self.cluster, settings=settings, changes=self.changes
        )
        disk = DiskWatch(self.ledger, cluster=self.cluster, hosts=self.hosts)
        node_disks = NodeDisks(self.ledger, cluster=self.cluster, hosts=self.hosts)
        moves = Mover(self.ledger, cluster=self.cluster, service=self.instances, settings=settings)
        live = LiveSnapshots(self.ledger, cluster=self.cluster, settings=settings, changes=self.changes)
        sampler = Sampler(self.ledger, cluster=self.cluster, hosts=self.hosts)
        image_gc = ImageGc(self.ledger, cluster=self.cluster, hosts=self.hosts, store=self.store)
        supply = ImageSupply(self.ledger, cluster=self.cluster, hosts=self.hosts)
        self._prepull = Prepull(self.ledger, cluster=self.cluster, supply=supply)
        self._killed: set[str] = set()
        orphans = CloudOrphans(self.ledger, cluster=self.cluster, regions=regions)
        self._loops = [
            Loop("cluster file", self._reload.step, every_s=LOOK_EVERY_S),
            Loop("kills", self._kill_forced, every_s=RECHECK_S),
            Loop("heartbeat", self._nodes.step, every_s=settings.heartbeat_s),
            Loop("readiness", self._readiness.step, every_s=settings.heartbeat_s),
            Loop("repair", self._repair.step, every_s=settings.heartbeat_s),
            Loop("moves", moves.step, every_s=settings.heartbeat_s),
            Loop("live snapshots", live.step, every_s=settings.idle_check_s),
            Loop("idle", idle.step, every_s=settings.idle_check_s),
            Loop("disk", disk.step, every_s=settings.disk_check_s),
            Loop("node disks", node_disks.step, every_s=settings.disk_check_s),
            Loop("sampler", sampler.step, every_s=settings.sample_s),
            # In a loop, not in the way of the start: a store that can't be reached is a warning, and tried again.
            Loop("snapshot store", self._clean_store, every_s=PRUNE_EVERY_S),
            Loop("prepull", self._prepull.step, every_s=PREPULL_EVERY_S),
            Loop("images", image_gc.step, every_s=IMAGE_GC_EVERY_S),
            Loop("cloud", orphans.step, every_s=settings.cloud_check_s),
            Loop("events", self.ledger.events.prune, every_s=PRUNE_EVERY_S),
        ]
        for loop in self._loops:
            loop.only_while(lambda: lease.is_held)
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._converge, name="machineuse-converger", daemon=True)

    def start(self) -> None:
        """Start everything; returns when the service can take requests.

        Raises EngineError, LedgerMismatch and SetupError.
        """
        started = time.monotonic()
        self._nodes.beat_once()
        self._plugins.start()
        self._engine = Engine(self.settings, debug_providers=self._plugins.debug_providers, lease=self._lease)
        self._reload.apply_all(self._engine)
        self._prepull.use(self._engine)
        self._converger = Converger(
            self.ledger,
            cluster=self.cluster,
            settings=self.settings,
            engine=self._engine,
            changes=self.changes,
            await_ready=self._readiness.watch,
            prepare=self._prepare,
            sweep=self._sweep,
            is_captured=self._preparation.is_captured,
        )
        self._readiness.start()
        self._worker.start()
        for loop in self._loops:
            loop.start()
        log.info("control plane started", cluster=self.cluster.name, took_s=round(time.monotonic() - started, 2))

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Stop everything; an update under way gets `timeout_s` to end, and is cut off then."""
        self._stopping.set()
        self.changes.work.set()
        for loop in self._loops:
            loop.end_soon()
        for loop in self._loops:
            loop.stop()
        self._readiness.stop()
        if self._worker.is_alive():
            self._worker.join(timeout_s)
        self._preparation.close()
        if self._engine is not None:
            self._engine.close()
        self._plugins.stop()
        self._nodes.close()
        self._repair.close()
        log.info("control plane stopped")

    def abort(self) -> None:
        """Kill the update under way: the lease is over. What it did, the next leader finds."""
        if self._engine is not None:
            self._engine.abort()

    def kill(self, record: InstanceRecord) -> None:
        """Kill an instance's container now; nothing waits for this."""
        self._preparation.kill(record)

    def _kill_forced(self) -> None:
        """Kill what is to be deleted at once by a wish that another replica, or an earlier leader, has taken."""
        forced = {r.id: r for r in self.ledger.instances.unsettled() if r.wanted is Wanted.ABSENT and r.force}
        for instance_id in forced.keys() - self._killed:
            self.kill(forced[instance_id])
        self._killed = set(forced)

    def _clean_store(self) -> None:
        """Remove what crashes left in the store, but nothing of a snapshot that is still to be taken."""
        pending = {
            SnapshotId(instance_id=record.id, generation=snapshot.generation)
            for record in self.ledger.instances.all()
            for snapshot in record.snapshots
            if snapshot.state is SnapshotState.PENDING
        }
        self.store.clean_up(older_than=ABANDONED_AFTER, spared=pending)

    def _prepare(self, work: Work) -> bool:
        self._lease.check()
        return self._preparation.prepare(work)

    def _sweep(self, record: InstanceRecord) -> None:
        self._lease.check()  # a leader that was frozen here would remove what another one has made since
        self._preparation.sweep(record)

    def _converge(self) -> None:
        assert self._converger is not None
        while not self._stopping.is_set():
            try:
                self._lease.check()
                due_s = self._converger.step()
            except LeaseLost as error:
                log.warning("converger stopped", error=error.message)
                due_s = RECOVER_S
            except Exception as error:  # the outermost frame of the thread: it must survive anything
                log.error("converger failed", error=str(error), exc_info=error)
                due_s = RECOVER_S
            if due_s == 0:
                continue
            self.changes.work.wait(RECHECK_S if due_s is None else min(due_s, RECHECK_S))
            self.changes.work.clear()
            self._stopping.wait(GATHER_S)
