"""Instances made by hand for tests of what watches them: a row in a real ledger, and a container on a real engine."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import docker

from provisioner.changes import Changes
from provisioner.cluster import Cluster
from provisioner.docker_hosts.hosts import LOCAL_ENGINE, DockerHosts
from provisioner.ledger import Ledger
from provisioner.ledger.records import InstanceRecord
from provisioner.settings import Settings
from stacks.names import Names
from stacks.spec import BROWSER_IMAGE, CDP_PORT, SECCOMP_PROFILE, ClusterSpec, NodeSpec
from tests.support.ports import free_port
from tests.support.records import make_record

T = TypeVar("T")
SLEEPER = ["sleep", "infinity"]
PATIENCE_S = 60.0
"""How long a test waits before it gives up: a busy machine takes longer for everything."""


def wait_until(
    find: Callable[[], T | None], *, what: str = "see the line that waits", timeout_s: float = PATIENCE_S
) -> T:
    """Return what `find` finds, as soon as it finds something."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = find()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class Watched:
    """One cluster of one node, without a converger: what should be there is put there by hand."""

    def __init__(self, directory: Path, *, url: str = LOCAL_ENGINE, **settings: Any) -> None:
        self.cluster = Cluster(ClusterSpec(name=f"t{secrets.token_hex(4)}", nodes=(NodeSpec(id="local", host=url),)))
        self.settings = Settings(project_dir=directory, **settings)
        self.ledger = Ledger.create(self.settings.ledger_location)
        self.ledger.nodes.sync(self.cluster.nodes)
        self.hosts = DockerHosts(timeout_s=self.settings.node_timeout_s)
        self.changes = Changes()
        self.names = Names(self.cluster.name)
        self.docker = docker.DockerClient(base_url=url, version="auto")

    @property
    def node(self) -> NodeSpec:
        """Return the one node."""
        return self.cluster.nodes[0]

    def parts(self) -> dict[str, Any]:
        """Return what most watchers are made of."""
        return {"cluster": self.cluster, "hosts": self.hosts, "changes": self.changes}

    def add(self, **changes: Any) -> InstanceRecord:
        """Write an instance into the ledger as it should be for the test."""
        record = make_record(id=f"mu-{secrets.token_hex(4)}", debug_port=None, stream_port=None)
        record = dataclasses.replace(record, **{"browser": "debug_port" in changes, **changes})
        return self.ledger.instances.create(lambda _: (record, "made by a test"))

    def add_browser(self, **changes: Any) -> InstanceRecord:
        """Write an instance with a debug port into the ledger."""
        return self.add(debug_port=free_port(), **changes)

    def get(self, record: InstanceRecord) -> InstanceRecord:
        """Return the instance as the ledger has it now."""
        return self.ledger.instances.get(record.id)

    def labels(self, instance_id: str) -> dict[str, str]:
        """Return the labels of what belongs to an instance."""
        return {
            "machineuse.cluster": self.cluster.name,
            "machineuse.ledger": self.ledger.id,
            "machineuse.instance": instance_id,
        }

    def run(self, record: InstanceRecord, *, command: list[str] | None = None, **extra: Any) -> Any:
        """Start the container of an instance: the browser image as it is, or one command in it."""
        profile = json.dumps(json.loads(SECCOMP_PROFILE.read_text()))
        entrypoint = {"entrypoint": command[:1], "command": command[1:]} if command else {}
        network: dict[str, Any] = {"network_mode": "none"}
        if record.debug_port is not None:
            ports = {f"{CDP_PORT}/tcp": ("127.0.0.1", record.debug_port)}
            network = {"network": self.network(), "ports": ports}
        return self.docker.containers.run(
            BROWSER_IMAGE,
            name=self.names.docker_container(record.id),
            labels=self.labels(record.id),
            detach=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", f"seccomp={profile}"],
            shm_size="256m",
            mem_limit=f"{record.memory_mib}m",
            **network,
            **entrypoint,
            **extra,
        )

    def network(self) -> str:
        """Make the cluster's network, unless it is there, and return its name."""
        name = self.names.docker_network(self.ledger.id)
        if not self.docker.networks.list(names=[name]):
            self.docker.networks.create(name, labels={"machineuse.cluster": self.cluster.name})
        return name

    def events(self, kind: str) -> list[str]:
        """Return the messages of all events of a kind."""
        return [event.message for event in self.ledger.events.list(limit=1000) if event.kind == kind]

    def clean_up(self) -> None:
        """Remove every container, volume and network of this cluster."""
        mine = {"label": f"machineuse.cluster={self.cluster.name}"}
        for container in self.docker.containers.list(all=True, filters=mine, ignore_removed=True):
            container.remove(force=True, v=True)
        for volume in self.docker.volumes.list(filters=mine):
            volume.remove(force=True)
        for network in self.docker.networks.list(filters=mine):
            network.remove()
        self.docker.close()
        self.hosts.close()
        self.ledger.close()
