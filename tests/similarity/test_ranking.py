"""Recall and ranks against a plain sort, with ties, several texts a video, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvr.kernels.ranking import Ranks, ranks, retrieval_metrics

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def ranks_by_sorting(similarity: Tensor, text_video: list[int]) -> tuple[list[int], list[int]]:
    """The definition: a stable falling sort of each query, and the place of its first positive."""

    def first(scores: list[float], positives: list[int]) -> int:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
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
    level = st.integers(0, 3)  # few levels, so that ties abound
    values = draw(st.lists(level, min_size=texts * videos, max_size=texts * videos))
    text_video = draw(st.lists(st.integers(0, videos - 1), min_size=texts, max_size=texts))
    return torch.tensor(values).float().view(texts, videos), text_video


@EXAMPLES
@given(rankings())
def test_ranks_equal_a_stable_sort(ranking: tuple[Tensor, list[int]]) -> None:
    similarity, text_video = ranking
    found = ranks(similarity, torch.tensor(text_video))
    texts, videos = ranks_by_sorting(similarity, text_video)
    assert found.text_to_video.tolist() == texts
    assert found.video_to_text.tolist() == videos
    assert found.videos.tolist() == sorted(set(text_video))


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


def test_metrics_of_a_small_matrix_by_hand() -> None:
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
    # Text ranks 1, 1, 2 (tie with the lower index), 2.
    assert (to_video.recall_at_1, to_video.recall_at_5) == (50, 100)
    assert (to_video.median_rank, to_video.mean_rank) == (1.5, 1.5)
    assert (to_video.queries, to_video.ties) == (4, 1)
    # Video 0 has two texts and its best is first; 1 and 2 are first too; 3 has none: no query.
    to_text = metrics.video_to_text
    assert (to_text.recall_at_1, to_text.queries, to_text.ties) == (100, 3, 0)


def test_ties_count_wrong_candidates_only() -> None:
    similarity = torch.zeros(3, 2)
    found = ranks(similarity, torch.tensor([1, 1, 1]))
    assert found.text_to_video.tolist() == [2, 2, 2]
    assert found.text_ties.all()
    # Video 1's three texts are all right, so their equality is no tie.
    assert found.video_to_text.tolist() == [1]
    assert not found.video_ties.any()


def test_perfect_and_half_precision_matrices() -> None:
    found = ranks(torch.eye(20, dtype=torch.bfloat16), torch.arange(20))
    assert isinstance(found, Ranks)
    assert found.text_to_video.eq(1).all()
    assert found.video_to_text.eq(1).all()


def test_ranks_below_10_enter_no_recall() -> None:
    similarity = torch.arange(12.0).repeat(12, 1)
    metrics = retrieval_metrics(similarity, torch.zeros(12).long())
    assert metrics.text_to_video.recall_at_10 == 0
    assert metrics.text_to_video.median_rank == metrics.text_to_video.mean_rank == 12


@pytest.mark.parametrize(
    ("similarity", "text_video", "named"),
    [
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), [0, 1], r"similarity\[1, 0\].*nan"),
        (torch.tensor([[0.0, torch.inf], [0.0, 0.0]]), [0, 1], r"similarity\[0, 1\].*inf"),
        (torch.zeros(2, 2), [0, 2], r"text_video\[1\] is 2; allowed are 0 to 1"),
        (torch.zeros(2, 2), [-1, 0], r"text_video\[0\] is -1"),
        (torch.zeros(0, 2), [], "at least one text"),
    ],
)
def test_refusals_name_what_is_wrong(similarity: Tensor, text_video: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        retrieval_metrics(similarity, torch.tensor(text_video, dtype=torch.int64))
