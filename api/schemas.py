"""The API's words: what it accepts and what it answers, field by field as the contract has it, additions only.

Requests are strict: a field that is not known is refused rather than ignored, `true` is not a number, and `"2"` is not
one either; `2.0` is the integer 2, as JSON has it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StringConstraints

from provisioner.ledger.records import Moving, NodeStatus, SnapshotState
from provisioner.states import Status
from stacks.spec import DEFAULT_IMAGE, Availability

MAX_SIZE_GB = 1_000_000.0
MAX_MINUTES = 2**31 - 1
MAX_INT64 = 2**63 - 1


def _whole(value: object) -> object:
    """Take 2.0 for 2; leave anything else to the strict check that follows."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: object) -> object:
    """Refuse whole numbers beyond what a float can hold, instead of overflowing."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INT64:
        raise ValueError("is out of range")
    return value


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Real = Annotated[float, Strict(), BeforeValidator(_real), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
ImageName = Annotated[str, Strict(), StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]*$", max_length=512)]
LabelName = Annotated[str, Strict(), StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=63)]
LabelValue = Annotated[str, Strict(), StringConstraints(pattern=r"^[A-Za-z0-9._/:-]*$", max_length=63)]
Labels = Annotated[dict[LabelName, LabelValue], Field(max_length=16, json_schema_extra={"additionalProperties": False})]
NodeName = Annotated[str, Strict(), StringConstraints(min_length=1, max_length=64)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class HealthResponse(_Answer):
    """Whether the service works, and how much there is."""

    status: str = Field(description="`healthy` when the service can answer at all.", examples=["healthy"])
    instances_count: int = Field(examples=[15])
    running_instances: int = Field(description="Running and idle ones.", examples=[12])
    nodes_count: int
    nodes_online: int
    leader: str | None = Field(
        description="Which of the services on this ledger changes the nodes, by host and process id; null while one"
        " takes over from another."
    )
    leading: bool = Field(description="Whether that is the one that answers.")


class InstanceConfig(_Request):
    """How big an instance is, and when it goes to sleep."""

    memory_gb: Real = Field(default=2, ge=0.125, le=MAX_SIZE_GB, description="Memory limit, in GiB.")
    cpu_cores: Whole = Field(default=2, ge=1, le=4096, description="CPU limit, in cores.")
    disk_gb: Real = Field(
        default=10,
        gt=0,
        le=MAX_SIZE_GB,
        description="Disk limit, in GiB; enforced where the node's storage driver can, watched elsewhere.",
    )
    idle_timeout_minutes: Whole = Field(
        default=30,
        ge=0,
        le=MAX_MINUTES,
        description="An idle instance goes dormant after so many minutes, if auto_snapshot; 0: never by itself.",
    )
    auto_snapshot: Flag = True


class CreateInstanceRequest(_Request):
    """A new instance; every field may be left out."""

    image: ImageName = Field(default=DEFAULT_IMAGE, description="A name of the cluster's catalogue, or any image.")
    config: InstanceConfig = InstanceConfig()
    node_preference: NodeName | None = Field(default=None, description="The node to use while it has room.")
    node_strict: Flag = Field(default=False, description="Refuse rather than use another node than the preferred one.")
    node_labels: Labels = Field(
        default={},
        description="What its node must be labelled, now and whenever it is revived.",
        examples=[{"zone": "b"}],
    )


class ReviveRequest(_Request):
    """How to bring a dormant instance back."""

    method: Literal["quick_start", "full_restore"] = Field(
        default="quick_start",
        description="`quick_start`: from the node's own copy; `full_restore`: from the verified archive.",
    )
    node_preference: NodeName | None = Field(
        default=None, description="The node to use while it has room; without one, the node with the copy."
    )
    node_strict: Flag = Field(default=False, description="Refuse rather than use another node than the preferred one.")


class ResourceUsage(_Answer):
    """Real usage, in percent of the limit; 0 for what does not run or was not measured yet."""

    cpu_percent: float
    memory_percent: float
    disk_percent: float


class InstanceUrls(_Answer):
    """Where clients connect; null for what the instance does not have (now)."""

    debug: str | None = Field(description="CDP: give it to Playwright's `connect_over_cdp`, Puppeteer or Selenium.")
    stream: str | None = Field(description="The live screen, as a web page.")


class InstanceError(_Answer):
    """What went wrong last."""

    code: str
    message: str


class Snapshot(_Answer):
    """One snapshot of an instance."""

    generation: int
    state: SnapshotState
    bytes: int | None
    live: bool = Field(description="Taken while the instance ran, and went on running.")
    node_id: str
    created_at: datetime


class Instance(_Answer):
    """One browser."""

    id: str
    status: Status
    node_id: str
    subdomain: str
    debug_port: int | None = Field(description="Null while it is dormant, and for an image without a browser.")
    stream_port: int | None = Field(description="Null while it is dormant, and for an image without a browser.")
    created_at: datetime
    config: InstanceConfig
    resources: ResourceUsage
    urls: InstanceUrls
    image: str = Field(description="What really runs.")
    image_requested: str
    image_base: str | None = Field(
        description="What that was built on, where its label `machineuse.base` tells: the project's browser image does."
    )
    operation: str | None = Field(
        description="What is under way: creating, making_dormant, reviving, moving (until it runs on another node),"
        " repairing, restarting (after a dormancy that failed) or deleting; null for nothing."
    )
    moving: Moving | None = Field(
        description="Why it is on its way to another node: `drain`, or `offline` when its node is lost; else null."
    )
    error: InstanceError | None
    node_status: NodeStatus
    node_labels: dict[str, str] = Field(description="What its node must be labelled, as it was asked for.")
    last_active_at: datetime
    snapshots: list[Snapshot]
    restored_by: str | None = Field(
        description="How it was last restored: by the method asked for, or the one that it fell back to."
    )
    restore_note: str | None = Field(
        description="Why another method than the one asked for was used, and what may be missing."
    )
    disk_bytes: int | None
    disk_over: bool = Field(description="Whether it uses more than disk_gb.")
    disk_enforced: bool = Field(
        description="Whether disk_gb can't be exceeded: by a cloud volume's size, or the node's storage."
    )


class InstanceList(_Answer):
    """One page of instances, oldest first."""

    instances: list[Instance]
    total: int
    limit: int
    offset: int


class InstanceEvent(_Answer):
    """Something that happened to an instance."""

    id: int
    at: datetime
    kind: str
    message: str


class NodeAmounts(_Answer):
    """Amounts of what instances need of a node."""

    memory_gb: float
    cpu_cores: float
    disk_gb: float | None = Field(description="Null where the size of the node's disk is unknown.")


class Node(_Answer):
    """One Docker host."""

    id: str
    status: NodeStatus
    address: str
    instances_count: int = Field(description="Those that hold a place on it; dormant ones hold none.")
    max_instances: int
    resources: ResourceUsage
    last_heartbeat: datetime | None = Field(description="Null until its engine answered for the first time.")
    error: str | None = Field(description="Why it is offline.")
    cpu_cores: float | None
    memory_bytes: int | None
    disk_bytes: int | None
    availability: Availability = Field(description="`cordoned` and `draining` nodes get nothing new.")
    labels: dict[str, str] = Field(description="The cluster's file's, and what its engine says: `arch` and `os`.")
    reserved: NodeAmounts = Field(description="What its instances were promised; dormant ones hold nothing.")
    reservable: NodeAmounts | None = Field(
        description="What it may promise in all: what it has, times the overcommit settings; null until it answered."
    )


class NodeList(_Answer):
    """The cluster's nodes."""

    nodes: list[Node]


class ClusterMetrics(_Answer):
    """The whole cluster, or the one node asked for, now."""

    total_instances: int
    running_instances: int
    avg_cpu_percent: float
    avg_memory_percent: float


class Timeseries(_Answer):
    """Averages over time: the three lists have one length."""

    timestamps: list[str]
    cpu: list[float]
    memory: list[float]


class MetricsResponse(_Answer):
    """How much was used."""

    cluster: ClusterMetrics
    timeseries: Timeseries


class MessageResponse(_Answer):
    """One sentence."""

    message: str
