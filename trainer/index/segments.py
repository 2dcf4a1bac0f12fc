"""How the videos of a feature set are divided into segments of an index."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tvr.trainer.features.feature_set import FeatureSet, Part
from tvr.trainer.index.layout import FOLDER, IndexManifest


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """Consecutive blocks of one data set, which lie in consecutive rows of the feature set."""

    source: str
    first_block: int
    end_block: int
    first_row: int
    videos: int
    features: str


def planned_segments(features: FeatureSet, blocks_per_segment: int) -> list[PlannedSegment]:
    """The segments of a feature set, in the order of its rows."""
    found: list[PlannedSegment] = []
    row = 0
    groups: dict[tuple[str, int], list[tuple[int, Part]]] = {}
    for source, part in features.parts:
        block = int(part.name.removeprefix("block-"))
        first = block - block % blocks_per_segment
        groups.setdefault((source.name, first), []).append((row, part))
        row += part.videos
    for (source_name, first), parts in groups.items():
        found.append(
            PlannedSegment(
                source=source_name,
                first_block=first,
                end_block=first + len(parts),
                first_row=parts[0][0],
                videos=sum(part.videos for _, part in parts),
                features=_digest([part for _, part in parts]),
            )
        )
    return found


def indexed_rows(features: FeatureSet, manifest: IndexManifest, where: Path) -> list[range]:
    """Rows in the feature set of each segment of an index.

    Raises:
        ValueError: the index was built from other features.
    """
    if manifest.header.fingerprint != features.info.fingerprint:
        raise ValueError(
            f"{where}: built from features of another model; remove {features.folder / FOLDER} and"
            " build the index again"
        )
    plan = planned_segments(features, manifest.header.blocks_per_segment)
    by_name = {(each.source, each.first_block): each for each in plan}
    found = []
    for segment in manifest.segments:
        own = by_name.get((segment.source, segment.first_block))
        if own is None or (own.features, own.videos) != (segment.features, segment.videos):
            raise ValueError(
                f"{where}: {segment.source}/{segment.name} was built from other features than those"
                f" in {features.folder}; remove {features.folder / FOLDER} and build it again"
            )
        found.append(range(own.first_row, own.first_row + own.videos))
    return found


def _digest(parts: list[Part]) -> str:
    """SHA-256 of the hashes of what the vectors are computed from, and of the order of the keys."""
    names = ("frames", "frames_scale", "frame_mask", "frame_logits", "keys")
    hashes = [
        [part.name, part.videos, *(part.files[n].sha256 for n in names if n in part.files)]
        for part in parts
    ]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
