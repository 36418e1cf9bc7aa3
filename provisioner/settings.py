"""Settings of the service: one frozen object, built once at start, from `MACHINEUSE_*` environment variables.

What a cluster *is* (nodes, images) is not here but in `Pulumi.<cluster>.yaml`, where it is reviewed.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CHECKOUT = Path(__file__).resolve().parent.parent
PASSPHRASE = "passphrase"
_POSTGRESQL = ("postgresql://", "postgres://")
_FILES = "file://"
_STATE_SCHEMES = (_FILES, "s3://", "postgres://", "https://", "gs://", "azblob://")


class Settings(BaseSettings):
    """Everything that can be set from outside; each field is `MACHINEUSE_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix="MACHINEUSE_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # some have passwords in them
    )

    project_dir: Path = CHECKOUT
    """Where Pulumi.yaml and Pulumi.<cluster>.yaml are."""
    data_dir: Path = Path(".machineuse")
    """Everything kept on disk; relative to `project_dir`."""
    cluster: str = "local"
    ledger: SecretStr | None = None
    """`postgresql://user:password@host/database`, or a SQLite file's path; by default `ledger.db` in the data
    directory. Several services on one ledger are replicas: all answer, one changes the nodes."""
    lease_s: float = Field(default=5, ge=2)
    """How long a replica that leads may be silent before another one takes over."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    tokens: tuple[SecretStr, ...] = ()
    """Bearer tokens; none = no authentication, which only loopback may have. JSON list in the environment."""
    public_address: str | None = None
    """Host name in the URLs of instances on this machine: in place of a node's address that is loopback."""
    log_format: Literal["auto", "text", "json"] = "auto"

    idle_after_s: float = Field(default=60, gt=0)
    """Seconds without CDP or live-view activity after which an instance is idle."""
    idle_check_s: float = Field(default=5, gt=0)
    minute_s: float = Field(default=60, gt=0)
    """Length of a minute of `idle_timeout_minutes`; tests make it short."""
    heartbeat_s: float = Field(default=5, gt=0)
    node_timeout_s: float = Field(default=5, gt=0)
    offline_after_misses: int = Field(default=3, ge=1)
    sample_s: float = Field(default=15, gt=0, le=60)
    """What is older than a minute and a half is not shown as what is used now."""
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
    disk_overcommit: float = Field(default=4.0, gt=0)
    """How many times a node's disk may be promised, where its size is known: homes start small."""
    free_disk_gb: float = Field(default=2.0, ge=0)
    """Free disk, in GiB, below which a node takes nothing new, whatever was promised."""
    snapshot_keep: int = Field(default=1, ge=1)
    """How many snapshots of an instance are kept once a newer one is verified."""
    state: SecretStr | None = None
    """Where the Pulumi state is kept: `s3://bucket?region=…&endpoint=…&s3ForcePathStyle=true`, `postgres://…` or any
    other URL that `pulumi login` takes; by default files in the data directory."""
    secrets_provider: str = PASSPHRASE
    """What encrypts secrets in the state, as `pulumi stack init` takes it: `awskms://…`, for instance. When the stack
    is made, what belongs to that is written into `Pulumi.<cluster>.yaml`."""
    passphrase_file: Path | None = None
    """The file of the stack's passphrase, which all replicas share; by default one in the data directory."""
    snapshot_store: str | None = None
    """A directory's path, by default `snapshots` in the data directory; or `s3://bucket/prefix?endpoint=…&region=…&sse=…`,
    with its keys where boto3 looks for them (AWS_ACCESS_KEY_ID, AWS_PROFILE, the machine's role)."""
    snapshot_keys: str | None = None
    """What snapshots are encrypted with: the path of a key file, or `aws-kms://<ARN>?file=…&endpoint=…` for one that a
    KMS key encrypts (`file` is by default `snapshot-keys.json` in the data directory). None: they are not encrypted."""
    snapshot_encrypted_only: bool = False
    """Restore no snapshot that is not encrypted: without it, the store's owner can put such a one in place."""

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

    @field_validator("ledger")
    @classmethod
    def _check_ledger(cls, value: SecretStr | None) -> SecretStr | None:
        url = value.get_secret_value() if value else ""
        if "://" in url and not url.startswith(_POSTGRESQL):
            raise ValueError("a ledger is a file's path or postgresql://user:password@host/database")
        return value

    @field_validator("state")
    @classmethod
    def _check_state(cls, value: SecretStr | None) -> SecretStr | None:
        url = value.get_secret_value() if value else _FILES + "/"
        if not url.startswith(_STATE_SCHEMES) or (url.startswith(_FILES) and not url.startswith(f"{_FILES}/")):
            raise ValueError(f"a state's URL begins with {', '.join(_STATE_SCHEMES)}; a file's path is absolute")
        return value

    @property
    def ledger_location(self) -> Path | SecretStr:
        """Return where the ledger is: a SQLite file, or a PostgreSQL database's URL."""
        if self.ledger is None:
            return self.data_dir / "ledger.db"
        if self.ledger.get_secret_value().startswith(_POSTGRESQL):
            return self.ledger
        return self.project_dir / Path(self.ledger.get_secret_value()).expanduser()

    @property
    def ledger_text(self) -> str:
        """Return where the ledger is as text, for other processes; it may have a password in it."""
        location = self.ledger_location
        return str(location) if isinstance(location, Path) else location.get_secret_value()

    @property
    def state_url(self) -> str:
        """Return what PULUMI_BACKEND_URL is; it may have a password in it."""
        return self.state.get_secret_value() if self.state else f"{_FILES}{self.data_dir / 'state'}"

    @property
    def state_is_local(self) -> bool:
        """Say whether the Pulumi state is in files."""
        return self.state_url.startswith(_FILES)

    @property
    def state_dir(self) -> Path:
        """Return the directory of the Pulumi state, where it is in files."""
        return Path(self.state_url.removeprefix(_FILES))

    @property
    def pulumi_home(self) -> Path:
        """Return the PULUMI_HOME of our own."""
        return self.data_dir / "pulumi-home"

    @property
    def needs_passphrase(self) -> bool:
        """Say whether a passphrase encrypts the secrets in the state."""
        return self.secrets_provider == PASSPHRASE

    @property
    def passphrase_path(self) -> Path:
        """Return the file of the stack's passphrase, mode 0600 where it is ours."""
        if self.passphrase_file is not None:
            return self.project_dir / self.passphrase_file.expanduser()
        return self.data_dir / "passphrase"

    @property
    def snapshots_dir(self) -> Path:
        """Return the directory of the snapshot store, where it is one."""
        return Path(self.snapshot_store).expanduser() if self.snapshot_store else self.data_dir / "snapshots"

    @property
    def snapshot_keys_path(self) -> Path:
        """Return the key file of the snapshots, where none is named."""
        return self.data_dir / "snapshot-keys.json"

    @property
    def bound_to_loopback(self) -> bool:
        """Say whether the service is reachable from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
