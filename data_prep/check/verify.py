"""Verifies a data set against its manifest, and checks that it shares no sample with others."""

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
    read_captions,
    sample_location,
)
from tvr.data_prep.check.sequential_reads import JOBS, OnBytes, ReadMeter, map_shards
from tvr.data_prep.dataset.leakage import repeated_content, repeated_keys, shared_samples
from tvr.data_prep.dataset.manifest import BAD_NAME, MANIFEST_NAME, Manifest, read_manifest
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.frame_sampling import segment_centres


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonCaptions:
    """Captions shared with another data set. They are no problem: two videos may be alike."""

    url: str
    """The other data set."""
    num_captions: int
    """Distinct captions that are in both data sets."""
    num_unread: int
    """Samples of the other data set whose captions could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Result of a verification.

    Without problems, the data set equals the one that was packed, and shares no sample with the
    data sets it was compared with.
    """

    url: str
    num_shards: int
    num_samples: int
    num_bytes: int
    """Bytes read and hashed."""
    num_decoded: int
    """Samples whose frames were decoded."""
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
    on_bytes: OnBytes | None = None,
) -> VerifyReport:
    """Verifies a packed data set; reads every byte once.

    It checks every row of the index, that each shard exists and has the size and sha256 of the
    manifest, that each sample
    has its byte range, members and JSON, that no sample is duplicated, that the list of refused
    clips agrees with the manifest, and that words lie within their captions. It does not judge
    frame counts or frame sizes.

    Args:
        url: Folder or fsspec URL of the data set.
        decode: Samples, evenly spaced over the data set, whose frames are decoded; 0 = none.
        against: Other data sets. A sample with the key, video_id or content of one of their samples
            is a problem. This check reads their manifests only.
        compare_captions: Read the samples of the other data sets as well, to count the captions in
            common.
        jobs: Shards to read in parallel.
        on_bytes: Called after each read.

    Raises:
        ValueError: `decode` or `jobs` is out of range.
        FileNotFoundError, OSError, ShardCorrupt: no readable index, see `read_manifest`.
    """
    if decode < 0:
        raise ValueError(f"decode={decode} must be 0 or more samples")
    manifest = read_manifest(url)
    others = {other: read_manifest(other) for other in against}
    for each in (manifest, *others.values()):
        each.check_samples()
    read = [manifest, *(others.values() if compare_captions else ())]
    meter = ReadMeter(sum(s.shard_bytes for each in read for s in each.files), on_bytes)
    rows = set(segment_centres(manifest.num_samples, decode)) if decode else set()
    check = partial(check_shard, Storage(manifest.files_url(url)), manifest, rows, meter)
    findings = _read_all(manifest, check, jobs, meter)
    problems = [*_duplicates(manifest), *_total_problems(url, manifest), *findings.problems]
    common = []
    for other, theirs in others.items():
        problems += leak_problems(manifest, other, theirs)
        if compare_captions:
            read_other = partial(read_captions, Storage(theirs.files_url(other)), theirs, meter)
            other_findings = _read_all(theirs, read_other, jobs, meter)
            common.append(
                CommonCaptions(
                    url=other,
                    num_captions=findings.captions.num_also_in(other_findings.captions),
                    num_unread=other_findings.num_unread,
                )
            )
    return VerifyReport(
        url=url,
        num_shards=len(manifest.files),
        num_samples=manifest.num_samples,
        num_bytes=findings.num_bytes,
        num_decoded=len(rows),
        captions=findings.captions.statistics(),
        common_captions=tuple(common),
        problems=tuple(problems),
    )


def leak_problems(manifest: Manifest, other: str, theirs: Manifest) -> Iterator[Problem]:
    """Yields a problem for each sample that equals a sample of the data set at `other`."""
    for shared in shared_samples(manifest.samples, theirs.samples):
        columns = " and ".join(shared.by)
        what = f"same {columns} as {theirs.samples.key[shared.other_row]} of {other}"
        yield Problem(where=sample_location(manifest, shared.row), what=what)


def _read_all(
    manifest: Manifest, read: Callable[[int], ShardFindings], jobs: int, meter: ReadMeter
) -> ShardFindings:
    merged = ShardFindings()
    for findings in map_shards(jobs, read, range(len(manifest.files)), meter):
        merged.merge(findings)
    return merged


def _duplicates(manifest: Manifest) -> Iterator[Problem]:
    samples = manifest.samples
    for what, counts in (
        ("sample key", repeated_keys(samples)),
        ("shard name", Counter(shard.name for shard in manifest.shards)),
    ):
        for name, count in counts.items():
            if count > 1:
                yield Problem(where=MANIFEST_NAME, what=f"{what} {name} occurs {count} times")
    for row, first in repeated_content(samples):
        what = (
            f"same content as {samples.key[first]}, but video_id {str(samples.video_id[row])!r}"
            f" instead of {str(samples.video_id[first])!r}"
        )
        yield Problem(where=sample_location(manifest, row), what=what)


def _total_problems(url: str, manifest: Manifest) -> Iterator[Problem]:
    """Compares the manifest's totals with its columns and with the list of refused clips."""
    num_captions = int(manifest.samples.num_captions.sum())
    if num_captions != manifest.num_captions:
        what = f"{manifest.num_captions} captions, {num_captions} in its columns"
        yield Problem(where=MANIFEST_NAME, what=what)
    try:
        # Not splitlines: a detail may hold other line separators.
        lines = filter(None, Storage(url).read(BAD_NAME).decode().split("\n"))
        listed = Counter(json.loads(line)["reason"] for line in lines)
    except OSError as error:
        yield Problem(where=BAD_NAME, what=f"{type(error).__name__}: {error}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        yield Problem(where=BAD_NAME, what=f"damaged or edited: {error!r}")
    else:
        if listed != manifest.bad:
            what = f"{_counts(listed)} listed, {_counts(manifest.bad)} in {MANIFEST_NAME}"
            yield Problem(where=BAD_NAME, what=what)


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items())) or "none"
