"""Recall and rank metrics of text-video retrieval, in both directions.

`count_candidates` counts within a tile of the text-by-video similarity. The counts of all tiles add
up to the ranks, so no caller needs the whole matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TIE_TOLERANCE = 1e-6
"""Similarities that differ by less are equal. The rounding of a similarity depends on the shape of
the tile in which it is computed; that must not decide between a video and its exact copy."""


@dataclass(frozen=True)
class RankMetrics:
    """Metrics of one direction: recalls in percent, ranks from 1 (best)."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    mean_rank: float
    queries: int
    ties: int
    """Queries whose best positive scores the same as a wrong candidate, up to TIE_TOLERANCE. It
    ranks behind that one: a model that scores everything alike finds nothing."""


@dataclass(frozen=True)
class RetrievalMetrics:
    text_to_video: RankMetrics
    video_to_text: RankMetrics


@dataclass(frozen=True)
class Ranks:
    """Rank (from 1) of each query's best positive; a tie is a wrong candidate of equal score."""

    text_to_video: Int[Tensor, " A"]
    text_ties: Bool[Tensor, " A"]
    videos: Int[Tensor, " V"]
    """Columns that have a text; the other videos are not queries."""
    video_to_text: Int[Tensor, " V"]
    video_ties: Bool[Tensor, " V"]

    def metrics(self) -> RetrievalMetrics:
        """Recall at 1, 5 and 10, median and mean rank, and ties."""
        return RetrievalMetrics(
            text_to_video=_summary(self.text_to_video, self.text_ties),
            video_to_text=_summary(self.video_to_text, self.video_ties),
        )


class CandidateCounts(NamedTuple):
    """Wrong candidates by their score against the best positive of their query: two columns, the
    number that score higher and the number that score the same."""

    of_texts: Int[Tensor, "A 2"]
    of_videos: Int[Tensor, "C 2"]


def count_candidates(
    scores: Float[Tensor, "A C"],
    text_positives: Float[Tensor, " A"],
    video_positives: Float[Tensor, " C"],
    right: tuple[Int[Tensor, " P"], Int[Tensor, " P"]],
) -> CandidateCounts:
    """Counts the wrong candidates of a tile that rank before, or level with, the positives.

    Args:
        scores: Of the tile's texts (rows) with its videos (columns). Overwritten at the right
            pairs.
        text_positives: Score of each text's best positive, which may lie in another tile.
        video_positives: The same for each video; infinite for a video that is not a query.
        right: Rows and columns of the right pairs within the tile, which are no candidates.
    """
    scores[right] = -torch.inf

    def counts(positives: Tensor, dim: int) -> Tensor:
        better = (scores > positives + TIE_TOLERANCE).sum(dim=dim)
        not_worse = (scores >= positives - TIE_TOLERANCE).sum(dim=dim)
        return torch.stack([better, not_worse - better], dim=1)

    return CandidateCounts(counts(text_positives[:, None], 1), counts(video_positives, 0))


def ranks_of_counts(counts: Int[Tensor, "Q 2"]) -> tuple[Int[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """The ranks and the ties that belong to the counts of all tiles."""
    return counts.sum(dim=1) + 1, counts[:, 1] > 0


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
    similarity: Float[Tensor, "A C"], text_video: Int[Tensor, " A"]
) -> RetrievalMetrics:
    """Computes recall at 1, 5 and 10, median and mean rank of a similarity matrix.

    A video with several texts is ranked by the best of them. A wrong candidate of the same score
    ranks first, so the metrics do not depend on the order of the candidates.

    Args:
        similarity: Rows are texts, columns are videos.
        text_video: Column of each text's video.

    Raises:
        ValueError: no text, a column that does not exist, or a similarity that is not finite.
    """
    return ranks(similarity, text_video).metrics()


def ranks(similarity: Float[Tensor, "A C"], text_video: Int[Tensor, " A"]) -> Ranks:
    """Ranks every query in both directions by counting better candidates: O(A C), no sort."""
    _check(similarity, text_video)
    texts = torch.arange(len(similarity), device=similarity.device)
    positives = similarity[texts, text_video]
    best = best_of_videos(positives, text_video, similarity.shape[1])
    counts = count_candidates(similarity.clone(), positives, best, (texts, text_video))
    videos = text_video.unique()
    text_ranks, text_ties = ranks_of_counts(counts.of_texts)
    video_ranks, video_ties = ranks_of_counts(counts.of_videos[videos])
    return Ranks(text_ranks, text_ties, videos, video_ranks, video_ties)


def best_of_videos(
    positives: Float[Tensor, " A"], text_video: Int[Tensor, " A"], num_videos: int
) -> Float[Tensor, " C"]:
    """The best score of each video with its texts; infinite for a video without a text."""
    best = positives.new_full((num_videos,), -torch.inf)
    best = best.scatter_reduce(0, text_video, positives, "amax")
    return best.where(best.isfinite(), torch.inf)


def _summary(rank: Int[Tensor, " Q"], ties: Bool[Tensor, " Q"]) -> RankMetrics:
    ordered = rank.sort().values
    middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]]
    return RankMetrics(
        recall_at_1=_recall(rank, 1),
        recall_at_5=_recall(rank, 5),
        recall_at_10=_recall(rank, 10),
        # Of an even number the mean of the middle two. torch.quantile refuses 2^24 numbers.
        median_rank=middle.double().mean().item(),
        mean_rank=rank.double().mean().item(),
        queries=len(rank),
        ties=int(ties.sum()),
    )


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
