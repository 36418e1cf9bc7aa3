"""One service on a ledger. There may be several, on several hosts: all answer, and one of them leads.

Every replica has what answering takes: the ledger, the verbs that write wishes into it, the images. The one that holds
the lease also runs the control plane, which makes the wishes come true. A wish that a follower writes reaches the
leader through the ledger, and so does its outcome the follower: told at once where the ledger is a server, found by
looking where it is a file.

The control plane is started anew whenever the lease is won, and stopped whenever it is lost.
"""

from __future__ import annotations

import threading

import structlog

from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.clusterfile import path_of, read_cluster
from provisioner.control_plane import ControlPlane
from provisioner.docker_hosts.hosts import DockerHosts
from provisioner.errors import MachineuseError, SettingsError
from provisioner.images import ImageCatalogue
from provisioner.lease import Lease, leader_of
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.service import InstanceService
from provisioner.settings import Settings
from provisioner.snapshots.location import open_store

log = structlog.get_logger(__name__)

LOOK_S = 0.2
"""How often a replica looks whether it leads."""
AGAIN_S = 3.0
"""After what time a replica whose control plane did not start seeks the lease again; till then another may have it."""


class Replica:
    """This process's service on one cluster's ledger."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.data_dir.chmod(0o700)
        self.cluster = Cluster(read_cluster(settings.project_dir, cluster=settings.cluster))
        self._store = open_store(settings)
        self.ledger = Ledger.create(settings.ledger_location)
        self.ledger.claim(self.cluster.name)
        self.changes = Changes()
        self._hosts = DockerHosts(base_dir=settings.project_dir, timeout_s=settings.node_timeout_s)
        self.instances = InstanceService(
            self.ledger,
            cluster=self.cluster,
            settings=settings,
            catalogue=ImageCatalogue(self.cluster, hosts=self._hosts),
            changes=self.changes,
            kill=self._kill,
        )
        self._lease = Lease(self.ledger, duration_s=settings.lease_s)
        self._listener = self.ledger.listen(self._hear)
        self._control_plane: ControlPlane | None = None
        self._file_changed_at = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machineuse-replica", daemon=True)

    @property
    def is_leading(self) -> bool:
        """Say whether this replica is the one that changes the nodes."""
        return self._control_plane is not None and self._lease.is_held

    def start(self) -> None:
        """Start; returns when the service can take requests, and leads if nobody else does.

        Raises LedgerUnavailable and, where it leads, what `ControlPlane.start` raises.
        """
        self._warn_of_what_is_not_shared()
        if self._listener is not None:
            self._listener.start()
        if self._lease.seek():
            self._lead()
        else:
            log.info("following", replica=self._lease.name, leader=leader_of(self.ledger))
        self._thread.start()

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Stop; an update under way gets `timeout_s` to end, and is cut off then. The lease is given back."""
        self._stopping.set()
        self._lease.changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._control_plane is not None:
            self._control_plane.stop(timeout_s=timeout_s)
            self._control_plane = None
        self._lease.close()
        if self._listener is not None:
            self._listener.stop()
        self._hosts.close()
        self.ledger.close()

    def _warn_of_what_is_not_shared(self) -> None:
        settings = self.settings
        own = {
            "MACHINEUSE_STATE": settings.state is None,
            "MACHINEUSE_PASSPHRASE_FILE": settings.needs_passphrase and settings.passphrase_file is None,
            "MACHINEUSE_SNAPSHOT_STORE": settings.snapshot_store is None,
        }
        if settings.ledger is not None and any(own.values()):
            names = [name for name, is_own in own.items() if is_own]
            log.warning("other services on this ledger would not find what this one keeps for itself", unset=names)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                try:
                    self._step()
                except Exception:  # whatever it is: another one may do better
                    self._lease.resign()
                    raise
            except MachineuseError as error:
                log.error("not leading", replica=self._lease.name, error=error.message, detail=error.detail)
                self._stopping.wait(AGAIN_S)
            except Exception as error:  # the outermost frame of the thread: it must survive anything
                log.error("not leading", replica=self._lease.name, error=str(error), exc_info=error)
                self._stopping.wait(AGAIN_S)
            self._lease.changed.wait(LOOK_S)
            self._lease.changed.clear()

    def _step(self) -> None:
        held = self._lease.is_held
        if self._control_plane is None:
            self._follow_file()
            if held or (not self._lease.is_sought and self._lease.seek()):
                self._lead()
        elif not held:
            # The ledger is asked nothing until all has ended: it may be the one that does not answer.
            log.warning("lease lost", replica=self._lease.name)
            control_plane, self._control_plane = self._control_plane, None
            control_plane.abort()
            control_plane.stop()
            self._lease.seek()
            log.info("following", replica=self._lease.name, leader=leader_of(self.ledger))

    def _follow_file(self) -> None:
        """Read the cluster's file where it has changed: new instances are placed by it. The leader applies it."""
        path = path_of(self.settings.project_dir, cluster=self.cluster.name)
        changed_at = path.stat().st_mtime_ns if path.exists() else 0
        if changed_at == self._file_changed_at:
            return
        self._file_changed_at = changed_at
        try:
            self.cluster.replace(read_cluster(self.settings.project_dir, cluster=self.cluster.name))
        except SettingsError as error:
            log.warning("the cluster's file is not taken over", error=error.message)
        else:
            self._hosts.keep_only(self.cluster.nodes)

    def _lead(self) -> None:
        control_plane = ControlPlane(
            self.settings,
            cluster=self.cluster,
            ledger=self.ledger,
            hosts=self._hosts,
            store=self._store,
            instances=self.instances,
            changes=self.changes,
            lease=self._lease,
        )
        try:
            control_plane.start()
        except BaseException:
            control_plane.stop()
            raise
        self._control_plane = control_plane
        log.info("leading", replica=self._lease.name)

    def _hear(self, instance_id: str | None) -> None:
        """Take note that another replica has changed an instance."""
        if instance_id is None:
            self.changes.notify_all()
        else:
            self.changes.notify(instance_id)
        self.changes.work.set()

    def _kill(self, record: InstanceRecord) -> None:
        control_plane = self._control_plane
        if control_plane is not None:
            control_plane.kill(record)  # else the leader sees the wish
