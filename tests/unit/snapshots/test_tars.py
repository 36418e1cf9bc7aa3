"""Tar streams: whatever tarfile can write is followed, and a cut one is noticed."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioner.errors import SnapshotCorrupt
from provisioner.snapshots.manifest import PartName
from provisioner.snapshots.tars import TarBroken, TarScanner, inspect_tar, read_tar, write_part

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=300)


def make_tar(files: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@given(
    files=st.dictionaries(NAMES, st.binary(max_size=2000), max_size=8),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    size=st.integers(1, 3000),
)
def test_names_and_number_of_entries_are_seen_in_chunks_of_any_size(
    files: dict[str, bytes], format: int, size: int
) -> None:
    tar = make_tar(files, format=format)
    seen: list[str] = []
    scanner = TarScanner(seen.append)
    for start in range(0, len(tar), size):
        scanner.feed(tar[start : start + size])
    check = scanner.finish()
    assert (check.entries, check.uncompressed_bytes) == (len(files), len(tar))
    assert seen == list(files)


@given(st.data())
def test_a_cut_archive_is_noticed(data: st.DataObject) -> None:
    tar = make_tar({"a": b"x" * 700, "b": b"", "c" * 200: b"y"}).rstrip(b"\0")
    scanner = TarScanner()
    with pytest.raises(TarBroken):  # noqa: PT012 - where it is noticed depends on where it is cut
        scanner.feed(tar[: data.draw(st.integers(0, len(tar)))])
        scanner.finish()


def test_garbage_is_noticed() -> None:
    with pytest.raises(TarBroken):
        TarScanner().feed(b"not a tar" * 200)


def test_a_size_beyond_eight_gigabytes_is_understood() -> None:
    member = tarfile.TarInfo("huge")
    member.size = 9 << 30
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        scanner = TarScanner()
        scanner.feed(member.tobuf(format))
        block = bytes(64 << 20)
        for _ in range((9 << 30) // len(block)):
            scanner.feed(block)
        scanner.feed(bytes(1024))
        assert scanner.finish().entries == 1


def test_a_part_is_read_back_as_it_was_written() -> None:
    tar = make_tar({"a": b"x" * 3_000_000, "b": b"y"})
    sink = io.BytesIO()
    part = write_part((tar[start : start + 70_000] for start in range(0, len(tar), 70_000)), sink, name=PartName.HOME)
    assert part.bytes == len(sink.getvalue()) < 100_000
    assert (part.entries, part.uncompressed_bytes) == (2, len(tar))
    assert b"".join(read_tar(io.BytesIO(sink.getvalue()), what="It")) == tar


def test_compressed_data_that_is_cut_is_noticed() -> None:
    sink = io.BytesIO()
    write_part([make_tar({"a": bytes(range(256)) * 100})], sink, name=PartName.HOME)
    for length in range(0, len(sink.getvalue()) - 4, 7):  # the last 4 bytes are zstd's checksum
        with pytest.raises(SnapshotCorrupt):
            inspect_tar(io.BytesIO(sink.getvalue()[:length]), what="It")


def test_highly_compressible_data_is_given_in_bounded_chunks() -> None:
    sink = io.BytesIO()
    write_part([make_tar({"zeros": bytes(50_000_000)})], sink, name=PartName.HOME)
    assert len(sink.getvalue()) < 10_000
    assert max(len(chunk) for chunk in read_tar(io.BytesIO(sink.getvalue()), what="It")) <= 1 << 20
