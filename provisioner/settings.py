"""Settings of the service: one frozen object, built once at start, from `MACHINEUSE_*` environment variables.

What a cluster *is* (nodes, images) is not here but in `Pulumi.<cluster>.yaml`, where it is reviewed.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CHECKOUT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Everything that can be set from outside; each field is `MACHINEUSE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="MACHINEUSE_", frozen=True, extra="ignore")

    project_dir: Path = CHECKOUT
    """Where Pulumi.yaml and Pulumi.<cluster>.yaml are."""
    data_dir: Path = Path(".machineuse")
    """Everything kept on disk; relative to `project_dir`."""
    cluster: str = "local"
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    tokens: tuple[SecretStr, ...] = ()
    """Bearer tokens; none = no authentication, which only loopback may have. JSON list in the environment."""
    public_address: str | None = None
    """Host name in the instances' URLs; by default the node's address."""
    log_format: Literal["auto", "text", "json"] = "auto"

    idle_after_s: float = Field(default=60, gt=0)
    """Seconds without CDP or live-view activity after which an instance is idle."""
    idle_check_s: float = Field(default=5, gt=0)
    minute_s: float = Field(default=60, gt=0)
    """Length of a minute of `idle_timeout_minutes`; tests make it short."""
    heartbeat_s: float = Field(default=5, gt=0)
    node_timeout_s: float = Field(default=5, gt=0)
    offline_after_misses: int = Field(default=3, ge=1)
    sample_s: float = Field(default=15, gt=0)
    disk_check_s: float = Field(default=60, gt=0)
    stop_timeout_s: int = Field(default=10, ge=0)
    """Seconds that a browser gets to shut down cleanly before it is killed."""
    ready_timeout_s: float = Field(default=60, gt=0)
    """Seconds that a new browser gets until its debug port answers."""
    default_wait_s: float = Field(default=30, ge=0)
    """How long a mutating call waits for its outcome without a `Prefer: wait=N` header."""
    create_attempts: int = Field(default=3, ge=1)
    memory_overcommit: float = Field(default=1.0, gt=0)
    cpu_overcommit: float = Field(default=16.0, gt=0)
    snapshot_keep: int = Field(default=1, ge=1)
    """How many snapshots of an instance are kept once a newer one is verified."""
    snapshot_store: str | None = None
    """A directory's path, by default `snapshots` in the data directory; or `s3://bucket/prefix?endpoint=…&region=…&sse=…`,
    with its keys where boto3 looks for them (AWS_ACCESS_KEY_ID, AWS_PROFILE, the machine's role)."""

    ec2_endpoint: str | None = None
    """Where EC2 is, if not at AWS: for an emulator. Keys are where boto3 looks."""
    ebs_type: str = "gp3"
    ebs_encrypted: bool = True
    ebs_kms_key: str | None = None
    """The key that cloud volumes are encrypted with; by default the account's own for EBS."""
    cloud_check_s: float = Field(default=3600, gt=0)
    """How often the cloud is searched for volumes and snapshots that no instance needs."""

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        object.__setattr__(self, "project_dir", self.project_dir.resolve())
        object.__setattr__(self, "data_dir", (self.project_dir / self.data_dir.expanduser()).resolve())
        return self

    @property
    def ledger_path(self) -> Path:
        """Return the SQLite file of the ledger."""
        return self.data_dir / "ledger.db"

    @property
    def state_dir(self) -> Path:
        """Return the directory of the Pulumi state."""
        return self.data_dir / "state"

    @property
    def pulumi_home(self) -> Path:
        """Return the PULUMI_HOME of our own."""
        return self.data_dir / "pulumi-home"

    @property
    def passphrase_path(self) -> Path:
        """Return the file of the stack's passphrase, mode 0600."""
        return self.data_dir / "passphrase"

    @property
    def snapshots_dir(self) -> Path:
        """Return the directory of the snapshot store, where it is one."""
        return Path(self.snapshot_store).expanduser() if self.snapshot_store else self.data_dir / "snapshots"

    @property
    def bound_to_loopback(self) -> bool:
        """Say whether the service is reachable from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
