"""The inputs of the `machineuse` resources, as the engine sends them: camelCase, and possibly unknown in a preview."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from provisioner.docker_hosts.hosts import DockerHost, DockerHosts
from provisioner.errors import InvalidRequest
from provisioner.plugins.resources import Change, ChangeKind, Checked, Difference, Failure
from provisioner.plugins.values import Properties, has_unknowns
from provisioner.snapshots.manifest import ID_PATTERN, SnapshotId
from provisioner.snapshots.mark import Method


class Inputs(BaseModel):
    """Base of the input models."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class EndpointInputs(Inputs):
    """How an engine is reached."""

    docker_host: str
    """Empty for a snapshot whose node the cluster does not have any more: then the archive is all there is."""
    docker_cert_path: str | None = None
    docker_ssh_opts: tuple[str, ...] | None = None

    def host(self, hosts: DockerHosts) -> DockerHost:
        """Return the engine."""
        return hosts.get(self.docker_host, cert_path=self.docker_cert_path, ssh_opts=self.docker_ssh_opts or ())


class SnapshotInputs(EndpointInputs):
    """Which instance to take a snapshot of, and where it is."""

    cluster: str
    ledger_id: str
    instance: str = Field(pattern=ID_PATTERN)
    generation: int = Field(ge=0)
    node_id: str
    container: str
    volume: str
    image: str
    home_path: str
    copy_volume: str
    helper_image: str
    stop_timeout_s: int = Field(default=10, ge=0)
    live: bool = False
    cloud_region: str | None = None
    """Where the home is on a cloud volume: its region."""

    @property
    def snapshot(self) -> SnapshotId:
        """Return what names the snapshot in the store."""
        return SnapshotId(instance_id=self.instance, generation=self.generation)


class RestoreInputs(EndpointInputs):
    """Which snapshot to give back, how, and into which volume."""

    cluster: str
    ledger_id: str
    instance: str = Field(pattern=ID_PATTERN)
    snapshot_generation: int = Field(ge=0)
    method: Method
    node_id: str
    volume: str
    image: str
    helper_image: str
    copy_volume: str
    cloud_volume: str | None = None
    """The cloud volume that the home volume is on, where it is on one."""

    @property
    def snapshot(self) -> SnapshotId:
        """Return what names the snapshot in the store."""
        return SnapshotId(instance_id=self.instance, generation=self.snapshot_generation)


class NodeImageInputs(EndpointInputs):
    """Which image to have on which node, and which engines may have it."""

    node_id: str
    image: str
    sources: tuple[EndpointInputs, ...] = ()
    emulated: str | None = None


class CloudVolumeInputs(EndpointInputs):
    """Whose volume it is, where it has to be, and what it is made from."""

    cluster: str
    ledger_id: str
    instance: str = Field(pattern=ID_PATTERN)
    generation: int = Field(ge=0)
    restored_generation: int = Field(ge=0)
    name: str
    node_id: str
    machine: str
    zone: str = Field(min_length=1)
    size_gib: int = Field(ge=1)
    helper_image: str


class ClaimInputs(Inputs):
    """The ledger that the stack belongs to."""

    ledger_id: str


M = TypeVar("M", bound=Inputs)


def check(model: type[M], news: Properties) -> Checked:
    """Return the inputs with defaults, or what is wrong with them; what a preview doesn't know is taken as it is."""
    known = {key: value for key, value in _declared(news).items() if not has_unknowns(value)}
    unknown = {key: value for key, value in news.items() if has_unknowns(value)}
    try:
        checked = model.model_validate(known).model_dump(mode="json", by_alias=True, exclude_none=True)
    except ValidationError as error:
        failures = [
            Failure(property=".".join(map(str, problem["loc"])), reason=problem["msg"])
            for problem in error.errors()
            if not (problem["type"] == "missing" and problem["loc"][0] in unknown)
        ]
        return Checked(inputs=news, failures=tuple(failures))
    return Checked(inputs=checked | unknown)


def parse(model: type[M], properties: Properties) -> M:
    """Return the inputs as the model; raises `InvalidRequest`. What the model doesn't know (an output) is left out."""
    aliases = {field.alias for field in model.model_fields.values()}
    try:
        return model.model_validate({key: value for key, value in properties.items() if key in aliases})
    except ValidationError as error:
        raise InvalidRequest(f"The inputs of a {model.__name__} are not valid.", detail=str(error)) from error


def differ(identity: tuple[str, ...], *, old: Properties, new: Properties) -> Difference:
    """Return a difference only where the identity changed: what was done once is not undone for anything else."""
    return Difference(
        changes={key: Change(kind=ChangeKind.UPDATE, replace=True) for key in identity if old.get(key) != new.get(key)}
    )


def _declared(properties: Properties) -> dict[str, Any]:
    return {key: value for key, value in properties.items() if not key.startswith("__")}
