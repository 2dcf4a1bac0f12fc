"""Checks a data set against its manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.decode import segment_centres
from tvr.data_prep.manifest import Manifest, join, read_manifest
from tvr.data_prep.reader import decode_members, parse_members, parse_meta
from tvr.data_prep.records import BadSample

READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that differs from the manifest."""

    where: str
    """Shard name, or "shard: key"."""
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was checked and what was found; no problems means the data set is the one that was
    packed."""

    num_shards: int
    num_samples: int
    num_bytes: int
    """Read and hashed."""
    num_decoded: int
    problems: tuple[Problem, ...]


def verify_dataset(url: str, *, decode: int = 32) -> Report:
    """Reads every byte once: shard presence, size and sha256; each sample's range, members and
    JSON; duplicates.

    Of `decode` samples spread evenly over the data set (0 = none) the frames are decoded as well.
    Frame counts and sizes are not judged. Raises as `read_manifest` when there is no readable
    index.
    """
    if decode < 0:
        raise ValueError(f"decode={decode} must be 0 or more samples")
    manifest = read_manifest(url)
    rows = set(segment_centres(manifest.num_samples, decode)) if decode else set()
    problems = list(_duplicates(manifest))
    num_bytes = 0
    for number in range(len(manifest.shards)):
        read, found = _check_shard(url, manifest, number, rows)
        num_bytes += read
        problems += found
    return Report(
        num_shards=len(manifest.shards),
        num_samples=manifest.num_samples,
        num_bytes=num_bytes,
        num_decoded=len(rows),
        problems=tuple(problems),
    )


def _duplicates(manifest: Manifest) -> Iterator[Problem]:
    for what, names in (
        ("sample key", manifest.samples.key.tolist()),
        ("shard name", [shard.name for shard in manifest.shards]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                yield Problem(where="manifest.json", what=f"{what} {name} occurs {count} times")


def _check_shard(
    url: str, manifest: Manifest, number: int, decode_rows: set[int]
) -> tuple[int, list[Problem]]:
    """Bytes read, and what is wrong with the shard and its samples."""
    shard = manifest.shards[number]
    fs, root = url_to_fs(url)
    problems: list[Problem] = []
    digest = hashlib.sha256()
    num_bytes = end = 0  # read, and of the samples so far: samples lie end to end
    try:
        with fs.open(join(root, shard.name), "rb") as file:
            for row in np.flatnonzero(manifest.samples.shard == number).tolist():
                content = file.read(int(manifest.samples.length[row]))
                digest.update(content)
                offset = int(manifest.samples.offset[row])
                if offset != end:
                    key = manifest.samples.key[row]
                    what = f"offset {offset} in the manifest, expected {end}"
                    problems.append(Problem(where=f"{shard.name}: {key}", what=what))
                num_bytes += len(content)
                end += int(manifest.samples.length[row])
                problems += _check_sample(manifest, row, shard.name, content, row in decode_rows)
            while content := file.read(READ_BYTES):
                digest.update(content)
                num_bytes += len(content)
    except OSError as error:
        return num_bytes, [
            *problems,
            Problem(where=shard.name, what=f"{type(error).__name__}: {error}"),
        ]
    if num_bytes != shard.shard_bytes:
        problems.append(
            Problem(where=shard.name, what=f"{num_bytes} bytes, packed were {shard.shard_bytes}")
        )
    if digest.hexdigest() != shard.sha256:
        problems.append(Problem(where=shard.name, what="sha256 differs from the manifest's"))
    return num_bytes, problems


def _check_sample(
    manifest: Manifest, row: int, shard_name: str, content: bytes, decode: bool
) -> list[Problem]:
    samples = manifest.samples
    key = str(samples.key[row])
    try:
        members = parse_members(content, key, int(samples.length[row]), int(samples.crc32[row]))
        meta = parse_meta(key, members)
        if decode:
            decode_members(key, members, meta, manifest.num_frames or 1)
    except BadSample as error:
        return [Problem(where=f"{shard_name}: {key}", what=f"{error.reason}: {error.detail}")]
    found = []
    if len(meta.captions) != samples.num_captions[row]:
        found.append(f"{len(meta.captions)} captions, {samples.num_captions[row]} in the manifest")
    video_id = str(samples.video_id[row])
    if meta.video_id != video_id:
        found.append(f"video_id {meta.video_id!r}, {video_id!r} in the manifest")
    return [Problem(where=f"{shard_name}: {key}", what=what) for what in found]
