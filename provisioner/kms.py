"""A key of AWS KMS, which encrypts the key file of the snapshots: the only place that asks KMS for anything.

Credentials come from boto3's ordinary chain, as the snapshot store's do; the region is in the key's ARN. What is
encrypted is bound to a context, which KMS shows in its own log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from provisioner.aws_credentials import NO_CREDENTIALS
from provisioner.errors import SettingsError, SnapshotKeyMissing

if TYPE_CHECKING:
    from types_boto3_kms import KMSClient

SCHEME = "aws-kms://"
ATTEMPTS = 3
TIMEOUT_S = 10
"""For connecting, and for each answer."""
_FORM = "It has the form aws-kms://arn:aws:kms:<region>:<account>:key/<id>?file=<path>&endpoint=https://host."
_ARN = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):\d*:(key|alias)/[A-Za-z0-9/_-]+")


@dataclass(frozen=True)
class KmsLocation:
    """Which key it is, and which file it encrypts."""

    arn: str
    region: str
    endpoint: str | None = None
    file: str | None = None


def parse_kms_url(url: str) -> KmsLocation:
    """Take `aws-kms://<ARN>?endpoint=…&file=…` apart; raises `SettingsError`."""
    arn, _, query = url.removeprefix(SCHEME).partition("?")
    found = _ARN.fullmatch(arn)
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise _wrong("is no URL") from error
    if found is None:
        raise _wrong("names no key by its ARN")
    unknown = sorted(options.keys() - {"endpoint", "file"})
    if unknown:
        raise _wrong(f"has the unknown option {unknown[0]!r}")
    if not all(options.values()):
        raise _wrong("has an option without a value")
    return KmsLocation(arn=arn, region=found[1], endpoint=options.get("endpoint"), file=options.get("file"))


class KmsKey:
    """Encrypts and decrypts up to 4 KiB: room for some thirty keys. Safe for several threads."""

    def __init__(self, location: KmsLocation) -> None:
        """Prepare to talk to KMS, without doing so; raises `SettingsError` for what can't be right."""
        self._arn = location.arn
        try:
            self._client: KMSClient = boto3.session.Session().client(
                "kms",
                endpoint_url=location.endpoint,
                region_name=location.region,
                config=Config(
                    connect_timeout=TIMEOUT_S,
                    read_timeout=TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise SettingsError(
                "The KMS key of MACHINEUSE_SNAPSHOT_KEYS can't be set up.", detail=str(error), resolution=_FORM
            ) from error

    def encrypt(self, data: bytes, context: bytes) -> bytes:
        """Return `data` encrypted; raises `SnapshotKeyMissing`."""
        try:
            answer = self._client.encrypt(KeyId=self._arn, Plaintext=data, EncryptionContext=_named(context))
        except (BotoCoreError, ClientError, OSError) as error:
            raise self._translate(error) from error
        return answer["CiphertextBlob"]

    def decrypt(self, data: bytes, context: bytes) -> bytes:
        """Return what `encrypt` was given; raises `SnapshotKeyMissing`."""
        try:
            answer = self._client.decrypt(KeyId=self._arn, CiphertextBlob=data, EncryptionContext=_named(context))
        except (BotoCoreError, ClientError, OSError) as error:
            raise self._translate(error) from error
        return answer["Plaintext"]

    def _translate(self, error: Exception) -> SnapshotKeyMissing:
        if isinstance(error, ClientError):
            code = error.response.get("Error", {}).get("Code", "")
            return SnapshotKeyMissing(
                f"KMS refuses the key of the snapshots' keys ({code}).",
                detail=f"{self._arn}: {error}",
                resolution="Check that the key is enabled, that it is the one that the key file was encrypted with, "
                "and that our role or keys may use kms:Encrypt and kms:Decrypt with it.",
            )
        if isinstance(error, NO_CREDENTIALS):
            return SnapshotKeyMissing(
                "There are no AWS keys to ask KMS with for the snapshots' keys.",
                detail=str(error),
                resolution="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a "
                "role.",
            )
        return SnapshotKeyMissing(
            "KMS, which encrypts the snapshots' keys, can't be reached.",
            detail=f"{self._arn}: {type(error).__name__}: {error}",
            resolution="Check the network and `endpoint` in MACHINEUSE_SNAPSHOT_KEYS.",
        )


def _named(context: bytes) -> dict[str, str]:
    return {"purpose": context.decode()}


def _wrong(what: str) -> SettingsError:
    return SettingsError(f"MACHINEUSE_SNAPSHOT_KEYS {what}.", resolution=_FORM)
