"""Recall and ranks against a plain sort, with ties, several texts a video, and errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tvr.kernels.ranking import (
    TIE_TOLERANCE,
    Positives,
    Ranks,
    count_candidates,
    ranks,
    retrieval_metrics,
)

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def ranks_by_sorting(similarity: Tensor, text_video: list[int]) -> tuple[list[int], list[int]]:
    """The definition: one more than the wrong candidates at or before a query's best positive after
    a descending sort, in which wrong candidates come first among equal scores."""

    def first(scores: list[float], positives: list[int]) -> int:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in positives))
        return 1 + min(order.index(i) for i in positives)

    rows, columns = similarity.tolist(), similarity.T.tolist()
    texts = [first(row, [video]) for row, video in zip(rows, text_video, strict=True)]
    videos = [
        first(columns[video], [i for i, v in enumerate(text_video) if v == video])
        for video in sorted(set(text_video))
    ]
    return texts, videos


@st.composite
def rankings(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    texts, videos = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    level = st.integers(0, 3)  # few levels, so that ties are frequent
    values = draw(st.lists(level, min_size=texts * videos, max_size=texts * videos))
    text_video = draw(st.lists(st.integers(0, videos - 1), min_size=texts, max_size=texts))
    return torch.tensor(values).float().view(texts, videos), text_video


@EXAMPLES
@given(rankings())
def test_ranks_equal_a_sort_with_ties_against_the_query(
    ranking: tuple[Tensor, list[int]],
) -> None:
    similarity, text_video = ranking
    actual = ranks(similarity, torch.tensor(text_video))
    texts, videos = ranks_by_sorting(similarity, text_video)
    assert actual.text_to_video.tolist() == texts
    assert actual.video_to_text.tolist() == videos
    assert actual.videos.tolist() == sorted(set(text_video))


@EXAMPLES
@given(rankings())
def test_recall_grows_with_k_up_to_100(ranking: tuple[Tensor, list[int]]) -> None:
    similarity, text_video = ranking
    metrics = retrieval_metrics(similarity, torch.tensor(text_video))
    for way, candidates in (
        (metrics.text_to_video, similarity.shape[1]),
        (metrics.video_to_text, similarity.shape[0]),
    ):
        assert 0 <= way.recall_at_1 <= way.recall_at_5 <= way.recall_at_10 <= 100
        assert way.recall_at_10 == 100 or candidates > 10
        assert way.recall_at_5 == 100 or candidates > 5
        assert 1 <= way.mean_rank <= candidates


def test_metrics_of_a_small_matrix() -> None:
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.3, 0.0],
            [0.8, 0.2, 0.3, 0.1],
            [0.1, 0.5, 0.5, 0.2],
            [0.7, 0.6, 0.4, 0.3],
        ]
    )
    metrics = retrieval_metrics(similarity, torch.tensor([0, 0, 2, 1]))
    to_video = metrics.text_to_video
    # The text ranks are 1, 1, 2 (a tie, which counts against the text) and 2.
    assert (to_video.recall_at_1, to_video.recall_at_5) == (50, 100)
    assert (to_video.median_rank, to_video.mean_rank) == (1.5, 1.5)
    assert (to_video.queries, to_video.ties) == (4, 1)
    # Videos 0 (by its better text), 1 and 2 have rank 1. Video 3 has no text and is no query.
    to_text = metrics.video_to_text
    assert (to_text.recall_at_1, to_text.queries, to_text.ties) == (100, 3, 0)


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dim", [0, 1])
def test_many_right_answers_are_counted_in_few_operations(dim: int) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 30, generator=draw)
    scores[torch.rand(20, 30, generator=draw) < 0.3] = -torch.inf
    scores[3] = scores[:, 4] = -torch.inf
    num_queries = scores.shape[1 - dim]
    query = torch.randint(num_queries, (5000,), generator=draw)
    positives = Positives.of(query, torch.randn(5000, generator=draw), num_queries)
    positives.score[::7] = scores.T[0, 0] if dim else scores[0, 0]
    rows = scores if dim else scores.T
    least = positives.score[:, None] - TIE_TOLERANCE
    expected = (rows[positives.query] >= least).sum(1)
    with Operations() as operations:
        found = count_candidates(scores, positives, dim)
    assert torch.equal(found.further, expected)
    assert operations.count < 100


def test_ties_count_wrong_candidates_only() -> None:
    similarity = torch.zeros(3, 2)
    actual = ranks(similarity, torch.tensor([1, 1, 1]))
    assert actual.text_to_video.tolist() == [2, 2, 2]
    assert actual.text_ties.all()
    # The three equal texts all belong to video 1, so there is no tie.
    assert actual.video_to_text.tolist() == [1]
    assert not actual.video_ties.any()


def test_perfect_and_half_precision_matrices() -> None:
    actual = ranks(torch.eye(20, dtype=torch.bfloat16), torch.arange(20))
    assert isinstance(actual, Ranks)
    assert actual.text_to_video.eq(1).all()
    assert actual.video_to_text.eq(1).all()


def test_ranks_above_10_do_not_count_for_recall() -> None:
    similarity = torch.arange(12.0).repeat(12, 1)
    metrics = retrieval_metrics(similarity, torch.zeros(12).long())
    assert metrics.text_to_video.recall_at_10 == 0
    assert metrics.text_to_video.median_rank == metrics.text_to_video.mean_rank == 12


@pytest.mark.parametrize(
    ("similarity", "text_video", "named"),
    [
        (
            torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]),
            [0, 1],
            "text 1, video 0 is nan",
        ),
        (
            torch.tensor([[0.0, torch.inf], [0.0, 0.0]]),
            [0, 1],
            "text 0, video 1 is inf",
        ),
        (torch.zeros(2, 2), [0, 2], r"text_video\[1\] is 2; allowed are 0 to 1"),
        (torch.zeros(2, 2), [-1, 0], r"text_video\[0\] is -1"),
        (torch.zeros(0, 2), [], "at least one text"),
    ],
)
def test_errors_name_the_entry(similarity: Tensor, text_video: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        retrieval_metrics(similarity, torch.tensor(text_video, dtype=torch.int64))
