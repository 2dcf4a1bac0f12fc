"""Checks a data set against its manifest, and that it has nothing in common with others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tvr.data_prep.check.captions import CaptionStatistics
from tvr.data_prep.check.check_shard import (
    Problem,
    ShardFindings,
    check_shard,
    place,
    read_captions,
)
from tvr.data_prep.check.sequential_reads import JOBS, Progress, ReadMeter, map_shards
from tvr.data_prep.dataset.leakage import repeated_content, shared_samples
from tvr.data_prep.dataset.manifest import BAD_NAME, MANIFEST_NAME, Manifest, read_manifest
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.frame_sampling import segment_centres


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonCaptions:
    """What is no problem: two videos may be described by the same words."""

    url: str
    num_captions: int
    """Distinct captions that are in both data sets."""
    num_unread: int
    """Samples of the other one whose captions could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked and what was found; no problems means the data set is the one that was
    packed, and has no sample in common with those it was held against."""

    url: str
    num_shards: int
    num_samples: int
    num_bytes: int
    """Read and hashed."""
    num_decoded: int
    captions: CaptionStatistics
    common_captions: tuple[CommonCaptions, ...]
    problems: tuple[Problem, ...]


def verify_dataset(
    url: str,
    *,
    decode: int = 32,
    against: Sequence[str] = (),
    compare_captions: bool = True,
    jobs: int = JOBS,
    progress: Progress | None = None,
) -> VerifyReport:
    """Reads every byte once: shard presence, size and sha256; each sample's range, members and
    JSON; duplicates; refused clips as listed; captions.

    Of `decode` samples spread evenly over the data set (0 = none) the frames are decoded as well.
    Frame counts and sizes are not judged. A sample whose key, video_id or content is in one of the
    data sets `against` is a problem. That takes their manifests; `compare_captions` reads their
    samples too, and counts captions in common. `jobs` shards are read at a time.

    Raises as `read_manifest` when there is no readable index.
    """
    if decode < 0:
        raise ValueError(f"decode={decode} must be 0 or more samples")
    manifest = read_manifest(url)
    others = {other: read_manifest(other) for other in against}
    read = [manifest, *(others.values() if compare_captions else ())]
    meter = ReadMeter(sum(s.shard_bytes for each in read for s in each.files), progress)
    rows = set(segment_centres(manifest.num_samples, decode)) if decode else set()
    scan = _scan(manifest, partial(check_shard, Storage(url), manifest, rows, meter), jobs, meter)
    problems = [*_duplicates(manifest), *_totals(url, manifest), *scan.problems]
    common = []
    for other, theirs in others.items():
        problems += leak_problems(manifest, other, theirs)
        if compare_captions:
            found = _scan(
                theirs, partial(read_captions, Storage(other), theirs, meter), jobs, meter
            )
            num_captions = scan.captions.num_also_in(found.captions)
            common.append(
                CommonCaptions(url=other, num_captions=num_captions, num_unread=found.num_unread)
            )
    return VerifyReport(
        url=url,
        num_shards=len(manifest.files),
        num_samples=manifest.num_samples,
        num_bytes=scan.num_bytes,
        num_decoded=len(rows),
        captions=scan.captions.statistics(),
        common_captions=tuple(common),
        problems=tuple(problems),
    )


def leak_problems(manifest: Manifest, other: str, theirs: Manifest) -> Iterator[Problem]:
    """A problem for each pair of a sample and one of the data set at `other` that are the same."""
    for shared in shared_samples(manifest.samples, theirs.samples):
        same = " and ".join(shared.by)
        what = f"same {same} as {theirs.samples.key[shared.other_row]} of {other}"
        yield Problem(where=place(manifest, shared.row), what=what)


def _scan(
    manifest: Manifest, read: Callable[[int], ShardFindings], jobs: int, meter: ReadMeter
) -> ShardFindings:
    whole = ShardFindings()
    for scan in map_shards(jobs, read, range(len(manifest.files)), meter):
        whole.merge(scan)
    return whole


def _duplicates(manifest: Manifest) -> Iterator[Problem]:
    samples = manifest.samples
    for what, names in (
        ("sample key", samples.key.tolist()),
        ("shard name", [shard.name for shard in manifest.shards]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                yield Problem(where=MANIFEST_NAME, what=f"{what} {name} occurs {count} times")
    for row, first in repeated_content(samples):
        what = (
            f"same content as {samples.key[first]}, but video_id {str(samples.video_id[row])!r}"
            f" instead of {str(samples.video_id[first])!r}"
        )
        yield Problem(where=place(manifest, row), what=what)


def _totals(url: str, manifest: Manifest) -> Iterator[Problem]:
    """Where the manifest's totals are not those of its columns and of the list of refused clips."""
    num_captions = int(manifest.samples.num_captions.sum())
    if num_captions != manifest.num_captions:
        what = f"{manifest.num_captions} captions, {num_captions} in its columns"
        yield Problem(where=MANIFEST_NAME, what=what)
    try:
        lines = Storage(url).read(BAD_NAME).decode().splitlines()
        listed = Counter(json.loads(line)["reason"] for line in lines)
    except OSError as error:
        yield Problem(where=BAD_NAME, what=f"{type(error).__name__}: {error}")
    except (ValueError, KeyError, TypeError) as error:
        yield Problem(where=BAD_NAME, what=f"not as packed: {error!r}")
    else:
        if listed != manifest.bad:
            what = f"{_counts(listed)} listed, {_counts(manifest.bad)} in {MANIFEST_NAME}"
            yield Problem(where=BAD_NAME, what=what)


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items())) or "none"
