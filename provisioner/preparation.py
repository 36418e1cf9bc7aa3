"""Does the slow part of a step before the engine's update, so that no instance waits for another's gigabytes.

An update holds the stack: whatever is slow inside it is slow for everybody. Pulling an image and capturing a snapshot
are therefore done beforehand, each in a thread of its own; the resources that the update then creates find their work
done (both are idempotent, and an operator's plain `pulumi up` does the same work inside the update).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import structlog

from provisioner.changes import Changes
from provisioner.converger import Step, Work
from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.containers import kill_container
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.images import ensure_image, find_image
from provisioner.errors import MachineuseError, UnknownNode
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.plugins.machineuse.snapshot import labels_of
from provisioner.settings import Settings
from provisioner.snapshots.capture import Capture, CaptureRequest
from provisioner.snapshots.machine import Volumes
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.store import SnapshotStore
from stacks.names import Names
from stacks.spec import HOME_PATH, ClusterSpec, NodeSpec

log = structlog.get_logger(__name__)

WORKERS = 4
IMAGE_KNOWN_S = 60.0
"""How long an image that was seen on a node is taken to be there."""

Key = tuple[str, int]


class Preparation:
    """Prepares steps; asked again and again until a step is ready."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: ClusterSpec,
        hosts: DockerHosts,
        store: SnapshotStore,
        settings: Settings,
        changes: Changes,
    ) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._store = store
        self._settings = settings
        self._changes = changes
        self._names = Names(cluster.name)
        self._pool = ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="machineuse-preparation")
        self._lock = threading.Lock()
        self._jobs: dict[Key, Future[None]] = {}
        self._images: dict[tuple[str, str], float] = {}

    def prepare(self, work: Work) -> bool:
        """Return whether the update may run this step now; if not, `changes.work` is set once it may.

        Raises what the preparation failed with: the step has failed then.
        """
        if work.step is Step.CREATE:
            job = self._prepare_image(work.record)
        elif work.step is Step.SNAPSHOT:
            job = self._prepare_snapshot
        else:
            return True
        if job is None:
            return True
        key = (work.record.id, work.record.generation)
        with self._lock:
            future = self._jobs.get(key)
            if future is None:
                future = self._jobs[key] = self._pool.submit(job, work.record)
                future.add_done_callback(lambda _: self._changes.work.set())
            if not future.done():
                return False
            del self._jobs[key]
        error = future.exception()
        if error is not None and not isinstance(error, MachineuseError):
            log.error("preparation crashed", instance=work.record.id, error=str(error), exc_info=error)
            raise MachineuseError("An internal error kept it from being done.", detail=repr(error)) from error
        if error is not None:
            raise error
        return True

    def kill(self, record: InstanceRecord) -> None:
        """Kill an instance's container now, without waiting for the update that removes it; nothing waits for this.

        What is under way for the instance (a snapshot, a graceful stop) ends by it.
        """
        self._pool.submit(self._kill, record)

    def _kill(self, record: InstanceRecord) -> None:
        try:
            host = self._hosts.get(self._node_of(record).host)
            kill_container(host, self._names.docker_container(record.id))
        except MachineuseError as error:
            log.debug("could not kill", instance=record.id, error=error.message)  # the update removes it all the same

    def close(self) -> None:
        """Start nothing more; what runs is found again after a restart."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _node_of(self, record: InstanceRecord) -> NodeSpec:
        node = self._cluster.node(record.node_id)
        if node is None:
            raise UnknownNode(f"The cluster's file does not name node '{record.node_id}' any more.")
        return node

    def _prepare_image(self, record: InstanceRecord) -> Callable[[InstanceRecord], None] | None:
        """Return the pull that the instance's node needs first; None when it has the image."""
        host = self._hosts.get(self._node_of(record).host)
        key = (host.url, record.image)
        if time.monotonic() - self._images.get(key, float("-inf")) < IMAGE_KNOWN_S:
            return None
        if find_image(host, record.image) is None:
            return self._pull
        self._images[key] = time.monotonic()
        return None

    def _pull(self, record: InstanceRecord) -> None:
        host = self._hosts.get(self._node_of(record).host)
        log.info("pulling image", image=record.image, node=record.node_id, instance=record.id)
        self._ledger.events.add(
            "pull", message=f"pulling {record.image}", instance_id=record.id, node_id=record.node_id
        )
        ensure_image(host, record.image, report=lambda said: log.info("pulling image", progress=said))

    def _prepare_snapshot(self, record: InstanceRecord) -> None:
        node = self._node_of(record)
        generation = record.snapshot_generation or record.generation
        snapshot = SnapshotId(instance_id=record.id, generation=generation)
        machine = DockerMachine(self._hosts.get(node.host), helper_image=self._cluster.helper_image)
        copy = self._names.docker_copy(record.id, generation)
        Capture(
            CaptureRequest(
                snapshot=snapshot,
                cluster=self._cluster.name,
                node_id=node.id,
                container=self._names.docker_container(record.id),
                volumes=Volumes(home=self._names.docker_volume(record.id), copy=copy, home_path=HOME_PATH),
                image=record.image,
                stop_timeout_s=self._settings.stop_timeout_s,
                labels=labels_of(
                    cluster=self._cluster.name,
                    instance=record.id,
                    ledger_id=self._ledger.id,
                    urn=self._names.snapshot_urn(record.id, generation),
                    generation=generation,
                ),
            ),
            machine=machine,
            store=self._store,
            progress=lambda said: log.debug("snapshot", instance=record.id, progress=said),
        ).run()
        if self._ledger.instances.find(record.id) is None:
            # Deleted meanwhile, by force: nobody else knows of this snapshot.
            machine.remove_copy(copy)
            self._store.delete(snapshot)
