"""What is reproduced: a description of each benchmark, and the published rows beside it.

A published row names where we read its numbers. A number that we could not read is not in the
table: of the method's own rows (Jiang et al., "Dual-Modal Attention-Enhanced Text-Video Retrieval
with Triplet Partial Margin Contrastive Learning", ACM MM 2023, arXiv 2309.11082) those on MSVD,
DiDeMo and ActivityNet are left out, since the tables of the paper were out of our reach. There the
goal is CLIP4Clip (arXiv 2104.08860), whose settings the recipes take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tvr.data_prep.annotations.benchmarks import Dataset

Benchmark = Literal["msrvtt", "msvd", "didemo", "activitynet"]
Towers = Literal["b32", "b16"]

PATCH_SIZES: Mapping[Towers, int] = {"b32": 32, "b16": 16}
"""Side of an image patch of the published towers, in pixels."""

GARE = "as quoted in tables 1 and 2 of GARE (Xiao et al., 2025)"
MEMVERSE = "as quoted in table 2 of MemVerse (2025)"
BY_HAND = "R@1 as handed down to us; not read in the paper"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """A row of a paper's table: recalls in percent, by raw similarity."""

    method: str
    source: str
    """Where the numbers were read."""
    text_to_video: Mapping[int, float]
    """R@K by K."""
    video_to_text: Mapping[int, float]
    """R@K by K; may be empty."""
    is_goal: bool = False
    """True for the row that the result is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkPack:
    """A benchmark: the splits to pack, the recipes to train, and the rows to compare with."""

    title: str
    dataset: Dataset
    """Name of the benchmark for `tvr pack --dataset`."""
    train: str
    """Split to train on."""
    choose: str
    """Split that training evaluates, and by which the best checkpoint is chosen."""
    test: str
    """Split of the table."""
    recipes: Mapping[Towers, str]
    """Recipe by towers."""
    ranks: int
    """Ranks of the recipe, if the user names no number."""
    published: Mapping[Towers, tuple[PublishedRow, ...]]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits to pack, each once."""
        return tuple(dict.fromkeys((self.train, self.choose, self.test)))

    def goal(self, towers: Towers) -> PublishedRow:
        """The row to reach.

        Raises:
            ValueError: there is no recipe for these towers.
        """
        if towers not in self.recipes:
            raise ValueError(
                f"towers={towers!r} of {self.dataset} must be one of {', '.join(self.recipes)}"
            )
        (row,) = [row for row in self.published[towers] if row.is_goal]
        return row


def _recalls(at_1: float, at_5: float, at_10: float) -> dict[int, float]:
    return {1: at_1, 5: at_5, 10: at_10}


def _clip4clip(
    to_video: dict[int, float], to_text: dict[int, float] | None = None, *, is_goal: bool
) -> PublishedRow:
    return PublishedRow(
        method="CLIP4Clip ViT-B/32 (seqTransf)",
        source=f"arXiv 2104.08860, {GARE}",
        text_to_video=to_video,
        video_to_text=to_text or {},
        is_goal=is_goal,
    )


def other_towers(folder: Path, towers: Towers) -> str | None:
    """What to say if a CLIP's folder holds towers of another size than the published ones."""
    content = json.loads((folder / "config.json").read_text())
    found = (content.get("vision_config") or {}).get("patch_size", 32)  # transformers leaves out 32
    if found == PATCH_SIZES[towers]:
        return None
    return (
        f"{folder} has towers with patches of {found} pixels, and the published ones of"
        f" --towers {towers} have {PATCH_SIZES[towers]}: their numbers are not comparable"
    )


PACKS: Mapping[Benchmark, BenchmarkPack] = {
    "msrvtt": BenchmarkPack(
        title="MSR-VTT, training on 9k, test on 1k-A",
        dataset="msrvtt",
        train="train-9k",
        # 1k-A has no validation split of its own: the custom is to choose by the test split.
        choose="test-1ka",
        test="test-1ka",
        recipes={"b32": "msrvtt_b32", "b16": "msrvtt_b16"},
        ranks=4,
        published={
            "b32": (
                _clip4clip(_recalls(44.5, 71.4, 81.6), _recalls(42.7, 70.9, 80.6), is_goal=False),
                PublishedRow(
                    method="DMAE ViT-B/32",
                    source=f"arXiv 2309.11082, {BY_HAND}",
                    text_to_video={1: 46.9},
                    video_to_text={},
                    is_goal=True,
                ),
            ),
            "b16": (
                PublishedRow(
                    method="CLIP4Clip ViT-B/16",
                    source=f"arXiv 2104.08860, {MEMVERSE}",
                    text_to_video=_recalls(46.4, 72.1, 82.0),
                    video_to_text=_recalls(45.4, 73.4, 82.4),
                ),
                PublishedRow(
                    method="DMAE ViT-B/16",
                    source=f"arXiv 2309.11082, {MEMVERSE}",
                    text_to_video=_recalls(49.9, 75.8, 85.5),
                    video_to_text=_recalls(49.6, 76.3, 85.0),
                    is_goal=True,
                ),
            ),
        },
    ),
    "msvd": BenchmarkPack(
        title="MSVD",
        dataset="msvd",
        train="train",
        choose="val",
        test="test",
        recipes={"b32": "msvd_b32"},
        ranks=4,
        published={"b32": (_clip4clip(_recalls(45.2, 75.5, 84.3), is_goal=True),)},
    ),
    "didemo": BenchmarkPack(
        title="DiDeMo, paragraphs",
        dataset="didemo",
        train="train",
        choose="val",
        test="test",
        recipes={"b32": "didemo_b32"},
        ranks=8,
        published={"b32": (_clip4clip(_recalls(42.8, 68.5, 79.2), is_goal=True),)},
    ),
    "activitynet": BenchmarkPack(
        title="ActivityNet Captions, paragraphs, val_1",
        dataset="activitynet",
        train="train",
        # Papers report val_1, and there is no other split to choose by.
        choose="val",
        test="val",
        recipes={"b32": "activitynet_b32"},
        ranks=8,
        published={"b32": (_clip4clip(_recalls(40.5, 72.4, 83.6), is_goal=True),)},
    ),
}
