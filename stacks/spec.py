"""The desired state, as values: what the Pulumi program is given.

Frozen models at the border between whoever decides (ledger, operator's YAML) and the program that declares. Units are
in the names. Nothing here knows how a thing is made.
"""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DEFAULT_IMAGE = "ubuntu:22.04"
"""The image that the API's contract names as default; the catalogue says what really runs."""

BROWSER_IMAGE = "machineuse/browser:latest"
CDP_PORT = 9222
STREAM_PORT = 6080
HOME_PATH = "/home/machine"
LABEL_PREFIX = "machineuse."
ARCH = "arch"
"""The label that says a node's architecture: its engine's, or in the file another one that the engine emulates."""
_REGION = re.compile(r"[a-z]+(?:-[a-z]+)+-\d+")
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


class Availability(StrEnum):
    """Whether a node takes instances; an operator says so in the cluster's file."""

    ACTIVE = "active"
    CORDONED = "cordoned"  # gets nothing new, keeps what it has
    DRAINING = "draining"  # gets nothing new, and what it has is moved elsewhere, one by one


class CloudIdentity(Spec):
    """Which cloud machine a node is, for volumes that are attached to it."""

    provider: Literal["aws"] = "aws"
    instance_id: str
    zone: str

    @property
    def region(self) -> str:
        """Return the region of the zone: `us-east-1` for `us-east-1a`, `us-west-2` for `us-west-2-lax-1a`."""
        found = _REGION.match(self.zone)
        return found[0] if found else self.zone


LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""The usual names of the one address that means another machine to everybody."""


class NodeSpec(Spec):
    """One Docker host: how we reach it, where its clients reach it, and how much it may take."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    host: str = "unix:///var/run/docker.sock"
    """`unix://PATH`, `tcp://HOST:PORT` (with `cert_path`) or `ssh://USER@HOST[:PORT][/PATH]`."""
    cert_path: str | None = None
    """The directory of ca.pem, cert.pem and key.pem for `tcp://`, as Docker's own DOCKER_CERT_PATH."""
    ssh_opts: tuple[str, ...] = ()
    """What is handed on to `ssh` for `ssh://`, such as `-i`, `keys/node-b`."""
    address: str = "localhost"
    """Where clients reach the ports; where the host names a machine and nothing else is said, there."""
    bind_ip: str = "127.0.0.1"
    ports: PortRange = PortRange()
    max_instances: int = Field(default=50, ge=1)
    availability: Availability = Availability.ACTIVE
    labels: dict[str, str] = Field(default_factory=dict)
    """What the node can do, or where it is, for callers to ask for: `zone`, `arch`, anything."""
    volume: Literal["docker", "ebs"] = "docker"
    """What the instances' homes are on: the node's own disk, or a cloud volume each."""
    cloud: CloudIdentity | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_reached_where_its_engine_is(cls, said: Any) -> Any:
        if isinstance(said, dict) and "address" not in said and (machine := machine_in(said.get("host"))):
            return {**said, "address": machine}
        return said

    @field_validator("host")
    @classmethod
    def _names_an_engine(cls, host: str) -> str:
        if not _is_engine(host):
            raise ValueError("it should be unix:///PATH, tcp://HOST:PORT or ssh://USER@HOST[:PORT]")
        return host

    @field_validator("bind_ip")
    @classmethod
    def _is_an_address(cls, bind_ip: str) -> str:
        # Docker takes what it can't read, a name or a typing error, for every address of the node.
        try:
            readable = "%" not in bind_ip and ipaddress.ip_address(bind_ip)
        except ValueError:
            readable = False
        if not readable:
            raise ValueError("it should be an IP address of the node, or 0.0.0.0 for all of them")
        return bind_ip

    @model_validator(mode="after")
    def _volumes_have_a_cloud(self) -> Self:
        if self.volume == "ebs" and self.cloud is None:
            raise ValueError("volume: ebs needs cloud: {instance_id: …, zone: …}")
        return self


def machine_in(host: object) -> str | None:
    """Return the machine that an engine's URL names; None for a socket, and for what is no URL."""
    try:
        return urlsplit(host).hostname if isinstance(host, str) else None
    except ValueError:
        return None


def _is_engine(url: str) -> bool:
    """Say whether this is a URL by which a Docker engine may be reached: whatever else it is would be guessed at."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    if any(char.isspace() for char in url) or not url.startswith(f"{parts.scheme}://"):
        return False
    if parts.scheme == "unix":
        return not parts.netloc and parts.path not in ("", "/")
    if parts.scheme == "tcp":
        return bool(parts.hostname and port) and "@" not in parts.netloc and parts.path in ("", "/")
    return parts.scheme == "ssh" and bool(parts.hostname) and parts.password is None


class OfflinePolicy(Spec):
    """What becomes of the instances of a node that does not answer any more."""

    action: Literal["wait", "move"] = "wait"
    """Wait for the node, or revive them elsewhere from their last snapshot."""
    after_minutes: float = Field(default=5, ge=0)
    """How long the node is waited for before anything is moved."""


class ClusterSpec(Spec):
    """One cluster = one Pulumi stack. Read from `Pulumi.<cluster>.yaml`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    nodes: tuple[NodeSpec, ...] = (NodeSpec(id="local"),)
    images: dict[str, str] = Field(default_factory=lambda: {DEFAULT_IMAGE: BROWSER_IMAGE})
    """The image catalogue: requested name → image that is run."""
    offline: OfflinePolicy = OfflinePolicy()
    snapshot_every_minutes: float | None = Field(default=None, gt=0)
    """How often a running instance gets a snapshot without being stopped; None for never."""
    image_cache_gb: float | None = Field(default=None, ge=0)
    """How much disk a node may spend on images that no instance uses; None for any amount."""
    helper_image: str = BROWSER_IMAGE
    """An image with `cp` and `sh` that every node has: runs the short helper containers."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        ids = [node.id for node in self.nodes]
        twice = sorted({node_id for node_id in ids if ids.count(node_id) > 1})
        if twice:
            raise ValueError(f"two nodes are called '{twice[0]}'")
        return self

    @property
    def wanted_images(self) -> tuple[str, ...]:
        """Return the images that every node should have before anybody needs them there."""
        return tuple(sorted({self.helper_image, *self.images.values()}))

    def node(self, node_id: str) -> NodeSpec | None:
        """Return the node of that id, or None."""
        return next((node for node in self.nodes if node.id == node_id), None)


FIELDS = tuple(name for name in ClusterSpec.model_fields if name not in ("name", "helper_image"))
"""What a cluster's file may say, each as `cluster:<field>`."""


class SnapshotRef(Spec):
    """Names one snapshot: `<instance>/<generation>` in the snapshot store."""

    instance_id: str
    generation: int
    node_id: str
    """The node that it was taken on, and that keeps the quick copy."""
    live: bool = False
    """Taken while the instance ran, and went on running."""
    volume: Literal["docker", "ebs"] = "docker"
    """What the home was on, which says where it is kept: in the snapshot store, or as a snapshot in the cloud."""


class RestoreSpec(Spec):
    """What an instance's volume and image are filled from before its container starts."""

    snapshot: SnapshotRef
    method: str
    """`quick_start` or `full_restore`: what was asked for; the Restore resource's outputs say what was done."""


class CloudVolumeSpec(Spec):
    """The cloud volume that an instance's home is on."""

    size_gib: int = Field(ge=1)
    generation: int
    """Of the wish that it is made for: tells its creation from that of one that was removed."""
    restored_generation: int = 0
    """The snapshot that the instance was revived from; 0 for its first life."""


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
    cloud_volume: CloudVolumeSpec | None = None
    """Where the node's homes are on cloud volumes."""
    restore: RestoreSpec | None = None
    snapshots: tuple[SnapshotRef, ...] = ()
