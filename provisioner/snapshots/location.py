"""Where snapshots are kept: `MACHINEUSE_SNAPSHOT_STORE` taken apart, and the store that it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from provisioner.errors import SettingsError, SnapshotKeyMissing

if TYPE_CHECKING:
    from provisioner.settings import Settings
    from provisioner.snapshots.keyfile import KeyFile
    from provisioner.snapshots.sealing import Sealing
    from provisioner.snapshots.store import SnapshotStore

_FORM = "It has the form s3://bucket/prefix?endpoint=https://host&region=name&sse=AES256."
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*")
_SSE = ("AES256", "aws:kms")


@dataclass(frozen=True)
class S3Location:
    """A place in a bucket."""

    bucket: str
    prefix: str = ""
    """Without slashes at its ends; "" is the bucket itself."""
    endpoint: str | None = None
    """None is AWS."""
    region: str | None = None
    encryption: str | None = None
    """What the server encrypts with: `AES256` or `aws:kms`; None leaves that to the bucket."""
    kms_key: str | None = None

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_s3_url(url: str) -> S3Location:
    """Take `s3://bucket/prefix?endpoint=…&region=…&sse=…&kms_key=…` apart.

    Raises:
        SettingsError: it is not of that form. The error never repeats what might be a secret.
    """
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise _wrong("is no URL") from error
    options = dict(pairs)
    if "@" in parts.netloc:
        raise _wrong("must not contain keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if len(options) != len(pairs):
        raise _wrong("says something twice")
    unknown = sorted(options.keys() - {"endpoint", "region", "sse", "kms_key"})
    if unknown:
        raise _wrong(f"has the unknown option {unknown[0]!r}")
    if parts.fragment:
        raise _wrong("has a '#'")
    if not _BUCKET.fullmatch(parts.netloc):
        raise _wrong(f"names no bucket ({parts.netloc!r})")
    prefix = parts.path.strip("/")
    if prefix and (not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
        raise _wrong("has a prefix with other characters than letters, digits and !_.*'()-")
    encryption, kms_key = options.get("sse"), options.get("kms_key")
    if encryption is not None and encryption not in _SSE:
        raise _wrong(f"has an unknown 'sse'; there are {' and '.join(_SSE)}")
    if kms_key is not None and encryption != "aws:kms":
        raise _wrong("has a 'kms_key' but not sse=aws:kms")
    if not all(options.values()):
        raise _wrong("has an option without a value")
    return S3Location(
        bucket=parts.netloc,
        prefix=prefix,
        endpoint=_check_endpoint(options.get("endpoint")),
        region=options.get("region"),
        encryption=encryption,
        kms_key=kms_key,
    )


def open_store(settings: Settings) -> SnapshotStore:
    """Return the store that the settings name, without talking to it; raises `SettingsError`."""
    sealing = _open_sealing(settings)
    if settings.snapshot_store and "://" in settings.snapshot_store:
        if not settings.snapshot_store.startswith("s3://"):
            raise _wrong("is neither a directory nor begins with s3://")
        from provisioner.object_storage import Bucket  # boto3 takes its time: only for those who use it
        from provisioner.snapshots.s3 import S3Store

        location = parse_s3_url(settings.snapshot_store)
        return S3Store(Bucket(location), prefix=location.prefix, sealing=sealing)
    from provisioner.snapshots.directory import DirectoryStore

    return DirectoryStore(settings.snapshots_dir, sealing=sealing)


def find_key_file(settings: Settings) -> KeyFile:
    """Return the key file that the settings name, or the default one; it need not be there. Raises `SettingsError`."""
    from provisioner.snapshots.keyfile import KeyFile

    named = settings.snapshot_keys
    if named is None:
        return KeyFile(settings.snapshot_keys_path)
    if "://" not in named:
        return KeyFile(settings.project_dir / Path(named).expanduser())
    if not named.startswith("aws-kms://"):
        raise SettingsError(
            "MACHINEUSE_SNAPSHOT_KEYS is neither a path nor begins with aws-kms://.",
            resolution="`machineuse snapshots new-key` makes a key file.",
        )
    from provisioner.kms import KmsKey, parse_kms_url  # boto3 again

    location = parse_kms_url(named)
    path = settings.project_dir / Path(location.file).expanduser() if location.file else settings.snapshot_keys_path
    return KeyFile(path, wrapping=KmsKey(location))


def _open_sealing(settings: Settings) -> Sealing:
    from provisioner.snapshots.sealing import Sealing

    if settings.snapshot_keys is None:
        if settings.snapshot_encrypted_only:
            raise SettingsError("MACHINEUSE_SNAPSHOT_ENCRYPTED_ONLY is set, but not MACHINEUSE_SNAPSHOT_KEYS.")
        return Sealing()
    keys = find_key_file(settings)
    try:
        keys.check()
    except SnapshotKeyMissing as error:  # at once, not at the first snapshot
        raise SettingsError(error.message, detail=error.detail, resolution=error.resolution) from error
    return Sealing(keys, sealed_only=settings.snapshot_encrypted_only)


def _check_endpoint(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        parts.port  # noqa: B018 - raises ValueError
    except ValueError as error:
        raise _wrong("has an 'endpoint' that is no URL") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise _wrong("has an 'endpoint' that is not like https://host:port")
    return endpoint.rstrip("/")


def _wrong(what: str) -> SettingsError:
    return SettingsError(f"MACHINEUSE_SNAPSHOT_STORE {what}.", resolution=_FORM)
