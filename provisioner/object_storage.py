"""One bucket of an S3 server: the only place that knows boto3.

Everything is bounded: memory (two parts of an upload), time (time-outs, a fixed number of attempts), and what a part
that is read may be resumed after its connection broke. Credentials come from boto3's ordinary chain (environment,
profile, role of the machine) and never from a setting; neither they nor the requests' headers are put into an error.
SHA-256 checksums go along with everything that is sent; a server that knows them refuses what arrives otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as NoConnection

from provisioner.aws_credentials import NO_CREDENTIALS
from provisioner.errors import ObjectMissing, ObjectStorageError, SettingsError
from provisioner.snapshots.location import S3Location

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 8 << 20
MAX_PARTS = 10_000
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
_RESUMES = 3
COMPLETE_S = 900.0
"""How long a server may take to make an object of its parts: some copy all of them, 10,000 at most."""
_LOOK_S = 0.5

_KEYS = {
    "AccessDenied",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "XAdminUserNotFound",
    "403",
}
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507"}
_MISSING = {"NoSuchKey", "404", "NotFound"}


@dataclass(frozen=True)
class StoredObject:
    """An object, as a listing shows it."""

    key: str
    modified_at: datetime


@dataclass(frozen=True)
class PendingUpload:
    """An upload in parts that was neither completed nor aborted."""

    key: str
    id: str
    started_at: datetime


class Bucket:
    """Keeps objects. Safe for several threads."""

    def __init__(self, location: S3Location, *, attempts: int = 4) -> None:
        """Prepare to talk to the server, without doing so; raises `SettingsError` for what can't be right."""
        self.name = location.bucket
        self._where = f"s3://{location.bucket}" + (f" at {location.endpoint}" if location.endpoint else "")
        self._encryption: dict[str, Any] = {}
        if location.encryption:
            self._encryption["ServerSideEncryption"] = location.encryption
        if location.kms_key:
            self._encryption["SSEKMSKeyId"] = location.kms_key
        try:
            session = boto3.session.Session()
            self._client: S3Client = session.client(
                "s3",
                endpoint_url=location.endpoint,
                region_name=location.region or session.region_name or "us-east-1",
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    s3={"addressing_style": "path" if location.endpoint else "auto"},
                    # Ours are headers, which servers that don't know them ignore; boto3's own change the body.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise SettingsError(
                f"The snapshot store {self._where} can't be set up.",
                detail=str(error),
                resolution="Look into MACHINEUSE_SNAPSHOT_STORE and the AWS profile (AWS_PROFILE, ~/.aws/config).",
            ) from error

    def put(self, key: str, data: bytes, *, new: bool = False) -> None:
        """Store an object. With `new`, where the server knows such a condition, only if there is none.

        Raises ObjectStorageError.
        """
        arguments: dict[str, Any] = {"Bucket": self.name, "Key": key, "Body": data, "ChecksumSHA256": _checksum(data)}
        with self._calling("put", key):
            put = self._client.put_object
            _unless_there(put, **arguments, **self._encryption) if new else put(**arguments, **self._encryption)

    def get(self, key: str) -> bytes:
        """Return a small object; raises `ObjectMissing`, ObjectStorageError."""
        with self._calling("get", key):
            return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def open(self, key: str) -> closing[ObjectReader]:
        """Open an object for reading from its start to its end; raises `ObjectMissing`, ObjectStorageError."""
        return closing(ObjectReader(self, key))

    def begin_upload(self, key: str) -> Upload:
        """Start an upload in parts; the object is there once it is completed. Raises ObjectStorageError."""
        with self._calling("begin an upload of", key):
            begun = self._client.create_multipart_upload(
                Bucket=self.name, Key=key, ChecksumAlgorithm="SHA256", **self._encryption
            )
        return Upload(self, key, begun["UploadId"])

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Throw an upload away, with its parts. Idempotent. Raises ObjectStorageError."""
        try:
            with self._calling("abort an upload of", key):
                self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)
        except ObjectMissing:
            pass

    def delete(self, key: str) -> None:
        """Remove an object. Idempotent. Raises ObjectStorageError."""
        with self._calling("delete", key):
            self._client.delete_object(Bucket=self.name, Key=key)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Give every object whose key begins so; raises ObjectStorageError."""
        with self._calling("list", prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                for each in page.get("Contents", []):
                    yield StoredObject(each["Key"], each["LastModified"])

    def list_uploads(self, prefix: str) -> Iterator[PendingUpload]:
        """Give every pending upload whose key begins so; raises ObjectStorageError."""
        with self._calling("list the uploads of", prefix):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix):
                for each in page.get("Uploads", []):
                    yield PendingUpload(each["Key"], each["UploadId"], each["Initiated"])

    def find_last_write(self, upload: PendingUpload) -> datetime:
        """Return when a pending upload got its latest part, or was begun; raises ObjectStorageError."""
        last = upload.started_at
        try:
            with self._calling("list the parts of", upload.key):
                pages = self._client.get_paginator("list_parts")
                for page in pages.paginate(Bucket=self.name, Key=upload.key, UploadId=upload.id):
                    last = max([last, *(part["LastModified"] for part in page.get("Parts", []))])
        except ObjectMissing:  # completed or aborted meanwhile
            pass
        return last

    def find_etag(self, key: str) -> str | None:
        """Return what tells an object from others of its key, None if there is none; raises ObjectStorageError."""
        try:
            with self._calling("look for", key):
                return self._client.head_object(Bucket=self.name, Key=key)["ETag"]
        except ObjectMissing:
            return None

    @contextmanager
    def _calling(self, what: str, key: str) -> Iterator[None]:
        """Turn what boto3 raises into our errors."""
        try:
            yield
        except (BotoCoreError, ClientError, OSError) as error:
            raise self._translate(error, f"{what} {key}") from error

    def _translate(self, error: Exception, what: str) -> ObjectStorageError:
        store = f"The snapshot store {self._where}"
        if isinstance(error, ClientError):
            answer = error.response.get("Error", {})
            code = answer.get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            detail = f"{what}: {code} ({status}) {answer.get('Message', '')}"
            if code == "NoSuchUpload":
                return ObjectMissing(f"{store} has thrown the upload away: somebody began it anew.", detail=detail)
            if code in _MISSING:
                return ObjectMissing(f"{store} has no such object.", detail=detail)
            if code == "NoSuchBucket":
                return ObjectStorageError(
                    f"{store} does not exist.",
                    detail=detail,
                    resolution="Create the bucket, or name another one in MACHINEUSE_SNAPSHOT_STORE.",
                )
            if code in _FULL or status == 507:
                return ObjectStorageError(
                    f"{store} has no room left.",
                    detail=detail,
                    resolution="Free some space there or raise its quota, or name another one in "
                    "MACHINEUSE_SNAPSHOT_STORE.",
                )
            if code == "PreconditionFailed":
                return ObjectStorageError(f"{store} has another object there: somebody else wrote it.", detail=detail)
            if code == "RequestTimeTooSkewed":
                return ObjectStorageError(
                    f"{store} refuses us: its clock and this machine's differ too much.",
                    detail=detail,
                    resolution="Set both clocks, by NTP for instance.",
                )
            if code in _KEYS or status == 403:
                return ObjectStorageError(
                    f"{store} refuses our keys ({code}).",
                    detail=detail,
                    resolution="Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile, or the machine's "
                    "role), the region, and that they may read, write, list and delete in the bucket.",
                )
            return ObjectStorageError(
                f"{store} refused: {code or status}.", detail=detail, resolution="Look into the server's log."
            )
        detail = f"{what}: {type(error).__name__}: {error}"
        if isinstance(error, NO_CREDENTIALS):
            return ObjectStorageError(
                f"There are no keys for the snapshot store {self._where}.",
                detail=detail,
                resolution="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a "
                "role.",
            )
        if isinstance(error, NoConnection | HTTPClientError | IncompleteReadError | OSError):
            return ObjectStorageError(
                f"{store} can't be reached.",
                detail=detail,
                resolution="Check the network, the server, and `endpoint` and `region` in MACHINEUSE_SNAPSHOT_STORE.",
            )
        return ObjectStorageError(f"{store} can't be used.", detail=detail)


@dataclass
class Upload:
    """An object on its way, sent in parts of `PART_BYTES`; no more than two of them are in memory."""

    _bucket: Bucket
    key: str
    id: str
    _buffer: bytearray = field(default_factory=bytearray)
    _parts: list[CompletedPartTypeDef] = field(default_factory=list)
    _sent_bytes: int = 0
    etag: str | None = None
    """Of the object, once it is complete."""

    def write(self, data: bytes, /) -> int:
        """Take all of `data`; raises ObjectStorageError."""
        view = memoryview(data)
        while view:
            room = PART_BYTES - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == PART_BYTES:
                self._send()
        self._sent_bytes += len(data)
        return len(data)

    def complete(self) -> None:
        """Send what is left, and return once the object is there; raises ObjectStorageError."""
        if self._buffer or not self._parts:
            self._send()
        client, name = self._bucket._client, self._bucket.name
        deadline, refused = time.monotonic() + COMPLETE_S, None
        with self._bucket._calling("complete the upload of", self.key):
            try:
                _unless_there(
                    client.complete_multipart_upload,
                    Bucket=name,
                    Key=self.key,
                    UploadId=self.id,
                    MultipartUpload={"Parts": self._parts},
                )
            except ClientError as error:
                # A second attempt of a call whose answer was lost: the object says whether the first one did it.
                if error.response["Error"]["Code"] not in ("NoSuchUpload", "InvalidPart", "PreconditionFailed"):
                    raise
                refused = error
            # Or a second attempt while the server is still at the first one, and says that all is well.
            while not self._is_there():
                if refused is not None:
                    raise refused
                if time.monotonic() > deadline:
                    raise ObjectStorageError(
                        f"The server of {self._bucket._where} put no object together within {COMPLETE_S:.0f} s.",
                        detail=self.key,
                        resolution="Look into the server's log.",
                    )
                time.sleep(_LOOK_S)

    def _is_there(self) -> bool:
        try:
            found = self._bucket._client.head_object(Bucket=self._bucket.name, Key=self.key)
        except ClientError as error:
            if error.response["Error"]["Code"] not in _MISSING:
                raise
            return False
        self.etag = found["ETag"]
        return found["ContentLength"] == self._sent_bytes

    def abort(self) -> None:
        """Throw it away. Idempotent; harmless once it is completed. Raises ObjectStorageError."""
        self._buffer.clear()
        self._bucket.abort_upload(self.key, self.id)

    def _send(self) -> None:
        number = len(self._parts) + 1
        if number > MAX_PARTS:
            raise ObjectStorageError(
                f"The archive is larger than {MAX_PARTS * PART_BYTES >> 30} GiB, the most that an object may have.",
                resolution="Remove large files from the machine, or keep snapshots in a directory.",
            )
        data = bytes(self._buffer)
        self._buffer.clear()
        checksum = _checksum(data)
        with self._bucket._calling(f"upload part {number} of", self.key):
            sent = self._bucket._client.upload_part(
                Bucket=self._bucket.name,
                Key=self.key,
                UploadId=self.id,
                PartNumber=number,
                Body=data,
                ChecksumSHA256=checksum,
            )
        part: CompletedPartTypeDef = {"PartNumber": number, "ETag": sent["ETag"]}
        if sent.get("ChecksumSHA256"):  # the server knows them
            part["ChecksumSHA256"] = checksum
        self._parts.append(part)


class ObjectReader:
    """Reads one version of an object; a connection that breaks is replaced, and reading goes on where it was."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket = bucket
        self._key = key
        self._position = 0
        self._etag: str | None = None
        self._body = self._open()

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, b"" at the end; raises ObjectStorageError."""
        for attempt in range(_RESUMES + 1):
            try:
                data: bytes = self._body.read(size if size >= 0 else PART_BYTES)
                break
            except (BotoCoreError, OSError) as error:
                if attempt == _RESUMES:
                    raise self._bucket._translate(error, f"read {self._key}") from error
            self.close()
            self._body = self._open()
        self._position += len(data)
        return data

    def close(self) -> None:
        """Let go of the connection."""
        self._body.close()

    def _open(self) -> Any:
        arguments: dict[str, Any] = {}
        if self._etag is not None:
            arguments = {"Range": f"bytes={self._position}-", "IfMatch": self._etag}
        with self._bucket._calling("open", self._key):
            found = self._bucket._client.get_object(Bucket=self._bucket.name, Key=self._key, **arguments)
        self._etag = found["ETag"]
        return found["Body"]


def _unless_there(call: Callable[..., object], **arguments: Any) -> None:
    """Make a call that puts an object where there is none; where the server knows no such condition, without it."""
    try:
        call(IfNoneMatch="*", **arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] != "NotImplemented":
            raise
        call(**arguments)


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
