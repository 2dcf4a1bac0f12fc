"""Checks one shard and its samples against the manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from tvr.data_prep.check.captions import CaptionAccumulator
from tvr.data_prep.check.sequential_reads import (
    CHUNK_BYTES,
    ReadMeter,
    SequentialShard,
    read_members,
)
from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.dataset.sample_codec import decode_members, parse_meta, parse_range
from tvr.data_prep.records import BadSample, Caption
from tvr.data_prep.storage.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that differs from the manifest, or that is there twice."""

    where: str
    """File name, or "shard: key"."""
    what: str


@dataclass(slots=True)
class ShardFindings:
    """What was read of one shard or of several."""

    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    captions: CaptionAccumulator = field(default_factory=CaptionAccumulator)
    num_unread: int = 0
    """Samples whose captions could not be read."""

    def merge(self, other: ShardFindings) -> None:
        """Adds what another one found."""
        self.num_bytes += other.num_bytes
        self.problems += other.problems
        self.captions.merge(other.captions)
        self.num_unread += other.num_unread


def place(manifest: Manifest, row: int) -> str:
    """Where a sample is, "shard: key"."""
    samples = manifest.samples
    return f"{manifest.file_of_shard(int(samples.shard[row])).name}: {samples.key[row]}"


def check_shard(
    store: Storage, manifest: Manifest, decode_rows: set[int], meter: ReadMeter, number: int
) -> ShardFindings:
    """Reads a file of samples once, from its first byte to its last; decodes the frames of
    `decode_rows`."""
    shard, samples = manifest.files[number], manifest.samples
    scan, digest = ShardFindings(), hashlib.sha256()
    file = SequentialShard(store, shard, meter, ahead=CHUNK_BYTES)
    end = 0  # of the samples so far, which lie end to end in a shard
    try:
        for row in manifest.rows_of_file(number):
            offset, length = int(samples.offset[row]), int(samples.length[row])
            if manifest.beton is not None and offset > end:  # FFCV's own: header, pages' ends
                gap = file.read(end, offset - end)
                digest.update(gap)
                scan.num_bytes += len(gap)
                end = offset
            content = file.read(end, length)
            digest.update(content)
            if offset != end:
                what = f"offset {offset} in the manifest, expected {end}"
                scan.problems.append(Problem(where=place(manifest, row), what=what))
            scan.num_bytes += len(content)
            end += length
            _check_sample(scan, manifest, row, content, row in decode_rows)
        # One byte more than is due.
        content = file.read(end, max(0, shard.shard_bytes + 1 - end))
    except OSError as error:
        what = f"{type(error).__name__}: {error}"
        scan.problems.append(Problem(where=shard.name, what=what))
        return scan
    digest.update(content)
    scan.num_bytes += len(content)
    if scan.num_bytes != shard.shard_bytes:
        what = f"{scan.num_bytes} bytes, packed were {shard.shard_bytes}"
        if scan.num_bytes > shard.shard_bytes:
            what = f"more bytes than the {shard.shard_bytes} packed"
        scan.problems.append(Problem(where=shard.name, what=what))
    if digest.hexdigest() != shard.sha256:
        what = "sha256 differs from the manifest's"
        scan.problems.append(Problem(where=shard.name, what=what))
    return scan


def read_captions(
    store: Storage, manifest: Manifest, meter: ReadMeter, number: int
) -> ShardFindings:
    """The captions of a shard's samples; what cannot be read is counted only."""
    samples, scan = manifest.samples, ShardFindings()
    file = SequentialShard(store, manifest.files[number], meter, ahead=CHUNK_BYTES)
    rows = manifest.rows_of_file(number)
    for done, row in enumerate(rows):
        try:
            meta = parse_meta(str(samples.key[row]), read_members(file, manifest, row))
        except BadSample:
            scan.num_unread += 1
        except OSError:
            scan.num_unread += len(rows) - done
            break
        else:
            scan.captions.add(meta.video_id, meta.texts)
    return scan


def _check_sample(
    scan: ShardFindings, manifest: Manifest, row: int, content: bytes, decode: bool
) -> None:
    samples, where = manifest.samples, place(manifest, row)
    key = str(samples.key[row])
    try:
        members = parse_range(manifest, row, content)
        meta = parse_meta(key, members)
        if decode:
            decode_members(key, members, meta, manifest.num_frames or 1)
    except BadSample as error:
        scan.num_unread += 1
        scan.problems.append(Problem(where=where, what=f"{error.reason}: {error.detail}"))
        return
    scan.captions.add(meta.video_id, meta.texts)
    for name, found, listed in (
        ("captions", len(meta.captions), int(samples.num_captions[row])),
        ("video_id", meta.video_id, str(samples.video_id[row])),
    ):
        if found != listed:
            what = f"{name} {found!r}, {listed!r} in the manifest"
            scan.problems.append(Problem(where=where, what=what))
    for caption in meta.captions:
        if what := _wrong_words(caption, manifest.tagger is not None):
            scan.problems.append(Problem(where=where, what=f"caption {caption.text!r}: {what}"))


def _wrong_words(caption: Caption, has_words: bool) -> str:
    """What is wrong with a caption's words; nothing if they are parts of it, one after another."""
    if caption.words is None or not has_words:
        differs = (caption.words is not None) != has_words
        return f"words {'missing' if has_words else 'without a tagger'}" if differs else ""
    end = 0
    for word in caption.words:
        if not end <= word.start < word.end <= len(caption.text):
            where = f"[{word.start}, {word.end}) of {len(caption.text)} characters"
            return f"word at {where}, from {end} on"
        end = word.end
    return ""
