"""A set of keys for snapshots: the only place that knows Tink.

The set is a Tink keyset of Streaming AEAD keys: AES-256-GCM in segments of 1 MiB, with a key derived for every stream.
What is new is encrypted with the primary key; every key of the set can decrypt. A stream is bound to a context, which
is not in it: with another context, as with another key or a changed byte, nothing of the segment is given out. Memory
is bounded by the segment.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

from tink import (  # type: ignore[import-untyped]
    KeysetHandle,
    TinkError,
    aead,
    json_proto_keyset_format,
    new_keyset_handle,
    secret_key_access,
    streaming_aead,
)

from provisioner.snapshots.tars import CHUNK_BYTES, Readable, Writable

_TEMPLATE = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
_WRAPPED_FOR = b"machineuse snapshot keys"

streaming_aead.register()


class KeysetBroken(ValueError):
    """The text is no set of keys for snapshots."""


class Undecipherable(ValueError):
    """The bytes were not encrypted with one of these keys and in this context, or were changed since."""


class Wrapping(Protocol):
    """Encrypts and decrypts a whole set of keys, as a key management service does."""

    def encrypt(self, data: bytes, context: bytes) -> bytes:
        """Return `data` encrypted."""
        ...

    def decrypt(self, data: bytes, context: bytes) -> bytes:
        """Return what `encrypt` was given."""
        ...


@dataclass(frozen=True)
class Keyset:
    """Keys, one of which is the primary. Immutable; never shown."""

    _handle: KeysetHandle

    def __repr__(self) -> str:
        return f"Keyset({self.primary_id} of {self.ids})"

    @property
    def primary_id(self) -> int:
        """Return the id of the key that new snapshots are encrypted with."""
        return int(self._handle.keyset_info().primary_key_id)

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the ids of all keys, the oldest first."""
        return tuple(int(each.key_id) for each in self._handle.keyset_info().key_info)

    @staticmethod
    def generate() -> Keyset:
        """Return a set of one new key."""
        return Keyset(new_keyset_handle(_TEMPLATE))

    @staticmethod
    def parse(text: str, wrapping: Wrapping | None) -> Keyset:
        """Return the set that `serialize` wrote with that wrapping.

        Raises `KeysetBroken`, and what the wrapping raises.
        """
        try:
            if wrapping is None:
                handle = json_proto_keyset_format.parse(text, secret_key_access.TOKEN)
            else:
                adapter = _WrappingAead(wrapping)
                with adapter.raising():
                    handle = json_proto_keyset_format.parse_encrypted(text, adapter, _WRAPPED_FOR)
            handle.primitive(streaming_aead.StreamingAead)
        except TinkError as error:
            raise KeysetBroken(str(error)) from error
        return Keyset(handle)

    def serialize(self, wrapping: Wrapping | None) -> str:
        """Return the set as Tink's JSON: in clear text, or encrypted. Raises what the wrapping raises."""
        if wrapping is None:
            return str(json_proto_keyset_format.serialize(self._handle, secret_key_access.TOKEN))
        adapter = _WrappingAead(wrapping)
        with adapter.raising():
            return str(json_proto_keyset_format.serialize_encrypted(self._handle, adapter, _WRAPPED_FOR))

    def rotate(self) -> Keyset:
        """Return this set with one more key, which is the primary."""
        old, new = self._document(), Keyset.generate()
        while new.primary_id in self.ids:
            new = Keyset.generate()
        added = new._document()
        return self._from({"primaryKeyId": added["primaryKeyId"], "key": [*old["key"], *added["key"]]})

    def drop(self, key_id: int) -> Keyset:
        """Return this set without a key that is not the primary; raises `ValueError` for one that is, or is unknown."""
        if key_id == self.primary_id or key_id not in self.ids:
            raise ValueError(key_id)
        document = self._document()
        keys = [each for each in document["key"] if each["keyId"] != key_id]
        return self._from({"primaryKeyId": document["primaryKeyId"], "key": keys})

    @contextmanager
    def encrypt_to(self, sink: Writable, context: bytes) -> Iterator[Writable]:
        """Give what encrypts into `sink`; the last segment is written at the end. Raises what the sink raises."""
        destination = _Destination(sink)
        stream = self._primitive().new_encrypting_stream(cast(BinaryIO, destination), context)
        try:
            with destination.raising():
                yield cast(Writable, stream)
                stream.close()
        finally:
            # What was broken off writes nothing any more, not even when it is thrown away much later.
            destination.broken_off = True
            with suppress(TinkError, ValueError):
                stream.close()

    def decrypt_from(self, source: Readable, context: bytes) -> Readable:
        """Return what decrypts `source`; its `read` raises `Undecipherable`, and what the source raises."""
        origin = _Origin(source)
        return _Decrypted(self._primitive().new_decrypting_stream(cast(BinaryIO, origin), context), origin)

    def encrypt(self, data: bytes, context: bytes) -> bytes:
        """Return a small message encrypted."""
        sink = io.BytesIO()
        with self.encrypt_to(sink, context) as stream:
            stream.write(data)
        return sink.getvalue()

    def decrypt(self, data: bytes, context: bytes) -> bytes:
        """Return what `encrypt` was given; raises `Undecipherable`."""
        stream = self.decrypt_from(io.BytesIO(data), context)
        found = bytearray()
        while chunk := stream.read(CHUNK_BYTES):
            found += chunk
        return bytes(found)

    def _primitive(self) -> streaming_aead.StreamingAead:
        return self._handle.primitive(streaming_aead.StreamingAead)

    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.serialize(None))
        return document

    @staticmethod
    def _from(document: dict[str, Any]) -> Keyset:
        return Keyset.parse(json.dumps(document), None)


class _Adapter:
    """Stands between Tink's C++ and what we gave it: Tink makes its own errors of ours, so ours are remembered."""

    def __init__(self) -> None:
        self._failure: Exception | None = None

    @contextmanager
    def remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = error
            raise

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise what was remembered instead of what Tink has made of it."""
        try:
            yield
        except TinkError as error:
            if self._failure is not None:
                raise self._failure from error
            raise


class _WrappingAead(_Adapter, aead.Aead):  # type: ignore[misc]  # Tink has no types
    def __init__(self, wrapping: Wrapping) -> None:
        super().__init__()
        self._wrapping = wrapping

    def encrypt(self, plaintext: bytes, associated_data: bytes) -> bytes:
        with self.remembering():
            return self._wrapping.encrypt(plaintext, associated_data)

    def decrypt(self, ciphertext: bytes, associated_data: bytes) -> bytes:
        with self.remembering():
            return self._wrapping.decrypt(ciphertext, associated_data)


class _Destination(_Adapter):
    """A sink, as the file that Tink writes to."""

    closed = False

    def __init__(self, sink: Writable) -> None:
        super().__init__()
        self._sink = sink
        self.broken_off = False

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        if not self.broken_off:
            with self.remembering():
                self._sink.write(data)
        return len(data)

    def close(self) -> None:
        """Leave the sink open: it is its owner's."""


class _Origin(_Adapter):
    """A source, as the file that Tink reads from."""

    closed = False

    def __init__(self, source: Readable) -> None:
        super().__init__()
        self._source = source

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with self.remembering():
            return self._source.read(size)

    def close(self) -> None:
        """Leave the source open: it is its owner's."""


class _Decrypted:
    def __init__(self, stream: BinaryIO, origin: _Origin) -> None:
        self._stream = stream
        self._origin = origin

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, b"" at the end."""
        try:
            with self._origin.raising():
                return self._stream.read(size if size >= 0 else CHUNK_BYTES)
        except TinkError as error:
            raise Undecipherable(str(error)) from error
