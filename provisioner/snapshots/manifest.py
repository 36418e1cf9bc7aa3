"""The manifest: what a snapshot consists of. A manifest that exists belongs to a snapshot that is whole.

A snapshot is `<instance>/<generation>` and has up to two parts, each a tar compressed with zstd:

- `home.tar.zst`: the home volume, as Docker's archive of the home directory (its entries start with the directory's
  own name, so that its owner and mode are kept too);
- `rootfs.tar.zst`: what changed above the image, names relative to `/`. Only there when something did change.

Where the home is a cloud volume, `cloud_home` names the cloud's snapshot of it, and there is no `home.tar.zst`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION: Literal[1] = 1

ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"


class PartName(StrEnum):
    """The names that a part can have, in the order in which they are restored."""

    HOME = "home.tar.zst"
    ROOTFS = "rootfs.tar.zst"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SnapshotId(_Frozen):
    """Names one snapshot. Safe as a path: neither field can hold a separator or a dot."""

    instance_id: str = Field(pattern=ID_PATTERN)
    generation: int = Field(ge=0)

    def __str__(self) -> str:
        return f"{self.instance_id}/{self.generation}"


class Part(_Frozen):
    """One archive of a snapshot."""

    name: PartName
    bytes: int = Field(ge=0)
    """Size as stored: compressed, and maybe encrypted."""
    sha256: str = Field(pattern=SHA256_PATTERN)
    """Of the stored bytes: the encrypted ones where the snapshot is."""
    uncompressed_bytes: int = Field(ge=0)
    entries: int = Field(ge=0)
    """How many entries the tar has."""


class ImageIdentity(_Frozen):
    """The image that the instance was created from, before anything was restored onto it."""

    reference: str
    id: str
    """The engine's content address of the image, `sha256:…`."""


class Encryption(_Frozen):
    """How a snapshot is sealed; see `provisioner.snapshots.sealing`."""

    scheme: Literal["tink-streaming-aead"] = "tink-streaming-aead"
    key_id: int
    """Of the key in the key file."""
    seal: str
    """Base64: what of the manifest is not readable, bound to what is."""


class CloudHome(_Frozen):
    """The home directory as a cloud keeps it: a whole file system, of which only the cloud has the bytes."""

    provider: Literal["aws"] = "aws"
    region: str
    snapshot_id: str
    volume_id: str
    """What it was taken of; long gone when it is restored."""
    size_gib: int = Field(ge=1)
    bytes: int = Field(default=0, ge=0)
    """What it takes up, where the cloud says."""


class Manifest(_Frozen):
    """Everything that must be known to restore a snapshot; stored as `manifest.json`, written last."""

    format_version: Literal[1] = FORMAT_VERSION
    instance_id: str = Field(pattern=ID_PATTERN)
    cluster: str
    generation: int = Field(ge=0)
    created_at: datetime
    node_id: str
    image: ImageIdentity
    home_path: str
    live: bool = False
    """Taken while the container ran: `stopped_cleanly` is False, and some 30 s of its profile may be missing."""
    stopped_cleanly: bool
    """False when the container had to be killed: the last seconds of its profile may be missing."""
    container_id: str
    run_started_at: datetime | None
    """When that container was started, by the node's clock: a later start of it makes the snapshot stale."""
    parts: tuple[Part, ...]
    changed_paths: int = Field(ge=0)
    """How many paths above the image `rootfs.tar.zst` carries."""
    deleted_paths: tuple[str, ...] = ()
    """Paths of the image that are gone. Not written where the seal has them."""
    encryption: Encryption | None = None
    """None where the parts are only compressed."""
    cloud_home: CloudHome | None = None
    """Where the home is, if it is no part."""

    @property
    def id(self) -> SnapshotId:
        """Return what names this snapshot."""
        return SnapshotId(instance_id=self.instance_id, generation=self.generation)

    @property
    def stored_bytes(self) -> int:
        """Return the stored size of all parts together, and of a home in the cloud."""
        return sum(part.bytes for part in self.parts) + (self.cloud_home.bytes if self.cloud_home else 0)

    def part(self, name: PartName) -> Part | None:
        """Return the part of that name, or None."""
        return next((part for part in self.parts if part.name is name), None)

    @property
    def home(self) -> Part:
        """Return the home archive; every snapshot has one, unless its home is in a cloud."""
        home = self.part(PartName.HOME)
        if home is None:
            raise ValueError(f"the manifest of {self.id} lists no {PartName.HOME.value}")
        return home

    def to_json(self) -> bytes:
        """Return the manifest as it is stored."""
        # What is as it always was is written as it always was.
        left_out = {"encryption"} if self.encryption is None else {"deleted_paths"}
        if not self.live:
            left_out.add("live")
        if self.cloud_home is None:
            left_out.add("cloud_home")
        return self.model_dump_json(indent=2, exclude=left_out).encode() + b"\n"
