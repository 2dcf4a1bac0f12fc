"""Retrieval over a whole test set: every caption against every video, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.records import Batch, Replacement, TooManyBadSamples
from tvr.kernels.ranking import RetrievalMetrics, ranks, retrieval_metrics
from tvr.trainer.config import Config
from tvr.trainer.data import ordered_batches
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.gradient_cache import joined
from tvr.trainer.loss.objective import gathered_videos, similarity_rows
from tvr.trainer.model.model import Features, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer

Encode = Callable[..., Features]
SHOWN = 5  # videos listed per query
TABLE = {
    "R@1": "recall_at_1",
    "R@5": "recall_at_5",
    "R@10": "recall_at_10",
    "MdR": "median_rank",
    "MnR": "mean_rank",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results on one test set; recalls and accuracy in percent, ranks from 1."""

    data: str
    videos: int
    captions: int
    left_out: tuple[Replacement, ...]
    """Samples that could not be read."""
    metrics: RetrievalMetrics
    binding_accuracy: float | None
    """Captions nearer to their own clip than to its counterpart with exchanged attributes."""
    queries: list[dict[str, Any]]
    """Per caption: its text, key, rank, and the top 5 videos."""

    @property
    def score(self) -> float:
        """What the best checkpoint is the best by: the mean of R@1 both ways."""
        both = (self.metrics.text_to_video, self.metrics.video_to_text)
        return sum(way.recall_at_1 for way in both) / len(both)

    def summary(self) -> dict[str, Any]:
        """What the log holds: all but the queries."""
        return {
            "data": self.data,
            "videos": self.videos,
            "captions": self.captions,
            "left_out": len(self.left_out),
            "text_to_video": asdict(self.metrics.text_to_video),
            "video_to_text": asdict(self.metrics.video_to_text),
            "binding_accuracy": self.binding_accuracy,
        }

    def table(self) -> str:
        """As text for a terminal."""
        return results_table(self.summary())


def results_table(summary: Mapping[str, Any]) -> str:
    """An evaluation's summary, as logged and stored, as text for a terminal."""
    lines = [
        f"{summary['captions']} captions, {summary['videos']} videos ({summary['data']})",
        " " * 15 + "".join(f"{name:>8}" for name in TABLE),
    ]
    for direction in ("text_to_video", "video_to_text"):
        values = "".join(f"{summary[direction][name]:8.1f}" for name in TABLE.values())
        lines.append(f"{direction.replace('_', ' '):<15}" + values)
    if summary["binding_accuracy"] is not None:
        lines.append(f"binding accuracy {summary['binding_accuracy']:.1f} % (chance 50 %)")
    if summary["left_out"]:
        lines.append(f"{summary['left_out']} unreadable samples were left out")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """This rank's slice of a test set."""

    features: Features
    keys: list[str]
    captions: list[str]
    caption_video: Tensor
    left_out: list[Replacement]


def evaluate(encode: Encode, config: Config, tokenizer: Tokenizer, world: World) -> Evaluation:
    """Encodes each rank's slice of `data.test` once and ranks all pairs; the same on every rank.

    `encode` is the model's forward in evaluation mode. It is collective where the weights are
    partitioned (ZeRO-3), so all ranks call it equally often.

    Raises:
        ValueError: no `data.test`, fewer videos than ranks, or a counterpart without its keys.
    """
    if config.data.test is None:
        raise ValueError("data.test is not set: there is nothing to evaluate on")
    mine = _encode_set(encode, config.data.test, config, tokenizer, world)
    similarity = _all_pairs(mine, config, world)
    binding_accuracy, missing = _binding_accuracy(encode, mine, config, tokenizer, world)
    everyone = world.all_gather_objects((mine.keys, mine.captions, [*mine.left_out, *missing]))
    keys = [key for part, _, _ in everyone for key in part]
    captions = [caption for _, part, _ in everyone for caption in part]
    before = sum(len(part) for part, _, _ in everyone[: world.rank])
    text_video = _everyones(mine.caption_video + before, world)
    return Evaluation(
        data=config.data.test,
        videos=len(keys),
        captions=len(captions),
        left_out=tuple(entry for _, _, part in everyone for entry in part),
        metrics=retrieval_metrics(similarity, text_video),
        binding_accuracy=binding_accuracy,
        queries=_queries(similarity, text_video, keys, captions),
    )


def _encode_set(
    encode: Encode, url: str, config: Config, tokenizer: Tokenizer, world: World
) -> _Encoded:
    batches = ordered_batches(config, tokenizer, world, url)
    parts: list[Features] = []
    keys: list[str] = []
    captions: list[str] = []
    caption_video: list[Tensor] = []
    left_out: list[Replacement] = []
    with torch.no_grad():
        for batch, is_new in _in_step(batches, url, world):
            features = encode(*model_inputs(batch, world.device))
            if not is_new:
                continue
            parts.append(features)
            caption_video.append(batch.caption_video + len(keys))
            keys.extend(batch.keys)
            captions.extend(batch.captions)
            left_out.extend(batch.replaced)
    return _Encoded(joined(parts), keys, captions, torch.cat(caption_video), left_out)


def _in_step(batches: Iterator[Batch], url: str, world: World) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, the last one again and again until every rank has had all of its own."""
    batch, at_end = _next_batch(batches, world)
    if any(at_end) or batch is None:
        raise ValueError(f"{url} has too few readable videos for {world.world_size} ranks")
    is_new = True
    while not all(at_end):
        yield batch, is_new
        following, at_end = _next_batch(batches, world)
        batch, is_new = (batch, False) if following is None else (following, True)


def _next_batch(batches: Iterator[Batch], world: World) -> tuple[Batch | None, tuple[int, ...]]:
    """This rank's next batch, none after its last, and which ranks are at their end."""
    batch = world.run_on_all(lambda: next(batches, None), TooManyBadSamples)
    return batch, world.all_gather_counts(batch is None)


def _all_pairs(mine: _Encoded, config: Config, world: World) -> Tensor:
    """Similarity (A, C) of all captions with all videos: each rank computes its captions' rows."""
    own = mine.features
    videos = gathered_videos(own, world, world.all_gather_counts(len(own.frames)))
    with torch.no_grad():
        rows = similarity_rows(own, videos, config.model)
    return _everyones(rows, world).cpu()


def _everyones(mine: Tensor, world: World) -> Tensor:
    return all_gather_rows(mine, world, world.all_gather_counts(len(mine)))


def _binding_accuracy(
    encode: Encode, mine: _Encoded, config: Config, tokenizer: Tokenizer, world: World
) -> tuple[float | None, list[Replacement]]:
    """The accuracy over the captions whose two clips can be read, and the twins that cannot."""
    url = config.data.test_exchanged
    if url is None:
        return None, []
    other = _encode_set(encode, url, config, tokenizer, world)
    twin_of = {key: row for row, key in enumerate(other.keys)}
    pairs = [
        (caption, video, twin_of[mine.keys[video]])
        for caption, video in enumerate(mine.caption_video.tolist())
        if mine.keys[video] in twin_of
    ]
    caption, video, twin = torch.tensor(pairs, dtype=torch.long).view(-1, 3).unbind(1)
    with torch.no_grad():
        own = similarity_rows(mine.features, mine.features, config.model).cpu()[caption, video]
        exchanged = similarity_rows(mine.features, other.features, config.model).cpu()
    exchanged = exchanged[caption, twin]
    # A tie is as good as a guess.
    wins = _everyones((own > exchanged).double() + (own == exchanged) / 2, world)
    if not len(wins):
        raise ValueError(f"{url} shares no readable key with {config.data.test}")
    return float(100 * wins.mean()), other.left_out


def _queries(
    similarity: Tensor, text_video: Tensor, keys: list[str], captions: list[str]
) -> list[dict[str, Any]]:
    found = ranks(similarity, text_video).text_to_video.tolist()
    best = similarity.topk(min(SHOWN, similarity.shape[1]), dim=1)
    return [
        {
            "caption": captions[row],
            "key": keys[int(text_video[row])],
            "rank": found[row],
            "top": [
                {"key": keys[column], "similarity": value}
                for column, value in zip(columns, values, strict=True)
            ],
        }
        for row, (columns, values) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
    ]
