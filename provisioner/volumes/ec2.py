"""AWS EC2, one region a client: the only place that knows boto3's EC2.

Calls are bounded: 5 s to connect, 30 s for an answer, a fixed number of attempts, with boto3's own pauses where AWS
says that it is too much. Credentials come from boto3's ordinary chain and never from a setting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnection

from provisioner.aws_credentials import NO_CREDENTIALS
from provisioner.errors import CloudError, CloudMissing
from provisioner.volumes.cloud import (
    Attachment,
    CloudSnapshot,
    DeviceNameTaken,
    Machine,
    SnapshotProgress,
    TokenSpent,
    Volume,
    VolumeBusy,
    VolumeState,
)

if TYPE_CHECKING:
    from types_boto3_ec2 import EC2Client
    from types_boto3_ec2.type_defs import FilterTypeDef, SnapshotTypeDef, VolumeTypeDef

ATTEMPTS = 6

_KEYS = {
    "AuthFailure",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "RequestExpired",
    "SignatureDoesNotMatch",
}
_FORBIDDEN = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
_MISSING = {
    "InvalidInstanceID.Malformed",
    "InvalidInstanceID.NotFound",
    "InvalidSnapshot.NotFound",
    "InvalidSnapshotID.Malformed",
    "InvalidVolume.NotFound",
    "InvalidVolumeID.Malformed",
}
_BUSY = {
    "IncorrectInstanceState",
    "InvalidAttachment.NotFound",
    "IncorrectState",
    "IncorrectModificationState",
    "InvalidSnapshot.InUse",
    "VolumeInUse",
}
_FULL = {
    "AttachmentLimitExceeded": "Let the node have fewer instances (max_instances): its machine takes no more volumes.",
    "ConcurrentSnapshotLimitExceeded": "Wait for the snapshots under way, or ask AWS for a higher quota.",
    "InsufficientVolumeCapacity": "Use nodes in another zone.",
    "MaxIOPSLimitExceeded": "Ask AWS for a higher quota.",
    "PendingSnapshotLimitExceeded": "Wait for the snapshots under way, or ask AWS for a higher quota.",
    "SnapshotCreationPerVolumeRateExceeded": "Wait a minute.",
    "SnapshotLimitExceeded": "Delete instances that nobody needs, or ask AWS for a higher quota.",
    "VolumeLimitExceeded": "Delete instances or make some dormant, or ask AWS for a higher quota.",
}
_SLOW_DOWN = {"RequestLimitExceeded", "Throttling", "ThrottlingException"}


@dataclass(frozen=True, kw_only=True)
class Ec2Options:
    """What is the same for all volumes of a service."""

    endpoint: str | None = None
    """Instead of AWS's own; for an emulator."""
    volume_type: str = "gp3"
    encrypted: bool = True
    kms_key: str | None = None


class Ec2Regions:
    """AWS's regions; nothing is connected before it is needed."""

    def __init__(self, options: Ec2Options) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._regions: dict[str, Ec2] = {}

    def of(self, region: str) -> Ec2:
        """Return a region, always the same object. Raises CloudError for a profile that can't be read."""
        with self._lock:
            found = self._regions.get(region)
            if found is None:
                found = self._regions[region] = Ec2(region, options=self._options)
            return found


class Ec2:
    """EC2 in one region, as `provisioner.volumes.cloud.Cloud` describes it. Safe for several threads."""

    def __init__(self, region: str, *, options: Ec2Options, client: EC2Client | None = None) -> None:
        self.region = region
        self._options = options
        self._where = f"EC2 in {region}" + (f" at {options.endpoint}" if options.endpoint else "")
        with self._calling("be set up"):
            self._client: EC2Client = client or boto3.session.Session().client(
                "ec2",
                region_name=region,
                endpoint_url=options.endpoint,
                config=Config(
                    connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": ATTEMPTS}
                ),
            )

    # -- volumes

    def find_volumes(self, tags: Mapping[str, str]) -> list[Volume]:
        """Return the volumes with these tags, in whatever state."""
        return self._list_volumes(_tag_filters(tags))

    def find_attached(self, machine: str) -> list[Volume]:
        """Return the volumes that a machine has, or is getting, or letting go."""
        return self._list_volumes([{"Name": "attachment.instance-id", "Values": [machine]}])

    def describe_volume(self, volume_id: str) -> Volume:
        """Return one volume; raises `CloudMissing`."""
        with self._calling(f"describe volume {volume_id}"):
            found = self._client.describe_volumes(VolumeIds=[volume_id])["Volumes"]
        if not found:
            raise CloudMissing(f"{self._where} has no volume {volume_id}.")
        return _volume(found[0])

    def create_volume(
        self, *, token: str, zone: str, size_gib: int, snapshot_id: str | None, tags: Mapping[str, str]
    ) -> Volume:
        """Create a volume; the same token again gives the same one, even if it is deleted. Raises `TokenSpent`."""
        arguments: dict[str, Any] = {"SnapshotId": snapshot_id} if snapshot_id else {}
        if self._options.encrypted:  # what comes from an encrypted snapshot is so anyway
            arguments["Encrypted"] = True
            if self._options.kms_key:
                arguments["KmsKeyId"] = self._options.kms_key
        with self._calling(f"create a volume of {size_gib} GiB in {zone}"):
            made: Any = self._client.create_volume(
                AvailabilityZone=zone,
                Size=size_gib,
                VolumeType=self._options.volume_type,  # type: ignore[arg-type]  # a setting: AWS knows which there are
                ClientToken=token,
                TagSpecifications=[{"ResourceType": "volume", "Tags": _tag_list(tags)}],
                **arguments,
            )
        return _volume(made)

    def attach(self, volume_id: str, *, machine: str, device: str) -> None:
        """Begin to attach. Raises `VolumeBusy`, `DeviceNameTaken`, `CloudMissing`."""
        with self._calling(f"attach volume {volume_id} to {machine}"):
            self._client.attach_volume(VolumeId=volume_id, InstanceId=machine, Device=device)

    def detach(self, volume_id: str, *, machine: str, force: bool) -> None:
        """Begin to detach; one that is not attached, or being detached, is a success. Raises `CloudMissing`."""
        try:
            with self._calling(f"detach volume {volume_id} from {machine}"):
                self._client.detach_volume(VolumeId=volume_id, InstanceId=machine, Force=force)
        except VolumeBusy:
            held = self.describe_volume(volume_id).attachment
            if held is not None and not held.leaving:
                raise

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume; one that is gone is a success. Raises `VolumeBusy`."""
        self._delete(f"delete volume {volume_id}", lambda: self._client.delete_volume(VolumeId=volume_id))

    def tag(self, resource_id: str, tags: Mapping[str, str]) -> None:
        """Add tags."""
        with self._calling(f"tag {resource_id}"):
            self._client.create_tags(Resources=[resource_id], Tags=_tag_list(tags))

    # -- snapshots

    def find_snapshots(self, tags: Mapping[str, str]) -> list[CloudSnapshot]:
        """Return our own snapshots with these tags, in whatever state."""
        with self._calling("list snapshots"):
            pages = self._client.get_paginator("describe_snapshots").paginate(
                OwnerIds=["self"], Filters=_tag_filters(tags)
            )
            return [_snapshot(found) for page in pages for found in page["Snapshots"]]

    def describe_snapshot(self, snapshot_id: str) -> CloudSnapshot:
        """Return one snapshot; raises `CloudMissing`."""
        with self._calling(f"describe snapshot {snapshot_id}"):
            found = self._client.describe_snapshots(SnapshotIds=[snapshot_id])["Snapshots"]
        if not found:
            raise CloudMissing(f"{self._where} has no snapshot {snapshot_id}.")
        return _snapshot(found[0])

    def create_snapshot(self, volume_id: str, *, description: str, tags: Mapping[str, str]) -> CloudSnapshot:
        """Begin a snapshot of what is on the volume now. Not idempotent: look for one first."""
        with self._calling(f"take a snapshot of {volume_id}"):
            made: Any = self._client.create_snapshot(
                VolumeId=volume_id,
                Description=description,
                TagSpecifications=[{"ResourceType": "snapshot", "Tags": _tag_list(tags)}],
            )
        return _snapshot(made)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot, whole or not; one that is gone is a success."""
        self._delete(f"delete snapshot {snapshot_id}", lambda: self._client.delete_snapshot(SnapshotId=snapshot_id))

    # -- machines

    def describe_machine(self, machine: str) -> Machine:
        """Return a machine; raises `CloudMissing`."""
        with self._calling(f"describe machine {machine}"):
            answer = self._client.describe_instances(InstanceIds=[machine])
        for reservation in answer["Reservations"]:
            for found in reservation.get("Instances", ()):
                return Machine(
                    id=found["InstanceId"], state=found["State"]["Name"], zone=found["Placement"]["AvailabilityZone"]
                )
        raise CloudMissing(f"{self._where} has no machine {machine}.")

    # -- calls

    def _list_volumes(self, filters: list[FilterTypeDef]) -> list[Volume]:
        with self._calling("list volumes"):
            pages = self._client.get_paginator("describe_volumes").paginate(Filters=filters)
            return [_volume(found) for page in pages for found in page["Volumes"]]

    def _delete(self, what: str, call: Callable[[], object]) -> None:
        try:
            with self._calling(what):
                call()
        except CloudMissing:
            return

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Turn what boto3 raises inside into our errors; `what` completes "could not …"."""
        message = f"{self._where} could not {what}"
        try:
            yield
        except ClientError as error:
            raise _explain(error, message=message) from error
        except NO_CREDENTIALS as error:
            raise CloudError(
                f"{message}: there are no credentials.",
                detail=str(error),
                resolution="Put them where boto3 looks: AWS_ACCESS_KEY_ID, AWS_PROFILE, or the machine's role.",
            ) from error
        except (NoConnection, HTTPClientError) as error:
            raise CloudError(
                f"{message}: it does not answer.",
                detail=f"{type(error).__name__}: {error}",
                resolution="Check the network, and MACHINEUSE_EC2_ENDPOINT if it is set.",
            ) from error
        except (BotoCoreError, ValueError) as error:
            raise CloudError(
                f"{message}: {error}",
                detail=f"{type(error).__name__}: {error}",
                resolution="Look into MACHINEUSE_EC2_ENDPOINT and the AWS profile (AWS_PROFILE, ~/.aws/config).",
            ) from error


def _explain(error: ClientError, *, message: str) -> CloudError:
    code, said = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    detail = f"{code}: {said}"
    if code in _MISSING:
        return CloudMissing(f"{message}: there is no such thing.", detail=detail)
    if code == "IdempotentParameterMismatch":
        return TokenSpent(f"{message}: the request's token was used for something else.", detail=detail)
    if code == "InvalidParameterValue" and "already in use" in said:
        return DeviceNameTaken(f"{message}: the machine has another device of that name.", detail=detail)
    if code in _BUSY:
        return VolumeBusy(f"{message}: {said}", detail=detail)
    if code == "InvalidVolume.ZoneMismatch":
        resolution = "Correct the node's cloud.zone in the cluster's file: it is not the zone of its machine."
        return CloudError(f"{message}: they are in different zones.", detail=detail, resolution=resolution)
    if code in _SLOW_DOWN:
        return CloudError(f"{message}: it is asked too much.", detail=detail, resolution="Wait a minute.")
    if code in _KEYS:
        resolution = "Renew the service's AWS keys, and check its machine's clock: a wrong one makes them look expired."
        return CloudError(
            f"{message}: the credentials are not valid, or not any more.", detail=detail, resolution=resolution
        )
    if code in _FORBIDDEN:
        resolution = "Let the service's role do this; docs/cloud-volumes.md lists what it needs."
        return CloudError(f"{message}: the credentials don't allow it.", detail=detail, resolution=resolution)
    return CloudError(f"{message}: {said or code}", detail=detail, resolution=_FULL.get(code))


def _tag_list(tags: Mapping[str, str]) -> Any:
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def _tag_filters(tags: Mapping[str, str]) -> list[FilterTypeDef]:
    return [{"Name": f"tag:{key}", "Values": [value]} for key, value in sorted(tags.items())]


def _tags(found: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in found.get("Tags") or ()}


def _volume(found: VolumeTypeDef) -> Volume:
    held = [each for each in found.get("Attachments") or () if each.get("State") != "detached"]
    attachment = None
    if held:
        attachment = Attachment(
            machine=held[0].get("InstanceId", ""), device=held[0].get("Device", ""), state=held[0].get("State", "")
        )
    return Volume(
        id=found["VolumeId"],
        state=VolumeState(found["State"]),
        zone=found["AvailabilityZone"],
        size_gib=found["Size"],
        created_at=found.get("CreateTime"),
        tags=_tags(found),
        attachment=attachment,
    )


def _snapshot(found: SnapshotTypeDef) -> CloudSnapshot:
    return CloudSnapshot(
        id=found["SnapshotId"],
        state=SnapshotProgress(found["State"]),
        volume_id=found["VolumeId"],
        size_gib=found["VolumeSize"],
        percent=found.get("Progress") or "",
        bytes=int(found.get("FullSnapshotSizeInBytes") or 0),
        started_at=found.get("StartTime"),
        message=found.get("StateMessage") or "",
        tags=_tags(found),
    )
