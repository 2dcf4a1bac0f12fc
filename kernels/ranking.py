"""Recall and rank metrics of a text-by-video similarity matrix, in both directions."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    """Queries whose best positive scores the same as a wrong candidate. The lower index ranks
    first, so their rank depends on the order of the candidates."""


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


def retrieval_metrics(
    similarity: Float[Tensor, "A C"], text_video: Int[Tensor, " A"]
) -> RetrievalMetrics:
    """Computes recall at 1, 5 and 10, median and mean rank.

    A video with several texts is ranked by the best of them. Candidates of equal score rank in the
    order of their index, so the metrics do not depend on a sort.

    Args:
        similarity: Rows are texts, columns are videos.
        text_video: Column of each text's video.

    Raises:
        ValueError: no text, a column that does not exist, or a similarity that is not finite.
    """
    result = ranks(similarity, text_video)
    return RetrievalMetrics(
        text_to_video=_summary(result.text_to_video, result.text_ties),
        video_to_text=_summary(result.video_to_text, result.video_ties),
    )


def ranks(similarity: Float[Tensor, "A C"], text_video: Int[Tensor, " A"]) -> Ranks:
    """Ranks every query in both directions by counting better candidates: O(A C), no sort."""
    _check(similarity, text_video)
    texts = torch.arange(len(similarity), device=similarity.device)
    positives = similarity[texts, text_video]
    text_ranks, text_ties = _texts_among_videos(similarity, text_video, positives)

    # The best text of each video; of several equal ones the first.
    num_texts, num_videos = similarity.shape
    best = similarity.new_full((num_videos,), -torch.inf)
    best = best.scatter_reduce(0, text_video, positives, "amax")
    first = torch.where(positives == best[text_video], texts, num_texts)
    first_best = texts.new_full((num_videos,), num_texts)
    first_best = first_best.scatter_reduce(0, text_video, first, "amin")

    equal = similarity == best
    before = (similarity > best) | (equal & (texts[:, None] < first_best))
    wrong = text_video[:, None] != torch.arange(num_videos, device=similarity.device)
    videos = text_video.unique()
    return Ranks(
        text_to_video=text_ranks,
        text_ties=text_ties,
        videos=videos,
        video_to_text=before.sum(dim=0)[videos] + 1,
        video_ties=(equal & wrong).any(dim=0)[videos],
    )


def _texts_among_videos(
    similarity: Tensor, text_video: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    equal = similarity == positives[:, None]
    before = (similarity > positives[:, None]) | (equal & (columns < text_video[:, None]))
    return before.sum(dim=1) + 1, equal.sum(dim=1) > 1


def _summary(rank: Int[Tensor, " Q"], ties: Bool[Tensor, " Q"]) -> RankMetrics:
    return RankMetrics(
        recall_at_1=_recall(rank, 1),
        recall_at_5=_recall(rank, 5),
        recall_at_10=_recall(rank, 10),
        # quantile averages the middle two of an even number of ranks; torch.median takes the lower.
        median_rank=rank.double().quantile(0.5).item(),
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
    bad = ~similarity.isfinite()
    if bool(bad.any()):
        text, video = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"similarity[{text}, {video}] (text, video) is {similarity[text, video].item()}; "
            f"{int(bad.sum())} entries are not finite and cannot be ranked"
        )
