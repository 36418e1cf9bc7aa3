"""Does the slow part of a step before the engine's update, so that no instance waits for another's gigabytes.

An update holds the stack: whatever is slow inside it is slow for everybody. Bringing an image to a node and capturing
a snapshot are therefore done beforehand, in threads, and a new instance's container starts while the CLI does.
The resources that the update then creates find their work done: all of it is idempotent, and an operator's plain
`pulumi up` does the same work inside the update.

A snapshot that was captured and never became a resource is known to nobody but the ledger. So before an instance is
deleted, its capture comes to an end, and what is only pending is thrown away here.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import structlog

from provisioner.changes import Changes
from provisioner.cloud_preparation import EBS, CloudPreparation
from provisioner.cluster import Cluster
from provisioner.docker_hosts.archives import DockerMachine
from provisioner.docker_hosts.containers import kill_container, remove_container
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.docker_hosts.images import ImageInfo, find_usable_image
from provisioner.docker_hosts.volumes import remove_volume
from provisioner.errors import MachineuseError, NodeUnreachable, UnknownNode
from provisioner.image_supply import ImageSupply
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.plugins.docker.provider import DockerProvider
from provisioner.plugins.machineuse.snapshot import labels_of
from provisioner.settings import Settings
from provisioner.snapshots.capture import Capture, CaptureRequest
from provisioner.snapshots.machine import Volumes
from provisioner.snapshots.manifest import SnapshotId
from provisioner.snapshots.store import SnapshotStore
from provisioner.specs import spec_of
from provisioner.work import Step, Work
from stacks.cluster import provider_arguments
from stacks.instance import container_arguments, volume_arguments
from stacks.names import Names
from stacks.spec import ARCH, HOME_PATH, NodeSpec

log = structlog.get_logger(__name__)

WORKERS = 4
"""Slow preparations side by side on one node; each node has its own, so that one that hangs holds up no other."""
QUICK_WORKERS = 8
CLOUD_WORKERS = 32
"""Where homes are on cloud volumes: no machine takes more of those, and most of it is waiting for the cloud."""
IMAGE_KNOWN_S = 60.0
"""How long an image that was seen on a node is taken to be there."""
LOOK_S = 0.2
"""How long an update waits for a node to say whether it has an image; the next one takes the answer otherwise."""
KILL_WAIT_S = 3.0
"""How long a forced delete waits for the capture that it has cut off to clean up; later it cleans up all the same."""

Key = tuple[str, int, Step]


class Preparation:
    """Prepares steps; asked again and again until a step is ready."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        cluster: Cluster,
        hosts: DockerHosts,
        store: SnapshotStore,
        settings: Settings,
        changes: Changes,
        docker: DockerProvider,
        cloud: CloudPreparation,
    ) -> None:
        self._cloud = cloud
        self._ledger = ledger
        self._cluster = cluster
        self._hosts = hosts
        self._store = store
        self._settings = settings
        self._changes = changes
        self._docker = docker
        self._names = Names(cluster.name)
        self._supply = ImageSupply(ledger, cluster=cluster, hosts=hosts)
        self._pools: defaultdict[str, ThreadPoolExecutor] = defaultdict(
            lambda: ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="machineuse-preparation")
        )
        # A snapshot in the cloud takes minutes that nobody works on: no other instance waits for those.
        self._cloud_pools: defaultdict[str, ThreadPoolExecutor] = defaultdict(
            lambda: ThreadPoolExecutor(max_workers=CLOUD_WORKERS, thread_name_prefix="machineuse-cloud")
        )
        # What takes a moment never queues behind gigabytes.
        self._quick_pools: defaultdict[str, ThreadPoolExecutor] = defaultdict(
            lambda: ThreadPoolExecutor(max_workers=QUICK_WORKERS, thread_name_prefix="machineuse-quick")
        )
        self._lock = threading.Lock()
        self._jobs: dict[Key, Future[None]] = {}
        self._ahead: dict[str, Future[None]] = {}
        """What is being made ahead, by instance."""
        self._images: dict[tuple[str, str], float] = {}
        self._looks: dict[tuple[str, str], tuple[Future[ImageInfo | None], float]] = {}
        """Who is being asked whether it has an image, and since when."""
        self._patience: dict[str, float] = {}
        """Until when the delete of a killed instance waits for its capture."""

    def prepare(self, work: Work) -> bool:
        """Return whether the update may run this step now; if not, `changes.work` is set once it may.

        Raises what the preparation failed with: the step has failed then.
        """
        job: Callable[[InstanceRecord], None] | None
        if work.step is Step.CREATE and work.record.volume == EBS:
            job = self._prepare_cloud_body
        elif work.step is Step.CREATE:
            has_image = self._has_image(work.record)
            if has_image is None:
                return False  # its node has not said yet
            job = None if has_image else self._bring_images
            if job is None:
                self._start_ahead(work.record)
        elif self._is_making_ahead(work.record) or (
            work.step is not Step.LIVE_SNAPSHOT and self._is_capturing(work.record)
        ):
            return False
        elif work.step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT):
            job = self._prepare_snapshot
        elif work.record.volume == EBS and work.step in (Step.SHED, Step.DELETE):
            job = self._release
        else:
            job = self._discard_obsolete if work.record.obsolete_snapshots else None
        if job is None:
            return True
        key = _key(work)
        pools = self._cloud_pools if work.record.volume == EBS else self._pools
        with self._lock:
            future = self._jobs.get(key)
            if future is None:
                future = self._jobs[key] = pools[work.record.node_id].submit(job, work.record)
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

    def is_captured(self, work: Work) -> bool:
        """Say whether the snapshot that a step takes is whole: what is left to do needs nothing of the node."""
        if work.step not in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT):
            return False
        with self._lock:
            future = self._jobs.get(_key(work))
        return future is not None and future.done() and not future.cancelled() and future.exception() is None

    def _start_ahead(self, record: InstanceRecord) -> None:
        """Make volume and container while the CLI starts; the update's resources wait for them, and adopt them."""
        if record.restore_generation is None and not record.repair and record.attempts == 0:
            with self._lock:
                future = self._ahead[record.id] = self._quick_pools[record.node_id].submit(self._create_body, record)
            future.add_done_callback(lambda done: self._forget_ahead(record.id, done))

    def _forget_ahead(self, instance_id: str, done: Future[None]) -> None:
        with self._lock:
            if self._ahead.get(instance_id) is done:
                del self._ahead[instance_id]
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("not started ahead", instance=instance_id, error=str(error), exc_info=error)
        self._changes.work.set()

    def _is_making_ahead(self, record: InstanceRecord) -> bool:
        """Say whether something is still made for an earlier wish, and worth waiting for.

        A volume that appears after a later step has removed it would be empty, and be taken for the instance's home.
        """
        with self._lock:
            future = self._ahead.get(record.id)
        return future is not None and not future.cancel() and not future.done() and self._is_patient(record)

    def _is_patient(self, record: InstanceRecord) -> bool:
        """Say whether a step may wait for what it overtook; a forced delete does for a moment only."""
        return not record.force or time.monotonic() < self._patience.get(record.id, 0.0)

    def _create_body(self, wished: InstanceRecord) -> None:
        record = self._ledger.instances.find(wished.id)
        if record is None or record.generation != wished.generation:
            return  # overtaken
        spec, node = spec_of(record), self._node_of(record)
        if spec is None:
            return
        volume = volume_arguments(spec, cluster=self._cluster.spec, ledger_id=self._ledger.id)
        container = container_arguments(
            spec,
            cluster=self._cluster.spec,
            ledger_id=self._ledger.id,
            node=node,
            image=spec.image,
            volume=volume["name"],
        )
        try:
            for urn, arguments in (
                (self._names.volume_urn(record.id), volume),
                (self._names.container_urn(record.id), container),
            ):
                self._docker.create_ahead(urn, config=_as_inputs(provider_arguments(node)), news=_as_inputs(arguments))
        except MachineuseError as error:
            log.debug("not started ahead", instance=record.id, error=error.message)  # the update meets it, and tells

    def sweep(self, record: InstanceRecord) -> None:
        """Remove the container and volume of an instance that should have none, where the stack does not know them.

        An update that was killed, or never run, may have made them. Idempotent. Raises DockerError, but not for a node
        that is away, or does not answer when the delete is forced: then they are noted, to be removed when it is back.
        """
        node = self._cluster.node(record.node_id)
        if node is None:
            return
        if record.volume == EBS:
            self._cloud.release(record)
        host = self._hosts.of(node)
        container, volume = self._names.docker_container(record.id), self._names.docker_volume(record.id)
        away = self._ledger.nodes.is_offline(node.id)
        try:
            if away:
                raise NodeUnreachable(f"Node {node.id} does not answer.")
            remove_container(host, container, kill=True)
            remove_volume(host, volume)
        except NodeUnreachable:
            if not record.force and not away:
                raise
            for urn, name in (
                (self._names.container_urn(record.id), container),
                (self._names.volume_urn(record.id), volume),
            ):
                self._ledger.leftovers.add(node_id=node.id, urn=urn, name=name)

    def kill(self, record: InstanceRecord) -> None:
        """Kill an instance's container now, without waiting for the update that removes it; nothing waits for this.

        What is under way for the instance (a snapshot, a graceful stop) ends by it.
        """
        self._patience.setdefault(record.id, time.monotonic() + KILL_WAIT_S)
        self._quick_pools[record.node_id].submit(self._kill, record)

    def _kill(self, record: InstanceRecord) -> None:
        try:
            host = self._hosts.of(self._node_of(record))
            kill_container(host, self._names.docker_container(record.id))
        except MachineuseError as error:
            log.debug("could not kill", instance=record.id, error=error.message)  # the update removes it all the same

    def close(self) -> None:
        """Start nothing more; what runs is found again after a restart."""
        self._cloud.close()
        for pool in (*self._pools.values(), *self._cloud_pools.values(), *self._quick_pools.values()):
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_capturing(self, record: InstanceRecord) -> bool:
        """Say whether a snapshot of the instance is still captured, or its volume made, and worth waiting for."""
        node = self._cluster.node(record.node_id)
        if node is None or self._ledger.nodes.is_offline(node.id):
            return False  # whatever hangs there finds out, once it goes on, that nobody needs it any more
        with self._lock:
            for key in [key for key in self._jobs if key[0] == record.id and key[1] != record.generation]:
                if self._jobs[key].done():
                    del self._jobs[key]
                elif self._matters(key[2], record) and self._is_patient(record):
                    return True
        self._patience.pop(record.id, None)
        return False

    def _matters(self, step: Step, record: InstanceRecord) -> bool:
        taking = step in (Step.SNAPSHOT, Step.LIVE_SNAPSHOT)
        return taking or (step is Step.CREATE and record.volume == EBS)

    def _node_of(self, record: InstanceRecord) -> NodeSpec:
        node = self._cluster.node(record.node_id)
        if node is None:
            raise UnknownNode(f"The cluster's file does not name node '{record.node_id}' any more.")
        return node

    def _has_image(self, record: InstanceRecord) -> bool | None:
        """Say whether the instance's node has the image that it needs; None while the node has not answered.

        A node that has gone silent takes seconds to be known for it, and nobody else's update waits for that.
        """
        if record.restore_generation is not None and not record.repair:
            return False  # which image that is, is in the snapshot
        node = self._node_of(record)
        host = self._hosts.of(node)
        key = (node.id, record.image)
        # What failed before may have failed because the image was removed meanwhile.
        if record.attempts == 0 and time.monotonic() - self._images.get(key, float("-inf")) < IMAGE_KNOWN_S:
            return True
        with self._lock:
            look, asked_at = self._looks.get(key, (None, 0.0))
        # Whoever asked may have gone meanwhile, and the answer be of old: that the node was silent then, say.
        if look is None or (look.done() and time.monotonic() - asked_at > IMAGE_KNOWN_S):
            pool = self._quick_pools[node.id]
            look = pool.submit(find_usable_image, host, record.image, emulated=node.labels.get(ARCH))
            look.add_done_callback(lambda _: self._changes.work.set())
            with self._lock:
                self._looks[key] = look, time.monotonic()
            wait([look], timeout=LOOK_S)
        if not look.done():
            return None
        with self._lock:
            del self._looks[key]
        if look.result() is None:
            return False
        self._ledger.node_images.note_use(node_id=record.node_id, name=record.image)
        self._images[key] = time.monotonic()
        return True

    def _bring_images(self, record: InstanceRecord) -> None:
        node = self._node_of(record)
        if record.restore_generation is None or record.repair:
            self._supply.bring(node, record.image, instance_id=record.id)
        else:
            snapshot = SnapshotId(instance_id=record.id, generation=record.restore_generation)
            self._supply.bring_for_restore(
                node, self._store.read_manifest(snapshot), image=record.image, instance_id=record.id
            )

    def _prepare_cloud_body(self, record: InstanceRecord) -> None:
        self._bring_images(record)
        self._cloud.make_volume(record)

    def _release(self, record: InstanceRecord) -> None:
        self._cloud.release(record)
        self._discard_obsolete(record)

    def _prepare_snapshot(self, record: InstanceRecord) -> None:
        node = self._node_of(record)
        live = record.pending_live
        generation = live.generation if live else record.snapshot_generation or record.generation
        snapshot = SnapshotId(instance_id=record.id, generation=generation)
        Capture(
            CaptureRequest(
                snapshot=snapshot,
                cluster=self._cluster.name,
                node_id=node.id,
                container=self._names.docker_container(record.id),
                volumes=Volumes(
                    home=self._names.docker_volume(record.id),
                    copy=self._names.docker_copy(record.id, generation),
                    home_path=HOME_PATH,
                ),
                image=record.image,
                live=live is not None,
                stop_timeout_s=self._settings.stop_timeout_s,
                labels=labels_of(
                    cluster=self._cluster.name,
                    instance=record.id,
                    ledger_id=self._ledger.id,
                    urn=self._names.snapshot_urn(record.id, generation),
                    generation=generation,
                ),
            ),
            machine=DockerMachine(self._hosts.of(node), helper_image=self._cluster.helper_image),
            store=self._store,
            progress=lambda said: log.debug("snapshot", instance=record.id, progress=said),
            home_keeper=self._cloud.home_keeper(record, generation=generation),
        ).run()
        now = self._ledger.instances.find(record.id)
        if now is None or now.snapshot(generation) is None or generation in now.obsolete_snapshots:
            self._discard(record, generations=[generation])  # while it was taken, it lost its point

    def _discard_obsolete(self, record: InstanceRecord) -> None:
        self._discard(record, generations=record.obsolete_snapshots)

    def _discard(self, record: InstanceRecord, *, generations: Sequence[int]) -> None:
        """Throw away snapshots that an instance no longer needs, whether they became resources or not. Idempotent.

        Raises NodeUnreachable, but not for a node that is away, or when the delete is forced: then the copies are
        noted, to be removed when it is back.
        """
        for generation in generations:
            taken = record.snapshot(generation)
            node = self._cluster.node(taken.node_id if taken is not None else record.node_id)
            copy = self._names.docker_copy(record.id, generation)
            if node is not None:
                away = self._ledger.nodes.is_offline(node.id)
                try:
                    if away:
                        raise NodeUnreachable(f"Node {node.id} does not answer.")
                    DockerMachine(self._hosts.of(node), helper_image=self._cluster.helper_image).remove_copy(copy)
                except NodeUnreachable:
                    if not record.force and not away:
                        raise
                    urn = self._names.snapshot_urn(record.id, generation)
                    self._ledger.leftovers.add(node_id=node.id, urn=urn, name=copy)
            self._cloud.discard(record, generation=generation)
            self._store.delete(SnapshotId(instance_id=record.id, generation=generation))


def _key(work: Work) -> Key:
    return work.record.id, work.record.generation, work.step


def _as_inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the program's arguments as the engine would hand them on: its names, and nothing that is not set."""

    def rename(name: str) -> str:
        first, *rest = name.split("_")
        return first + "".join(word.title() for word in rest)

    return {rename(name): value for name, value in arguments.items() if value is not None}
