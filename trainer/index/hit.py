"""A video that a search found."""

from __future__ import annotations

from dataclasses import dataclass

from tvr.trainer.features.feature_set import FeatureSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A video that a search found."""

    rank: int
    """From 1."""
    key: str
    data: str
    """URL of its data set, within which keys are unique."""
    video: int
    """Row in the feature set."""
    similarity: float
    """Of DMAE, unscaled."""
    start_s: float
    end_s: float
    """The cut of the source file; not a number: the end of the file."""


def hit_of(features: FeatureSet, video: int, rank: int, similarity: float) -> Hit:
    """The hit of a row of a feature set."""
    data, found = features.source(video)
    return Hit(
        rank=rank,
        key=features.keys[video],
        data=data.url,
        video=video,
        similarity=similarity,
        start_s=found.start_s,
        end_s=found.end_s,
    )
