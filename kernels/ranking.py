"""Recall, rank and precision metrics of text-video retrieval, in both directions.

`count_candidates` counts within a tile of the text-by-video similarity. The counts of all tiles add
up to the ranks, so no caller needs the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TIE_TOLERANCE = 1e-6
"""Similarities that differ by less are equal. The rounding of a similarity depends on the shape of
the tile in which it is computed; that must not decide between a video and its exact copy."""
CUT = 10
"""Places of a ranking that nDCG covers."""


@dataclass(frozen=True, kw_only=True)
class RankMetrics:
    """Metrics of one direction: recalls and precisions in percent, ranks from 1 (best)."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    recall_at_50: float
    median_rank: float
    mean_rank: float
    mean_average_precision: float | None = None
    """None if every query has one right answer, as also below."""
    ndcg_at_10: float | None = None
    queries: int
    ties: int
    """Queries whose best positive scores the same as a wrong candidate, up to TIE_TOLERANCE. It
    ranks behind that one: a model that scores everything alike finds nothing."""


@dataclass(frozen=True)
class RetrievalMetrics:
    text_to_video: RankMetrics
    video_to_text: RankMetrics

    @property
    def mean(self) -> dict[str, float | None]:
        """The mean of both directions of every metric that both have."""
        both = (self.text_to_video, self.video_to_text)
        names = [each.name for each in fields(RankMetrics) if each.name not in ("queries", "ties")]
        values = {name: [getattr(way, name) for way in both] for name in names}
        return {name: None if None in pair else sum(pair) / 2 for name, pair in values.items()}


@dataclass(frozen=True)
class DirectionRanks:
    """Ranks of the queries of one direction."""

    rank: Int[Tensor, " Q"]
    """Rank (from 1) of each query's best positive."""
    ties: Bool[Tensor, " Q"]
    """True where a wrong candidate has the score of the best positive."""
    quality: Float[Tensor, "Q 2"] | None
    """Average precision and nDCG@10, from 0 to 1; None if every query has one positive."""

    def metrics(self) -> RankMetrics:
        """Recall at 1, 5, 10 and 50, median and mean rank, precisions, and ties."""
        ordered = self.rank.sort().values
        middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]]
        precision, ndcg = (
            (None, None) if self.quality is None else (100 * self.quality.mean(0)).tolist()
        )
        return RankMetrics(
            recall_at_1=_recall(self.rank, 1),
            recall_at_5=_recall(self.rank, 5),
            recall_at_10=_recall(self.rank, 10),
            recall_at_50=_recall(self.rank, 50),
            # Of an even number the mean of the middle two. torch.quantile refuses 2^24 numbers.
            median_rank=middle.double().mean().item(),
            mean_rank=self.rank.double().mean().item(),
            mean_average_precision=precision,
            ndcg_at_10=ndcg,
            queries=len(self.rank),
            ties=int(self.ties.sum()),
        )


@dataclass(frozen=True)
class Ranks:
    """Rank (from 1) of each query's best positive; a tie is a wrong candidate of equal score."""

    text_to_video: Int[Tensor, " A"]
    text_ties: Bool[Tensor, " A"]
    videos: Int[Tensor, " V"]
    """Columns that have a text; the other videos are not queries."""
    video_to_text: Int[Tensor, " V"]
    video_ties: Bool[Tensor, " V"]
    text_quality: Float[Tensor, "A 2"] | None = None
    """See `DirectionRanks.quality`."""
    video_quality: Float[Tensor, "V 2"] | None = None

    @classmethod
    def of(cls, texts: DirectionRanks, videos: DirectionRanks, queries: Int[Tensor, " V"]) -> Ranks:
        """Joins both directions; `queries` are the columns that have a text."""
        return cls(
            texts.rank, texts.ties, queries, videos.rank, videos.ties, texts.quality, videos.quality
        )

    def metrics(self) -> RetrievalMetrics:
        """The metrics of both directions."""
        texts = DirectionRanks(self.text_to_video, self.text_ties, self.text_quality)
        videos = DirectionRanks(self.video_to_text, self.video_ties, self.video_quality)
        return RetrievalMetrics(texts.metrics(), videos.metrics())


class Positives(NamedTuple):
    """Scores of the right answers of Q queries."""

    best: Float[Tensor, " Q"]
    """The highest score of each query; infinite for one without a right answer."""
    query: Int[Tensor, " P"]
    """Query of each further right answer, ascending; a query's own by falling score."""
    score: Float[Tensor, " P"]

    @classmethod
    def of(
        cls, query: Int[Tensor, " R"], score: Float[Tensor, " R"], num_queries: int
    ) -> Positives:
        """Divides all right answers into the best of each query and the others."""
        order = score.argsort(descending=True, stable=True)
        order = order[query[order].argsort(stable=True)]
        query, score = query[order], score[order]
        is_best = torch.ones_like(query, dtype=torch.bool)
        is_best[1:] = query[1:] != query[:-1]
        best = score.new_full((num_queries,), torch.inf)
        best[query[is_best]] = score[is_best]
        return cls(best, query[~is_best], score[~is_best])


class CandidateCounts(NamedTuple):
    """Wrong candidates by their score against the right answers of their query."""

    best: Int[Tensor, "Q 2"]
    """Number that score higher than the best one, and number that score the same."""
    further: Int[Tensor, " P"]
    """Number that score higher than, or the same as, each further right answer."""


def count_candidates(
    scores: Float[Tensor, "A C"], positives: Positives, dim: int
) -> CandidateCounts:
    """Counts the wrong candidates of a tile that rank before, or level with, right answers.

    Args:
        scores: Of the tile's texts (rows) with its videos (columns); -inf at all right pairs, which
            are no candidates.
        positives: Right answers of the tile's texts (`dim` 1) or of its videos (`dim` 0), which may
            lie in other tiles.
        dim: Dimension of the candidates.
    """
    best = positives.best.unsqueeze(dim)
    better = (scores > best + TIE_TOLERANCE).sum(dim=dim)
    not_worse = (scores >= best - TIE_TOLERANCE).sum(dim=dim)
    further = torch.zeros_like(positives.query)
    # As many at a time as the tile has queries, so that no copy is larger than the tile.
    size = max(1, scores.shape[1 - dim])
    for start in range(0, len(further), size):
        some = slice(start, start + size)
        copied = scores.index_select(1 - dim, positives.query[some])
        least = positives.score[some].unsqueeze(dim) - TIE_TOLERANCE
        further[some] = (copied >= least).sum(dim=dim)
    return CandidateCounts(torch.stack([better, not_worse - better], dim=1), further)


def ranks_of_counts(counts: Int[Tensor, "Q 2"]) -> tuple[Int[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """The ranks and the ties that belong to the counts of all tiles."""
    return counts.sum(dim=1) + 1, counts[:, 1] > 0


def answer_quality(counts: CandidateCounts, query: Int[Tensor, " P"]) -> Float[Tensor, "Q 2"]:
    """Average precision and nDCG@10 of each query, from the counts of all tiles.

    The k-th best right answer stands at place p_k = k + (wrong candidates that score as much or
    more). Average precision is mean_k k / p_k over all right answers; nDCG@10 is the sum of
    1 / log2(p_k + 1) over the places up to 10, divided by its largest possible value. Both are
    those of trec_eval ("map", "ndcg_cut_10") with ties against the query.

    Args:
        query: Query of each further right answer, as `Positives` has them.

    Returns:
        (Q, 2) float64 on the CPU, so that every number of ranks gives the same digits.
    """
    best, further, query = counts.best.cpu(), counts.further.cpu(), query.cpu()
    count = torch.bincount(query, minlength=len(best))
    first = count.cumsum(0) - count
    # Number of better right answers: 0 for the best one, then 1, 2, ...
    before = torch.arange(len(query)) - first[query] + 1
    place = torch.cat([best.sum(1), before + further]).double() + 1
    owner = torch.cat([torch.arange(len(best)), query])
    number = torch.cat([torch.zeros(len(best)), before]).double() + 1
    precision = torch.zeros(len(best), dtype=torch.float64).index_add_(0, owner, number / place)
    gain = (1 / (place + 1).log2()).where(place <= CUT, 0)
    gains = torch.zeros(len(best), dtype=torch.float64).index_add_(0, owner, gain)
    ideal = (1 / (torch.arange(CUT, dtype=torch.float64) + 2).log2()).cumsum(0)
    return torch.stack([precision / (count + 1), gains / ideal[count.clamp(max=CUT - 1)]], dim=1)


def right_pairs(
    text_video: Int[Tensor, " A"],
    text_ids: Int[Tensor, " A"],
    videos: range,
    *,
    limit: int = 1 << 27,
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """All texts and videos that are right for each other, if equal texts count as one.

    A video is right for a text if it has an equal text. Each pair occurs once.

    Args:
        text_video: Video of each text.
        text_ids: Equal numbers for equal texts.
        videos: Only pairs of these videos are returned.
        limit: Largest number of pairs.

    Returns:
        Text and video of each pair, by text, then by video.

    Raises:
        ValueError: there are more than `limit` pairs.
    """
    group = text_ids.unique(return_inverse=True)[1]
    sizes = torch.bincount(group)
    by_group = group.argsort(stable=True)
    own = (text_video >= videos.start) & (text_video < videos.stop)
    num_videos = max(1, videos.stop)
    found = (group[own] * num_videos + text_video[own]).unique()
    group, video = found // num_videos, found % num_videos
    count = sizes[group]
    total = int(count.sum())
    if total > limit:
        raise ValueError(
            f"equal captions give {total:,} right pairs of a caption and a video; at most {limit:,}"
            " fit in memory: set equal_captions to False"
        )
    start = (sizes.cumsum(0) - sizes)[group] - (count.cumsum(0) - count)
    text = by_group[start.repeat_interleave(count) + torch.arange(total, device=group.device)]
    video = video.repeat_interleave(count)
    order = video.argsort(stable=True)
    order = order[text[order].argsort(stable=True)]
    return text[order], video[order]


def check_finite(
    scores: Float[Tensor, "A C"], names: Callable[[int, int], str] = "text {}, video {}".format
) -> None:
    """Raises ValueError if a score is not finite; `names` names the pair of a row and a column."""
    # One number tells: the sum of finite similarities, which are at most a few each, is finite.
    if bool(scores.sum(dtype=torch.float64).isfinite()):
        return
    bad = ~scores.isfinite()
    row, column = (int(index) for index in bad.nonzero()[0])
    raise ValueError(
        f"the similarity of {names(row, column)} is {scores[row, column].item()}; "
        f"{int(bad.sum())} entries are not finite and cannot be ranked"
    )


def retrieval_metrics(
    similarity: Float[Tensor, "A C"],
    text_video: Int[Tensor, " A"],
    text_ids: Int[Tensor, " A"] | None = None,
) -> RetrievalMetrics:
    """Computes recall at 1, 5, 10 and 50, median and mean rank of a similarity matrix.

    A query with several right answers is ranked by the best of them. A wrong candidate of the same
    score ranks first, so the metrics do not depend on the order of the candidates.

    Args:
        similarity: Rows are texts, columns are videos.
        text_video: Column of each text's video.
        text_ids: Equal numbers for equal texts, whose videos are right for all of them; None: only
            a text's own video is right.

    Raises:
        ValueError: no text, a column that does not exist, or a similarity that is not finite.
    """
    return ranks(similarity, text_video, text_ids).metrics()


def ranks(
    similarity: Float[Tensor, "A C"],
    text_video: Int[Tensor, " A"],
    text_ids: Int[Tensor, " A"] | None = None,
) -> Ranks:
    """Ranks every query in both directions by counting better candidates: O(A C), no sort."""
    _check(similarity, text_video)
    num_texts, num_videos = similarity.shape
    texts = torch.arange(num_texts, device=similarity.device)
    pairs = (texts, text_video)
    if text_ids is not None:
        pairs = right_pairs(text_video, text_ids, range(num_videos))
    scores = similarity.clone()
    scores[pairs] = -torch.inf
    positives = (
        Positives.of(pairs[0], similarity[pairs], num_texts),
        Positives.of(pairs[1], similarity[pairs], num_videos),
    )
    videos = text_video.unique()
    of_texts = _ranked(scores, positives[0], 1, texts)
    return Ranks.of(of_texts, _ranked(scores, positives[1], 0, videos), videos)


def _ranked(scores: Tensor, positives: Positives, dim: int, queries: Tensor) -> DirectionRanks:
    counts = count_candidates(scores, positives, dim)
    quality = answer_quality(counts, positives.query) if len(positives.query) else None
    rank, ties = ranks_of_counts(counts.best[queries])
    return DirectionRanks(rank, ties, None if quality is None else quality[queries.cpu()])


def _recall(rank: Tensor, k: int) -> float:
    return 100 * (rank <= k).double().mean().item()


def _check(similarity: Tensor, text_video: Tensor) -> None:
    num_texts, num_videos = similarity.shape
    if num_texts == 0 or text_video.shape != (num_texts,):
        raise ValueError(
            f"similarity {tuple(similarity.shape)} needs at least one text and a column number "
            f"for each, but text_video has shape {tuple(text_video.shape)}"
        )
    outside = (text_video < 0) | (text_video >= num_videos)
    if bool(outside.any()):
        text = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"text_video[{text}] is {int(text_video[text])}; allowed are 0 to {num_videos - 1}"
        )
    check_finite(similarity)
