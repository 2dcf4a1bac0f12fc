"""Finds the samples in tar archives that other tools wrote.

A sample is a run of files of one name up to the first dot of the file's name, as WebDataset groups
them: `00000_00012.json`, `00000_00012.mp4`, `00000_00012.txt`. Unlike this package's own shards,
such archives may have extended headers (pax, which WebDataset's writer adds to every file, and
GNU's long names), folders, and names of any script.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
ZERO = bytes(BLOCK)
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# Entries whose size says nothing about bytes that follow.
WITHOUT_DATA = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
# Of all extended headers before one file.
MAX_EXTENDED_BYTES = 1 << 20
MAX_DIGITS = 20  # of a size; Python refuses to read a number of thousands
# Bytes that a search for the next header may hold before it lets go of them.
SEARCH_BYTES = 1 << 20

Read = Callable[[int, int], bytes]
"""Returns the bytes from an offset on, fewer at the end: read(offset, length)."""


class TarDamage(Exception):
    """What lies at a byte of an archive is no entry."""


class TarEntry(NamedTuple):
    """One entry of an archive."""

    name: str
    kind: bytes
    """Type of the entry, see `tarfile`; sparse files of every form have GNUTYPE_SPARSE."""
    start: int
    """First byte of its headers."""
    data: int
    size: int

    @property
    def end(self) -> int:
        """First byte after its content, which fills whole blocks."""
        return self.data + -(-self.size // BLOCK) * BLOCK


@dataclass(slots=True, kw_only=True)
class ForeignSample:
    """The files of one sample, in a range of whole blocks that holds nothing else of use."""

    name: str
    """Folder and name, up to the first dot; empty for bytes that belong to no entry."""
    start: int
    end: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(first byte, bytes) of each file, by lower-case extension."""
    problem: str = ""
    """Why it cannot be used; empty if the files are sound."""


def sample_files(
    read: Read, size: int, release: Callable[[int], object] = lambda at: None
) -> Iterator[ForeignSample]:
    """Yields the samples of an archive in order, and the ranges that are damaged.

    After damage, the search goes on at the next header.

    Args:
        read: Reads the archive.
        size: Bytes of the archive.
        release: Receives an offset; no byte before it is read any more.
    """
    at, current = 0, None
    while at < size:
        if current is None:
            release(at)  # folders, files that belong to no sample, and blocks of zeros
        if read(at, BLOCK) == ZERO:
            at += BLOCK  # the end of an archive, or of the first of several
            continue
        try:
            entry = read_entry(read, at, size)
        except TarDamage as error:
            if current is not None:
                yield current
            current, start = None, at
            at = _next_header(read, at + BLOCK, size, release)
            problem = f"bytes {start} to {at - 1} are damaged: {error}"
            yield ForeignSample(name="", start=start, end=at, problem=problem)
            continue
        at = entry.end
        split = _split_name(entry)
        if split is None:
            continue
        name, extension = split
        if current is not None and current.name != name:
            yield current
            current = None
        if current is None:
            release(entry.start)
            current = ForeignSample(name=name, start=entry.start, end=entry.end)
        current.end = entry.end
        _add(current, entry, extension)
    if current is not None:
        yield current


def read_entry(read: Read, at: int, size: int) -> TarEntry:
    """Reads the headers of the entry at a byte of an archive. Raises TarDamage."""
    start, name, pax = at, "", dict[str, str]()
    while True:
        try:
            info = tarfile.TarInfo.frombuf(read(at, BLOCK), "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise TarDamage(f"no tar header: {error}") from error
        at += BLOCK
        if info.type not in (*EXTENDED, *LONG):
            break
        if not 0 <= info.size <= MAX_EXTENDED_BYTES - (at - start):
            raise TarDamage(f"an extended header of {info.size} bytes")
        content = read(at, info.size)
        if len(content) < info.size:
            raise TarDamage("the archive ends in a header")
        at += -(-info.size // BLOCK) * BLOCK
        if info.type in EXTENDED:
            pax |= _pax_records(content)
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    num_bytes = info.size if info.type not in WITHOUT_DATA else 0
    if "size" in pax and info.type not in WITHOUT_DATA:
        digits = pax["size"]
        num_bytes = int(digits) if digits.isdecimal() and len(digits) <= MAX_DIGITS else -1
    if num_bytes < 0:
        raise TarDamage(f"a size of {num_bytes} bytes")
    is_sparse = any(record.startswith("GNU.sparse.") for record in pax)
    kind = tarfile.GNUTYPE_SPARSE if is_sparse else info.type
    entry = TarEntry(pax.get("path") or name or info.name, kind, start, at, num_bytes)
    if entry.end > size:
        raise TarDamage(f"{entry.name!r} has {num_bytes} bytes, the archive ends before")
    return entry


def _pax_records(content: bytes) -> dict[str, str]:
    records, at = {}, 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + length]
        if not space or not record.endswith(b"\n"):
            raise TarDamage(f"an extended header with {content[at : at + 50]!r}")
        name, _, value = record[:-1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def _split_name(entry: TarEntry) -> tuple[str, str] | None:
    """Returns (name, extension) of a sample's file; None for an entry that is none.

    These are folders, global headers, hidden files, files without extension, and names in double
    underscores, which WebDataset reserves.
    """
    name = entry.name
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    is_reserved = stem.startswith("__") and base.endswith("__")
    if entry.kind in (tarfile.DIRTYPE, tarfile.XGLTYPE) or not stem or not dot or is_reserved:
        return None
    return folder + slash + stem, extension.lower()


def _add(sample: ForeignSample, entry: TarEntry, extension: str) -> None:
    if entry.kind not in PLAIN:
        sample.problem = f"{entry.name!r} is of type {entry.kind!r}, must be a plain file"
    elif entry.name.startswith("/") or ".." in entry.name.split("/"):
        sample.problem = f"{entry.name!r} must not leave the archive"
    elif extension in sample.members:
        sample.problem = f"{entry.name!r} occurs twice"
    sample.members[extension] = (entry.data, entry.size)


def _next_header(read: Read, at: int, size: int, release: Callable[[int], object]) -> int:
    """Returns the offset of the next header from a block on, or the size of the archive."""
    released = at
    while at < size:
        block = read(at, BLOCK)
        if block[257:262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return at
            except (tarfile.HeaderError, ValueError):
                pass
        at += BLOCK
        if at - released >= SEARCH_BYTES:
            release(at)
            released = at
    return size
