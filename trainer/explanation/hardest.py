"""The captions of a test set that a wrong video beats by most, and how they move in training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.html_page import page_template, shown_text
from tvr.trainer.config import ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.embed import Report, embed
from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.evaluation.retrieval import paired_scores, rank_features
from tvr.trainer.explanation.videos import Strips
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

CPU = torch.device("cpu")
CANDIDATES = 6
"""Best videos among which the best wrong one is searched: a caption may have several right ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardNegative:
    """A caption of a test set and the wrong video that is most similar to it."""

    caption: str
    key: str
    """The right video: the one that the caption belongs to."""
    similarity: float
    """Of the caption and the right video."""
    wrong_key: str
    wrong_similarity: float
    rank: int
    """Of the right video, from 1; ties count against it."""

    @property
    def lead(self) -> float:
        """By how much the wrong video beats the right one; negative if the right one leads."""
        return self.wrong_similarity - self.similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """A caption at two checkpoints."""

    before: HardNegative
    after: HardNegative

    @property
    def is_won(self) -> bool:
        """True if the right video became the first one."""
        return self.before.rank > 1 and self.after.rank == 1

    @property
    def is_lost(self) -> bool:
        """True if the right video was the first one and no longer is."""
        return self.before.rank == 1 and self.after.rank > 1


def hard_negatives(
    source: SourceModel, data: str, *, max_bad: int = 100, report: Report | None = None
) -> list[HardNegative]:
    """Finds the best wrong video of every caption of a packed test set.

    A video with an equal caption is not wrong.

    Args:
        source: The model.
        data: URL of the set. Its features are held in a temporary folder.
        max_bad: Allowed number of samples that cannot be read.
        report: As in `embed`.

    Returns:
        One record a caption, in the order of the set.

    Raises:
        ValueError: the set has no captions, or fewer than two videos.
        TooManyBadSamples: as `embed`.
    """
    with tempfile.TemporaryDirectory(prefix="tvr-hardest-") as folder:
        embed(source, data, folder, stored="fp32", max_bad=max_bad, report=report)
        stored = FeatureSet.open(folder)
        if len(stored) < 2 or not stored.num_captions:
            raise ValueError(
                f"{data} has {stored.num_captions} captions and {len(stored)} videos: a wrong video"
                " needs a caption and two videos"
            )
        features, caption_video = stored.lazy_features()
        return negatives_of_features(
            features,
            caption_video,
            model=source.config.model,
            captions=list(stored.captions),
            keys=list(stored.keys),
            device=source.device,
        )


def negatives_of_features(
    features: Features,
    caption_video: Tensor,
    *,
    model: ModelConfig,
    captions: Sequence[str],
    keys: Sequence[str],
    device: torch.device = CPU,
) -> list[HardNegative]:
    """Finds the best wrong video of every caption, without encoding anything.

    Args:
        features: Features of A captions and C videos, which may be memory-mapped.
        caption_video: (A,) row of each caption's video.
        model: Settings of the similarity.
        captions: (A,) texts.
        keys: (C,) keys of the videos.
        device: On which similarities are computed.

    Returns:
        One record a caption; none for a caption that all videos share.
    """
    world = World(rank=0, world_size=1, device=device)
    score = partial(similarity_rows, model=model)
    right: dict[str, set[int]] = {}
    for text, video in zip(captions, caption_video.tolist(), strict=True):
        right.setdefault(text, set()).add(video)
    most = max(len(videos) for videos in right.values())
    ranked = rank_features(
        features, caption_video, score, world, top_videos=max(CANDIDATES, most + 1)
    )
    own = torch.arange(len(captions))
    with torch.no_grad():
        matched = paired_scores(features, features, own, caption_video, score, world.device)
    found = []
    for row, (text, video) in enumerate(zip(captions, caption_video.tolist(), strict=True)):
        top = zip(ranked.top_videos[row].tolist(), ranked.top_scores[row].tolist(), strict=True)
        wrong = next(((at, value) for at, value in top if at not in right[text]), None)
        if wrong is None:
            continue  # every video has this caption
        found.append(
            HardNegative(
                caption=text,
                key=keys[int(video)],
                similarity=float(matched[row]),
                wrong_key=keys[int(wrong[0])],
                wrong_similarity=wrong[1],
                rank=int(ranked.ranks.text_to_video[row]),
            )
        )
    return found


def hardest(found: Sequence[HardNegative], count: int) -> list[HardNegative]:
    """The captions that a wrong video beats by most, the hardest first."""
    return sorted(found, key=lambda each: -each.lead)[:count]


def movements(before: Sequence[HardNegative], after: Sequence[HardNegative]) -> list[Movement]:
    """Pairs the records of two checkpoints, in the order of the second.

    Captions that one of them lacks are left out.
    """
    known = {(each.key, each.caption): each for each in before}
    return [
        Movement(before=known[each.key, each.caption], after=each)
        for each in after
        if (each.key, each.caption) in known
    ]


def hardest_json(
    found: Sequence[HardNegative], count: int, moved: Sequence[Movement] | None = None
) -> dict[str, Any]:
    """The hardest captions as plain values, with their movement if there is one."""
    content: dict[str, Any] = {
        "captions": len(found),
        "first": sum(each.rank == 1 for each in found),
        "hardest": [_plain(each) for each in hardest(found, count)],
    }
    if moved is not None:
        content["before"] = {
            "captions": len(moved),
            "first": sum(each.before.rank == 1 for each in moved),
            "hardest": [_plain(each) for each in hardest([m.before for m in moved], count)],
        }
        pairs = [{"before": _plain(m.before), "after": _plain(m.after)} for m in moved]
        for name in ("won", "lost"):
            content[f"newly_{name}"] = [
                pair for pair, m in zip(pairs, moved, strict=True) if getattr(m, f"is_{name}")
            ]
    return content


def hardest_table(
    found: Sequence[HardNegative], count: int, moved: Sequence[Movement] | None = None
) -> str:
    """The hardest captions as text for a terminal; similarities are right / best wrong."""
    first = sum(each.rank == 1 for each in found)
    lines = [f"{len(found)} captions, {first} with the right video first"]
    earlier = {(m.after.key, m.after.caption): m.before for m in moved or ()}
    if moved is not None:
        won, lost = sum(m.is_won for m in moved), sum(m.is_lost for m in moved)
        lines[0] += f"; {won} newly won, {lost} newly lost"
    head = f"{'lead':>7} {'right':>7} {'wrong':>7} {'rank':>5}"
    lines.append(
        head + (f"  {'lead before':>11} {'rank':>5}" if moved is not None else "") + "  caption"
    )
    for each in hardest(found, count):
        line = f"{each.lead:7.4f} {each.similarity:7.4f} {each.wrong_similarity:7.4f} {each.rank:5}"
        if moved is not None:
            old = earlier.get((each.key, each.caption))
            line += "  " + (f"{old.lead:11.4f} {old.rank:5}" if old else " " * 17)
        lines.append(f"{line}  {shown_text(each.caption)} [{each.key}; {each.wrong_key}]")
    return "\n".join(lines)


def hardest_page(
    found: Sequence[HardNegative],
    count: int,
    *,
    title: str,
    strips: Strips,
    moved: Sequence[Movement] | None = None,
    steps: tuple[int, int] | None = None,
) -> str:
    """Returns one HTML document: the hardest captions with the right and the wrong video.

    Args:
        count: Captions of each list.
        strips: Pictures of a video by its key.
        moved: Adds the captions newly won and newly lost, and the earlier values.
        steps: The two checkpoints of `moved`.
    """
    earlier = {(m.after.key, m.after.caption): m.before for m in moved or ()}

    def shown(each: HardNegative) -> dict[str, Any]:
        return {
            "now": each,
            "before": earlier.get((each.key, each.caption)),
            "right": strips(each.key),
            "wrong": strips(each.wrong_key),
        }

    lists = [("Hardest captions", [shown(each) for each in hardest(found, count)])]
    if moved is not None:
        won = [m.after for m in moved if m.is_won]
        lost = [m.after for m in moved if m.is_lost]
        # Those that moved by most.
        won.sort(key=lambda each: each.lead - earlier[each.key, each.caption].lead)
        lists += [
            (f"Newly lost: {len(lost)}", [shown(each) for each in hardest(lost, count)]),
            (f"Newly won: {len(won)}", [shown(each) for each in won[:count]]),
        ]
    return page_template(Path(__file__).parent, "hardest.html.jinja").render(
        title=title,
        captions=len(found),
        first=sum(each.rank == 1 for each in found),
        first_before=sum(m.before.rank == 1 for m in moved or ()),
        captions_before=len(moved or ()),
        steps=steps,
        lists=lists,
    )


def _plain(each: HardNegative) -> dict[str, Any]:
    return {**asdict(each), "lead": each.lead}
