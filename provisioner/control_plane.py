"""The service without its front door: joins ledger, plugins, engine, converger and watchers, and runs them.

Start, in this order: ledger, first heartbeat (so nodes are known), plugins, engine, the stack's own resources, loops.
Stop, in the reverse order; an update under way is waited for. A kill at any point loses nothing: everything that was
wished is in the ledger, and the next start goes on from there.
"""

from __future__ import annotations

import hashlib
import threading
import time
from datetime import timedelta

import structlog

from provisioner.changes import RECHECK_S, Changes
from provisioner.cloud_orphans import CloudOrphans
from provisioner.cloud_preparation import CloudPreparation
from provisioner.cluster import Cluster
from provisioner.clusterfile import read_cluster
from provisioner.converger import GATHER_S, Converger
from provisioner.disk import DiskWatch
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.engine import Engine
from provisioner.errors import LedgerMismatch
from provisioner.guard import LedgerGuard
from provisioner.health import NodeHealth
from provisioner.idle import IdleWatch
from provisioner.images import ImageCatalogue
from provisioner.ledger import Ledger
from provisioner.loops import Loop
from provisioner.metrics import Sampler
from provisioner.outcomes import error_of
from provisioner.plugins.docker.provider import DockerProvider
from provisioner.plugins.host import PluginHost
from provisioner.plugins.machineuse.servicer import MachineusePlugin
from provisioner.preparation import Preparation
from provisioner.readiness import Readiness
from provisioner.repair import Repair
from provisioner.service import InstanceService
from provisioner.settings import Settings
from provisioner.snapshots.location import open_store
from provisioner.specs import specs_of
from provisioner.volumes.location import open_regions
from stacks.cluster import declare
from stacks.spec import ClusterSpec

log = structlog.get_logger(__name__)

APPLIED = "applied_cluster"
"""The fact that says which version of the cluster's file the stack has."""

RECOVER_S = 1.0
PRUNE_EVERY_S = 3600.0
ABANDONED_AFTER = timedelta(days=1)
"""Age at which a half-written snapshot is nobody's any more: a capture that is run again begins anew anyway."""


class ControlPlane:
    """One cluster's control plane in this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.data_dir.chmod(0o700)
        self.cluster = Cluster(read_cluster(settings.project_dir, cluster=settings.cluster))
        self.ledger = Ledger.create(settings.ledger_path)
        self.ledger.nodes.sync(self.cluster.nodes)
        self.changes = Changes()
        self.hosts = DockerHosts(timeout_s=settings.node_timeout_s)
        self.store = open_store(settings)
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
        catalogue = ImageCatalogue(self.cluster, hosts=self.hosts)
        self.instances = InstanceService(
            self.ledger,
            cluster=self.cluster,
            settings=settings,
            catalogue=catalogue,
            changes=self.changes,
            kill=self._preparation.kill,
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
        sampler = Sampler(self.ledger, cluster=self.cluster, hosts=self.hosts)
        orphans = CloudOrphans(self.ledger, cluster=self.cluster, regions=regions)
        self._loops = [
            Loop("heartbeat", self._nodes.step, every_s=settings.heartbeat_s),
            Loop("readiness", self._readiness.step, every_s=settings.heartbeat_s),
            Loop("repair", self._repair.step, every_s=settings.heartbeat_s),
            Loop("idle", idle.step, every_s=settings.idle_check_s),
            Loop("disk", disk.step, every_s=settings.disk_check_s),
            Loop("sampler", sampler.step, every_s=settings.sample_s),
            # In a loop, not in the way of the start: a store that can't be reached is a warning, and tried again.
            Loop("snapshot store", lambda: self.store.clean_up(older_than=ABANDONED_AFTER), every_s=PRUNE_EVERY_S),
            Loop("cloud", orphans.step, every_s=settings.cloud_check_s),
            Loop("events", self.ledger.events.prune, every_s=PRUNE_EVERY_S),
        ]
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._converge, name="machineuse-converger", daemon=True)

    def start(self) -> None:
        """Start everything; returns when the service can take requests.

        Raises EngineError, LedgerMismatch and SetupError.
        """
        started = time.monotonic()
        self._nodes.beat_once()
        self._plugins.start()
        self._engine = Engine(self.settings, debug_providers=self._plugins.debug_providers)
        self._apply_cluster(self._engine)
        self._converger = Converger(
            self.ledger,
            cluster=self.cluster,
            settings=self.settings,
            engine=self._engine,
            changes=self.changes,
            await_ready=self._readiness.watch,
            prepare=self._preparation.prepare,
            sweep=self._preparation.sweep,
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
        self.hosts.close()
        self.ledger.close()
        log.info("control plane stopped")

    def _apply_cluster(self, engine: Engine) -> None:
        """Run a full update where the stack is new or the cluster's file has changed since the last one.

        What can't be applied now (a node is away) is logged. Raises LedgerMismatch for a stack of another ledger, and
        EngineError.
        """
        new = engine.ensure_stack()
        fingerprint = _fingerprint(self.cluster.spec)
        if not new and self.ledger.fact(APPLIED) == fingerprint:
            return
        wanted = specs_of(self.ledger.instances.all())

        async def program() -> None:
            await declare(self.cluster.spec, ledger_id=self.ledger.id, instances=wanted)

        result = engine.update(program)
        for urn, words in result.errors.items():
            error = error_of(words)
            if isinstance(error, LedgerMismatch):
                raise error
            log.error("the cluster's file could not be applied", urn=urn or None, error=error.message)
        if result.errors:
            return
        self.ledger.write_fact(APPLIED, fingerprint)
        log.info("cluster applied", nodes=len(self.cluster.nodes), took_s=round(result.duration_s, 2))

    def _converge(self) -> None:
        assert self._converger is not None
        while not self._stopping.is_set():
            try:
                due_s = self._converger.step()
            except Exception as error:  # the outermost frame of the thread: it must survive anything
                log.error("converger failed", error=str(error), exc_info=error)
                due_s = RECOVER_S
            if due_s == 0:
                continue
            self.changes.work.wait(RECHECK_S if due_s is None else min(due_s, RECHECK_S))
            self.changes.work.clear()
            self._stopping.wait(GATHER_S)


def _fingerprint(cluster: ClusterSpec) -> str:
    return hashlib.sha256(cluster.model_dump_json().encode()).hexdigest()[:16]
