"""The desired state, as values: what the Pulumi program is given.

Frozen models at the border between whoever decides (ledger, operator's YAML) and the program that declares. Units are
in the names. Nothing here knows how a thing is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_IMAGE = "ubuntu:22.04"
"""The image that the API's contract names as default; the catalogue says what really runs."""

BROWSER_IMAGE = "machineuse/browser:latest"
CDP_PORT = 9222
STREAM_PORT = 6080
HOME_PATH = "/home/machine"
LABEL_PREFIX = "machineuse."
SECCOMP_PROFILE = Path(__file__).resolve().parent.parent / "images" / "browser" / "seccomp.json"


class Spec(BaseModel):
    """Base of the models here: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class PortRange(Spec):
    """The host ports that a node may publish, both ends included."""

    first: int = Field(default=21000, ge=1024, le=65535)
    last: int = Field(default=24999, ge=1024, le=65535)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last <= self.first:
            raise ValueError("ports.last must be above ports.first")
        return self


class NodeSpec(Spec):
    """One Docker host: how we reach it, where its clients reach it, and how much it may take."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    host: str = "unix:///var/run/docker.sock"
    address: str = "localhost"
    bind_ip: str = "127.0.0.1"
    ports: PortRange = PortRange()
    max_instances: int = Field(default=50, ge=1)


class ClusterSpec(Spec):
    """One cluster = one Pulumi stack. Read from `Pulumi.<cluster>.yaml`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    nodes: tuple[NodeSpec, ...] = (NodeSpec(id="local"),)
    images: dict[str, str] = Field(default_factory=lambda: {DEFAULT_IMAGE: BROWSER_IMAGE})
    """The image catalogue: requested name → image that is run."""
    helper_image: str = BROWSER_IMAGE
    """An image with `cp` and `sh` that every node has: runs the short helper containers."""

    def node(self, node_id: str) -> NodeSpec | None:
        """Return the node of that id, or None."""
        return next((node for node in self.nodes if node.id == node_id), None)


class SnapshotRef(Spec):
    """Names one snapshot: `<instance>/<generation>` in the snapshot store."""

    instance_id: str
    generation: int
    node_id: str
    """The node that it was taken on, and that keeps the quick copy."""


class RestoreSpec(Spec):
    """What an instance's volume and image are filled from before its container starts."""

    snapshot: SnapshotRef
    method: str
    """`quick_start` or `full_restore`: what was asked for; the Restore resource's outputs say what was done."""


class InstanceSpec(Spec):
    """One browser instance as the program declares it.

    `body` says whether volume and container exist; `snapshots` are the ones that exist besides. Running: body.
    Being snapshotted: body and a new snapshot. Dormant: snapshots only. `restore` belongs to a body.
    """

    id: str
    node_id: str
    image: str
    browser: bool = True
    """False for an image without a browser's ports: gets a terminal to keep its shell alive."""
    memory_mib: int
    cpus: float
    pids: int = 1024
    shm_mib: int = 512
    disk_quota_gib: float | None = None
    """Set where the node's storage driver can enforce it."""
    debug_port: int | None = None
    stream_port: int | None = None
    body: bool = True
    restore: RestoreSpec | None = None
    snapshots: tuple[SnapshotRef, ...] = ()
