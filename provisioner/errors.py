"""The one exception family of Machineuse.

Every error carries three texts: `message`, one sentence a caller of the API may see; `detail`, what the log gets (an
engine's own words, a path, a URN); `resolution`, what the reader can do about it. `code` is stable: clients match on
it. Third-party exceptions are wrapped where their library is used, with `from`. Nothing here knows HTTP: the API maps
classes to statuses in one table.
"""

from __future__ import annotations

from typing import ClassVar


class MachineuseError(Exception):
    """Base of everything that Machineuse raises on purpose."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, detail: str | None = None, resolution: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.resolution = resolution

    def explain(self) -> str:
        """Return message and resolution as the one text that a user is shown."""
        return f"{self.message} {self.resolution}" if self.resolution else self.message


class InvalidRequest(MachineuseError):
    """The caller asks for something that can never be had."""

    code = "invalid_request"


class UnknownImage(InvalidRequest):
    """No node has the image and no registry offers it."""

    code = "unknown_image"


class UnknownNode(InvalidRequest):
    """The request names a node that the cluster does not have."""

    code = "unknown_node"


class NotFound(MachineuseError):
    """The thing asked for does not exist."""

    code = "not_found"


class Conflict(MachineuseError):
    """The thing exists, but its state does not allow the operation."""

    code = "conflict"


class SnapshotFailed(Conflict):
    """A snapshot could not be taken, or its store not be used; the instance goes on as it was. Worth another try."""

    code = "snapshot_failed"


class SnapshotCorrupt(Conflict):
    """A stored snapshot is not what its manifest says; it is kept, and nothing was restored from it."""

    code = "snapshot_corrupt"


class SnapshotMissing(Conflict):
    """The snapshot, or the copy of it that was asked for, is not there."""

    code = "snapshot_missing"


class SnapshotKeyMissing(Conflict):
    """The key that a snapshot is, or is to be, encrypted with can't be had. Worth another try once it is back."""

    code = "snapshot_key_missing"


class ObjectStorageError(MachineuseError):
    """An S3 server refused, failed, or could not be reached."""

    code = "object_storage_error"


class ObjectMissing(ObjectStorageError):
    """There is no such object."""

    code = "object_missing"


class CloudError(MachineuseError):
    """A cloud refused, failed, or could not be reached."""

    code = "cloud_error"


class CloudMissing(CloudError):
    """There is no such volume, snapshot or machine in the cloud."""

    code = "cloud_missing"


class CloudConflict(Conflict):
    """A cloud volume is where it can't be used, and what is on it is too dear to be moved by guess."""

    code = "cloud_conflict"


class NoCapacity(MachineuseError):
    """No node has room now."""

    code = "insufficient_resources"
    retry_after_s: ClassVar[int] = 10


class DockerError(MachineuseError):
    """A Docker engine refused or failed."""

    code = "docker_error"


class DockerNotFound(DockerError):
    """The Docker object is not there."""

    code = "docker_not_found"


class NodeUnreachable(DockerError):
    """A node's Docker engine does not answer."""

    code = "node_unreachable"


class PortTaken(DockerError):
    """Another process on the node holds a port that the instance was given."""

    code = "port_taken"


class NotReady(MachineuseError):
    """An instance did not become usable in time, or its container keeps ending."""

    code = "not_ready"


class EngineError(MachineuseError):
    """The Pulumi engine failed as a whole, not one resource in it."""

    code = "engine_error"


class StackLocked(EngineError):
    """Somebody else is updating the stack."""

    code = "stack_locked"


class LedgerMismatch(MachineuseError):
    """The ledger at hand is not the one that this stack belongs to, or there is none."""

    code = "ledger_mismatch"


class LedgerUnavailable(MachineuseError):
    """The ledger's database can't be reached now; what is to be written may or may not have been."""

    code = "ledger_unavailable"


class LeaseLost(MachineuseError):
    """This process does not lead any more: another one may, and changes the nodes."""

    code = "lease_lost"


class StillWanted(MachineuseError):
    """A plugin was asked to delete something that the ledger wants alive."""

    code = "still_wanted"


class SetupError(MachineuseError):
    """Something that Machineuse needs is not on this machine and could not be put there."""

    code = "setup_error"


class SettingsError(MachineuseError):
    """A setting does not fit."""

    code = "settings_error"
