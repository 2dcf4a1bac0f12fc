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
from tvr.data_prep.dataset.manifest import Manifest, Shard
from tvr.data_prep.dataset.sample_codec import (
    decode_members,
    parse_meta,
    parse_range,
    stored_index,
)
from tvr.data_prep.records import BadSample, Caption
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.frame_index import index_packets
from tvr.data_prep.video.stored_index import INDEX_MEMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A difference from the manifest, a duplicate, or a sample shared with another data set."""

    where: str
    """File name, or "shard: key"."""
    what: str


@dataclass(slots=True)
class ShardFindings:
    """Result of reading one or several shards."""

    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    captions: CaptionAccumulator = field(default_factory=CaptionAccumulator)
    num_unread: int = 0
    """Samples whose captions could not be read."""

    def merge(self, other: ShardFindings) -> None:
        """Adds the findings of other shards."""
        self.num_bytes += other.num_bytes
        self.problems += other.problems
        self.captions.merge(other.captions)
        self.num_unread += other.num_unread


def sample_location(manifest: Manifest, row: int) -> str:
    """Returns the location of a sample for messages, "shard: key"."""
    samples = manifest.samples
    return f"{manifest.file_of_shard(int(samples.shard[row])).name}: {samples.key[row]}"


def check_shard(
    store: Storage, manifest: Manifest, decode_rows: set[int], meter: ReadMeter, number: int
) -> ShardFindings:
    """Reads a file of samples once, sequentially, and checks its size, its hash and its samples.

    Args:
        store: Storage of the data set.
        manifest: Index of the data set.
        decode_rows: Manifest rows whose frames are decoded as well.
        meter: Counts the bytes.
        number: Number of the file in `Manifest.files`.
    """
    shard, samples = manifest.files[number], manifest.samples
    findings, digest = ShardFindings(), hashlib.sha256()
    file = SequentialShard(store, shard, meter, read_ahead=CHUNK_BYTES)
    end = 0  # end of the samples read so far; in a shard, samples are adjacent
    try:
        for row in manifest.rows_of_file(number):
            offset, length = int(samples.offset[row]), int(samples.length[row])
            has_gaps = manifest.beton is not None or manifest.foreign is not None
            while has_gaps and offset > end:
                # FFCV's file header and the unused ends of its pages, or what was not adopted.
                gap = file.read(end, min(offset - end, CHUNK_BYTES))
                if not gap:
                    break
                digest.update(gap)
                findings.num_bytes += len(gap)
                end += len(gap)
            content = file.read(end, length)
            digest.update(content)
            if offset != end:
                what = f"offset {offset} in the manifest, expected {end}"
                findings.problems.append(Problem(where=sample_location(manifest, row), what=what))
            findings.num_bytes += len(content)
            end += length
            _check_sample(findings, manifest, row, content, decode=row in decode_rows)
        # One byte beyond the packed size detects a shard that grew.
        while content := file.read(end, min(max(0, shard.shard_bytes + 1 - end), CHUNK_BYTES)):
            digest.update(content)
            findings.num_bytes += len(content)
            end += len(content)
    except OSError as error:
        what = f"{type(error).__name__}: {error}"
        findings.problems.append(Problem(where=shard.name, what=what))
        return findings
    findings.problems += _file_problems(shard, findings.num_bytes, digest.hexdigest())
    return findings


def read_captions(
    store: Storage, manifest: Manifest, meter: ReadMeter, number: int
) -> ShardFindings:
    """Reads the captions of a shard's samples; counts samples that cannot be read."""
    samples, findings = manifest.samples, ShardFindings()
    file = SequentialShard(store, manifest.files[number], meter, read_ahead=CHUNK_BYTES)
    rows = manifest.rows_of_file(number)
    for done, row in enumerate(rows):
        try:
            meta = parse_meta(str(samples.key[row]), read_members(file, manifest, row))
        except BadSample:
            findings.num_unread += 1
        except OSError:
            findings.num_unread += len(rows) - done
            break
        else:
            findings.captions.add(meta.video_id, meta.texts)
    return findings


def _file_problems(shard: Shard, num_bytes: int, sha256: str) -> list[Problem]:
    problems = []
    if num_bytes != shard.shard_bytes:
        what = f"{num_bytes} bytes, expected {shard.shard_bytes}"
        if num_bytes > shard.shard_bytes:
            what = f"more than the expected {shard.shard_bytes} bytes"
        problems.append(Problem(where=shard.name, what=what))
    if sha256 != shard.sha256:
        what = "sha256 differs from the manifest's"
        problems.append(Problem(where=shard.name, what=what))
    return problems


def _check_sample(
    findings: ShardFindings, manifest: Manifest, row: int, content: bytes, *, decode: bool
) -> None:
    samples, where = manifest.samples, sample_location(manifest, row)
    key = str(samples.key[row])
    try:
        members = parse_range(manifest, row, content)
        meta = parse_meta(key, members)
        stored = stored_index(key, members)
        if decode and stored is not None and stored != index_packets(members["mp4"], key):
            what = f"{INDEX_MEMBER} differs from the packets of the video"
            findings.problems.append(Problem(where=where, what=what))
        if decode:
            # Of large pictures only a pixel is held.
            decode_members(
                key,
                members,
                meta,
                manifest.num_frames or 1,
                finish=lambda frame: frame[:1, :1].copy(),
            )
    except BadSample as error:
        findings.num_unread += 1
        findings.problems.append(Problem(where=where, what=f"{error.reason}: {error.detail}"))
        return
    findings.captions.add(meta.video_id, meta.texts)
    for name, found, expected in (
        ("captions", len(meta.captions), int(samples.num_captions[row])),
        ("video_id", meta.video_id, str(samples.video_id[row])),
    ):
        if found != expected:
            what = f"{name} {found!r}, {expected!r} in the manifest"
            findings.problems.append(Problem(where=where, what=what))
    for caption in meta.captions:
        if what := _word_problem(caption, has_tagger=manifest.tagger is not None):
            what = f"caption {caption.text!r}: {what}"
            findings.problems.append(Problem(where=where, what=what))


def _word_problem(caption: Caption, *, has_tagger: bool) -> str:
    """Describes the first invalid word; empty if all words are ordered spans of the caption."""
    if caption.words is None or not has_tagger:
        if (caption.words is not None) == has_tagger:
            return ""
        return "words missing" if has_tagger else "words without a tagger in the manifest"
    end = 0
    for word in caption.words:
        if not end <= word.start < word.end <= len(caption.text):
            span = f"[{word.start}, {word.end})"
            return f"word {span} must lie within [{end}, {len(caption.text)})"
        end = word.end
    return ""
