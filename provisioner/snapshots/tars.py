"""Streams of tar and zstd: written, counted and checked chunk by chunk, never held in memory as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import IO, Protocol, cast

import zstandard

from provisioner.errors import SnapshotCorrupt
from provisioner.snapshots.manifest import Part, PartName

CHUNK_BYTES = 1 << 20
ZSTD_LEVEL = 3
_BLOCK = 512
_MAX_EXTENSION_BYTES = 8 << 20


class TarBroken(ValueError):
    """The bytes are not a whole tar archive."""


class Writable(Protocol):
    """Takes bytes."""

    def write(self, data: bytes, /) -> int:
        """Take all of `data`."""
        ...


class Readable(Protocol):
    """Gives bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, b"" at the end."""
        ...


@dataclass(frozen=True)
class TarCheck:
    """What reading an archive to its end has shown."""

    uncompressed_bytes: int
    entries: int


class TarScanner:
    """Follows a tar stream that is fed in chunks of any size: counts entries, notices broken headers and a cut end.

    Python's tarfile pulls and takes an archive cut between two entries for a whole one; this is pushed, so that it can
    watch a stream on its way to somewhere else, and insists on the end mark. Knows ustar, pax and GNU long names.
    """

    def __init__(self, on_entry: Callable[[str], None] | None = None) -> None:
        self._on_entry = on_entry
        self._buffer = bytearray()
        self._skip = 0
        self._extension: bytes | None = None
        self._extension_left = 0
        self._overrides: dict[str, str] = {}
        self._zero_blocks = 0
        self.entries = 0
        self.bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; raises `TarBroken`."""
        self.bytes += len(chunk)
        if self._skip >= len(chunk) and not self._buffer:
            self._skip -= len(chunk)
            return
        self._buffer += chunk
        start = 0
        while True:
            skipped = min(self._skip, len(self._buffer) - start)
            self._skip -= skipped
            start += skipped
            wanted = self._extension_left or _BLOCK
            if self._skip or len(self._buffer) - start < wanted:
                break
            block = bytes(self._buffer[start : start + wanted])
            start += wanted
            if self._extension_left:
                self._take_extension(block)
            else:
                self._take_header(block)
        del self._buffer[:start]

    def finish(self) -> TarCheck:
        """Say what was seen; raises `TarBroken` when the archive has no end."""
        if self._zero_blocks < 2 or self._buffer or self._skip:
            raise TarBroken("the archive ends before its end mark")
        return TarCheck(uncompressed_bytes=self.bytes, entries=self.entries)

    def _take_header(self, block: bytes) -> None:
        if not any(block):
            self._zero_blocks += 1
            return
        if self._zero_blocks:
            raise TarBroken("there is data after the end mark")
        if _number(block[148:156]) != sum(block[:148]) + 256 + sum(block[156:]):
            raise TarBroken(f"the header of entry {self.entries + 1} has a wrong checksum")
        kind = block[156:157]
        size = _number(block[124:136])
        if kind in b"xgLK":
            if size > _MAX_EXTENSION_BYTES:
                raise TarBroken(f"entry {self.entries + 1} has an extended header of {size} bytes")
            self._extension = kind
            self._extension_left = _padded(size)
            self._extension_size = size
            return
        size = int(self._overrides.get("size", size))
        self._skip = _padded(size) if kind not in b"123456" else 0
        self.entries += 1
        if self._on_entry:
            self._on_entry(self._overrides.get("path") or _name(block))
        self._overrides = {}

    def _take_extension(self, padded: bytes) -> None:
        data = padded[: self._extension_size]
        self._extension_left = 0
        if self._extension == b"L":
            self._overrides["path"] = data.rstrip(b"\0").decode(errors="surrogateescape")
        elif self._extension == b"x":
            self._overrides.update(_pax_records(data))


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise TarBroken("a header holds something that is no number") from error


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:262] == b"ustar" and block[262:263] == b"\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        try:
            size = int(length)
            key, _, value = data[len(length) + 1 : size - 1].partition(b"=")
        except ValueError as error:
            raise TarBroken("an extended header is broken") from error
        if size <= len(length) + 1:
            raise TarBroken("an extended header is broken")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode(errors="surrogateescape")
        data = data[size:]
    return records


class _Counted:
    """A sink that hashes and counts what goes into it."""

    def __init__(self, sink: Writable) -> None:
        self._sink = sink
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes, /) -> int:
        self._sink.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


def write_part(
    chunks: Iterable[bytes],
    sink: Writable,
    *,
    name: PartName,
    seal: Callable[[PartName, Writable], AbstractContextManager[Writable]] = lambda _, sink: nullcontext(sink),
    progress: Callable[[int], None] | None = None,
) -> Part:
    """Compress a tar stream into `sink`, hashing and counting on the way; return the part as the manifest lists it.

    `seal` may encrypt what is compressed: it is the encrypted bytes that are hashed and counted. `progress` gets the
    number of bytes read so far after each chunk. Raises `TarBroken` when the stream is cut.
    """
    scanner = TarScanner()
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj()
    stored = _Counted(sink)
    with seal(name, stored) as sealed:
        for chunk in chunks:
            scanner.feed(chunk)
            if data := compressor.compress(chunk):
                sealed.write(data)
            if progress:
                progress(scanner.bytes)
        check = scanner.finish()
        sealed.write(compressor.flush())
    return Part(
        name=name,
        bytes=stored.bytes,
        sha256=stored.digest.hexdigest(),
        uncompressed_bytes=check.uncompressed_bytes,
        entries=check.entries,
    )


def read_tar(source: Readable, *, what: str) -> Iterator[bytes]:
    """Give the tar stream of a compressed part in chunks of bounded size; raises `SnapshotCorrupt` on broken zstd."""
    with zstandard.ZstdDecompressor().stream_reader(
        cast(IO[bytes], source), read_size=CHUNK_BYTES, closefd=False
    ) as reader:
        try:
            while chunk := reader.read(CHUNK_BYTES):
                yield chunk
        except zstandard.ZstdError as error:
            raise SnapshotCorrupt(f"{what} can't be decompressed.", detail=str(error)) from error


def inspect_tar(source: Readable, *, what: str, on_entry: Callable[[str], None] | None = None) -> TarCheck:
    """Read a compressed part to its end and say what it holds; raises `SnapshotCorrupt`."""
    scanner = TarScanner(on_entry)
    try:
        for chunk in read_tar(source, what=what):
            scanner.feed(chunk)
        return scanner.finish()
    except TarBroken as error:
        raise SnapshotCorrupt(f"{what} is not a whole archive.", detail=str(error)) from error
