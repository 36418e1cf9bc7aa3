"""The file with the keys of the snapshots: `MACHINEUSE_SNAPSHOT_KEYS`.

It holds a Tink keyset as JSON: in clear text, and then nobody but its owner may read it; or encrypted by a key
management service, which is asked whenever the file has changed. The file is looked at before every use: a key that is
added is used at once, and no snapshot is taken with a key whose file is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
from pathlib import Path

from provisioner.errors import SettingsError, SnapshotKeyMissing
from provisioner.snapshots.keyset import Keyset, KeysetBroken, Wrapping


class KeyFile:
    """Reads and writes the key file. Safe for several threads; of two that change it at once, one is told to wait."""

    def __init__(self, path: Path, *, wrapping: Wrapping | None = None) -> None:
        """Name the file; `wrapping` is what it is encrypted by."""
        self.path = path
        self._wrapping = wrapping
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._keyset: Keyset | None = None

    def check(self) -> None:
        """See whether the file can be used, without asking the service that it is encrypted by.

        Raises:
            SnapshotKeyMissing: it is not there, not ours alone, or no key file of this kind.
        """
        text = self._read()
        if self._wrapping is None:
            self._parse(text)

    def load(self) -> Keyset:
        """Return the keys that are in the file now.

        Raises:
            SnapshotKeyMissing: the file can't be used, or the service that it is encrypted by refuses or is away.
        """
        with self._lock:
            seen = self._look()
            if self._keyset is None or seen != self._seen:
                self._keyset, self._seen = self._parse(self._read()), seen
            return self._keyset

    def create(self) -> Keyset:
        """Make the file, with one new key; raises `SettingsError` when there is one, and what `load` raises."""
        if self.path.exists():
            raise self._is_there()
        return self._write(Keyset.generate(), new=True)

    def rotate(self) -> Keyset:
        """Add a key, which new snapshots are encrypted with from now on; the others stay, to read the old ones."""
        return self._write(self.load().rotate())

    def drop(self, key_id: int) -> Keyset:
        """Remove a key; raises `SettingsError` for the one that is in use, or unknown."""
        keyset = self.load()
        try:
            return self._write(keyset.drop(key_id))
        except ValueError as error:
            raise SettingsError(
                f"Key {key_id} is the one that new snapshots are encrypted with."
                if key_id == keyset.primary_id
                else f"There is no key {key_id} in {self.path}.",
                resolution="Run `machineuse snapshots rotate-key` first."
                if key_id == keyset.primary_id
                else "`machineuse snapshots keys` lists them.",
            ) from error

    def _look(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except OSError as error:
            raise SnapshotKeyMissing(
                f"The snapshots' key file {self.path} can't be read: {error.strerror}.",
                detail=str(error),
                resolution="Put it back from a copy, or make a first one with `machineuse snapshots new-key`. Without "
                "the keys, no snapshot that was encrypted with them can be read.",
            ) from error
        if self._wrapping is None and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SnapshotKeyMissing(
                f"The snapshots' key file {self.path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}).",
                resolution=f"Run `chmod 600 {self.path}`, and think about who may have read it.",
            )
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _read(self) -> str:
        self._look()
        try:
            return self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise SnapshotKeyMissing(
                f"The snapshots' key file {self.path} can't be read.",
                detail=str(error),
                resolution="Make it readable for the user that the service runs as.",
            ) from error

    def _parse(self, text: str) -> Keyset:
        try:
            encrypted = "encryptedKeyset" in json.loads(text)
            if encrypted == (self._wrapping is not None):
                return Keyset.parse(text, self._wrapping)
        except (ValueError, TypeError) as error:  # KeysetBroken is a ValueError
            raise SnapshotKeyMissing(
                f"{self.path} is no key file for snapshots, or a damaged one.",
                detail=str(error) if isinstance(error, KeysetBroken) else None,
                resolution="Put it back from a copy.",
            ) from error
        raise SnapshotKeyMissing(
            f"The snapshots' key file {self.path} is {'' if encrypted else 'not '}encrypted by KMS.",
            resolution="Set MACHINEUSE_SNAPSHOT_KEYS to aws-kms://<key's ARN>?file=<the file>."
            if encrypted
            else "Set MACHINEUSE_SNAPSHOT_KEYS to the file's path, or name another file.",
        )

    def _write(self, keyset: Keyset, *, new: bool = False) -> Keyset:
        """Put the file in place as a whole, or not at all: never over one that somebody else has written since."""
        text = keyset.serialize(self._wrapping)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                os.link(temporary, self.path)
            elif self._look() != self._seen:
                raise SettingsError(
                    f"The snapshots' key file {self.path} has been changed meanwhile, and was left as it is.",
                    resolution="Look at `machineuse snapshots keys`, and try again.",
                )
            else:
                temporary.replace(self.path)
            descriptor = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except FileExistsError as error:
            raise self._is_there() from error
        except OSError as error:
            raise SettingsError(
                f"The snapshots' key file {self.path} can't be written: {error.strerror}.", detail=str(error)
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return keyset

    def _is_there(self) -> SettingsError:
        return SettingsError(
            f"There is a key file {self.path} already; it is never overwritten.",
            resolution="For a new key beside those in it, run `machineuse snapshots rotate-key`.",
        )
