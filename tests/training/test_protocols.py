"""Protocols of retrieval: several captions a video, equal captions, precision; by hand and against
trec_eval."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytrec_eval
import torch
from builders.numbered_features import numbered, score_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvr.kernels.ranking import RankMetrics, ranks, retrieval_metrics, right_pairs
from tvr.trainer.config import ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.options import EvaluationOptions
from tvr.trainer.evaluation.retrieval import rank_features
from tvr.trainer.evaluation.stored_features import evaluate_features
from tvr.trainer.model.model import Features
from tvr.trainer.records import results_table

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))
MEASURES = {"map", "ndcg_cut.10", "recip_rank", "success.1,5,10,50"}


def relevant(text_video: Tensor, text_ids: Tensor | None) -> list[list[bool]]:
    """Is a video right for a text? By definition: an equal text is its own."""
    count = int(text_video.max()) + 1
    ids = range(len(text_video)) if text_ids is None else text_ids.tolist()
    owners: dict[int, set[int]] = {}
    for number, video in zip(ids, text_video.tolist(), strict=True):
        owners.setdefault(number, set()).add(video)
    return [[video in owners[number] for video in range(count)] for number in ids]


def by_trec_eval(scores: list[list[float]], right: list[list[bool]]) -> dict[str, float]:
    """Means over the queries that have a right answer. trec_eval places equal scores by name, the
    last name first; so the names of wrong candidates come last in the alphabet."""
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for query, (row, is_right) in enumerate(zip(scores, right, strict=True)):
        names = [f"{'a' if good else 'z'}{i:04d}" for i, good in enumerate(is_right)]
        good = {name: 1 for name, each in zip(names, is_right, strict=True) if each}
        if good:
            qrels[str(query)] = good
            run[str(query)] = dict(zip(names, row, strict=True))
    found = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    return {
        name: sum(each[name] for each in found.values()) / len(found)
        for name in next(iter(found.values()))
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, with or without ties, the video of each caption, and ids of the captions."""
    texts, videos = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 10_000))
    rng = torch.Generator().manual_seed(seed)
    table = torch.randn(texts, videos, generator=rng)
    if draw(st.booleans()):
        table = (2 * table).round() / 2
    text_video = torch.randint(videos, (texts,), generator=rng)
    text_ids = torch.randint(draw(st.integers(1, 14)), (texts,), generator=rng)
    return table, text_video, text_ids


def assert_equals_trec(found: RankMetrics, expected: dict[str, float]) -> None:
    for k in (1, 5, 10, 50):
        assert getattr(found, f"recall_at_{k}") == pytest.approx(100 * expected[f"success_{k}"])
    if found.mean_average_precision is None:  # one right answer each
        assert expected["map"] == pytest.approx(expected["recip_rank"])
        return
    assert found.mean_average_precision == pytest.approx(100 * expected["map"])
    assert found.ndcg_at_10 == pytest.approx(100 * expected["ndcg_cut_10"])


@EXAMPLES
@given(cases(), st.booleans(), st.integers(1, 5), st.integers(1, 40))
def test_both_directions_equal_trec_eval(
    case: tuple[Tensor, Tensor, Tensor], merged: bool, block: int, tile: int
) -> None:
    table, text_video, text_ids = case
    ids = text_ids if merged else None
    right = relevant(text_video, ids)
    right = [row + [False] * (table.shape[1] - len(row)) for row in right]
    whole = ranks(table, text_video, ids)
    streamed = rank_features(
        numbered(*table.shape),
        text_video,
        score_of(table),
        ALONE,
        caption_ids=text_ids,
        merge_equal=merged,
        captions_per_block=block,
        scores_per_tile=tile,
    )
    for found in (whole.metrics(), streamed.ranks.metrics()):
        assert_equals_trec(found.text_to_video, by_trec_eval(table.tolist(), right))
        columns = [list(column) for column in zip(*right, strict=True)]
        assert_equals_trec(found.video_to_text, by_trec_eval(table.T.tolist(), columns))
    for name in ("text_to_video", "video_to_text", "text_quality", "video_quality"):
        one, two = getattr(whole, name), getattr(streamed.ranks, name)
        assert (one is None) == (two is None), name
        if one is not None and two is not None:
            assert torch.equal(one, two), name


# Three captions of video 0, two of video 1, one of video 2; video 3 has none.
SCORES = torch.tensor(
    [
        [0.9, 0.2, 0.1, 0.8],  # rank 1
        [0.3, 0.6, 0.1, 0.3],  # rank 3: video 1 is better, and video 3 ties
        [0.5, 0.4, 0.7, 0.6],  # rank 3
        [0.8, 0.7, 0.2, 0.1],  # rank 2
        [0.1, 0.9, 0.3, 0.2],  # rank 1
        [0.4, 0.5, 0.6, 0.9],  # rank 2
    ]
)
OWNERS = torch.tensor([0, 0, 0, 1, 1, 2])


def test_several_captions_a_video_by_hand() -> None:
    found = retrieval_metrics(SCORES, OWNERS)
    to_video = found.text_to_video
    assert to_video.recall_at_1 == pytest.approx(100 * 2 / 6)
    assert to_video.recall_at_5 == to_video.recall_at_50 == 100
    assert (to_video.median_rank, to_video.mean_rank) == (2, 2)
    assert to_video.mean_average_precision is None
    # Video 0: right captions .9 .5 .3, wrong ones .8 .4 .1: places 1, 3, 5.
    # Video 1: right .9 .7, wrong .6 .5 .4 .2: places 1, 2. Video 2: right .6, wrong .7: place 2.
    to_text = found.video_to_text
    assert (to_text.queries, to_text.recall_at_1) == (3, pytest.approx(100 * 2 / 3))
    precision = ((1 + 2 / 3 + 3 / 5) / 3 + 1 + 1 / 2) / 3
    assert to_text.mean_average_precision == pytest.approx(100 * precision)
    ideal = 1 + 1 / math.log2(3)
    gains = (1 + 1 / 2 + 1 / math.log2(6)) / (ideal + 1 / 2)
    assert to_text.ndcg_at_10 == pytest.approx(100 * (gains + 1 + 1 / math.log2(3)) / 3)
    assert found.mean["recall_at_1"] == pytest.approx(50)
    assert found.mean["mean_average_precision"] is None


def test_equal_captions_by_hand() -> None:
    # Captions 1 (of video 0) and 3 (of video 1) are equal: videos 0 and 1 are right for both.
    ids = torch.tensor([0, 7, 1, 7, 2, 3])
    found = retrieval_metrics(SCORES, OWNERS, ids)
    to_video = found.text_to_video
    # Caption 1: right .6 .3, wrong .3 (a tie with the second) .1: places 1 and 3.
    # Caption 3: right .8 .7: places 1, 2. The others as before: 1, 3, 1, 2.
    assert to_video.recall_at_1 == pytest.approx(100 * 4 / 6)
    assert to_video.mean_rank == pytest.approx((1 + 1 + 3 + 1 + 1 + 2) / 6)
    precision = (1 + (1 + 2 / 3) / 2 + 1 / 3 + 1 + 1 + 1 / 2) / 6
    assert to_video.mean_average_precision == pytest.approx(100 * precision)
    # Video 1 has the right captions .9 .7 .6, and the wrong ones .5 .4 .2: places 1, 2, 3.
    # Video 0 has .9 .8 .5 .3 and .4 .1: places 1, 2, 3, 5.
    precision = ((3 + 4 / 5) / 4 + 1 + 1 / 2) / 3
    assert found.video_to_text.mean_average_precision == pytest.approx(100 * precision)


def evaluated(texts: list[str] | None, **options: Any) -> Any:
    draw = torch.Generator().manual_seed(1)
    own = Features(
        sentence=torch.randn(4, 8, generator=draw),
        words=torch.randn(4, 3, 8, generator=draw),
        word_mask=torch.ones(4, 3, dtype=torch.long),
        frames=torch.randn(3, 2, 8, generator=draw),
        frame_mask=torch.ones(3, 2, dtype=torch.long),
        word_logits=None,
        frame_logits=None,
        margin_hinge=None,
    )
    return evaluate_features(
        own,
        torch.tensor([0, 1, 2, 2]),
        model=ModelConfig(interaction="ti"),
        captions=texts,
        options=EvaluationOptions(**options),
    )


TEXTS = ["A man runs.", "a man  runs", "a dog", "A DOG!"]


def test_equal_captions_are_counted_and_merged_only_if_asked() -> None:
    plain, merged = evaluated(TEXTS), evaluated(TEXTS, equal_captions=True)
    # The two dogs are of one video, so they are no case of equal captions.
    line = "protocol: multi_caption, version 2; 2 captions equal one of another video:"
    assert f"{line} only the own video is right" in plain.table()
    assert f"{line} the videos of all of them are right" in merged.table()
    assert plain.protocol["equal_captions"] == "wrong"
    assert plain.metrics.text_to_video.mean_average_precision is None
    assert merged.metrics.text_to_video.mean_average_precision is not None
    first, second = merged.queries[:2]
    assert first["keys"] == second["keys"] == ["video 0", "video 1"]
    assert "keys" not in merged.queries[2]
    assert not any("keys" in query for query in plain.queries)
    assert first["rank"] <= plain.queries[0]["rank"]
    assert second["rank"] <= plain.queries[1]["rank"]


def test_stored_evaluation_names_protocol_versions_and_all_queries() -> None:
    content = evaluated(TEXTS, equal_captions=True).document()
    assert content["protocol"]["name"] == "multi_caption"
    assert set(content["versions"]) == {"tvr", "torch", "transformers", "numpy"}
    assert [query["key"] for query in content["video_queries"]] == ["video 0", "video 1", "video 2"]
    assert content["mean"]["recall_at_1"] == pytest.approx(
        (content["text_to_video"]["recall_at_1"] + content["video_to_text"]["recall_at_1"]) / 2
    )
    shown = results_table(content).splitlines()
    assert shown[2].split()[:6] == ["raw", "R@1", "R@5", "R@10", "R@50", "MdR"]
    assert [line[:13] for line in shown[3:6]] == ["text to video", "video to text", "mean of both "]


def test_results_of_an_earlier_release_stay_readable() -> None:
    way = {"recall_at_1": 1.0, "recall_at_5": 2.0, "recall_at_10": 3.0}
    way |= {"median_rank": 4.0, "mean_rank": 5.0, "queries": 6, "ties": 0}
    old = {"data": "d", "videos": 6, "captions": 6, "left_out": 0, "binding_accuracy": None}
    lines = results_table(old | {"text_to_video": way, "video_to_text": way}).splitlines()
    assert lines[1].split() == ["raw", "R@1", "R@5", "R@10", "MdR", "MnR"]
    assert lines[2].split() == ["text", "to", "video", "1.0", "2.0", "3.0", "4.0", "5.0"]
    assert len(lines) == 4


def test_options_that_need_more_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match="equal_captions needs the captions' texts"):
        evaluated(None, equal_captions=True)
    with pytest.raises(ValueError, match="paragraphs: stored captions are encoded one by one"):
        evaluated(TEXTS, paragraphs=True)


def test_too_many_right_pairs_are_refused() -> None:
    same = torch.zeros(3000, dtype=torch.long)
    with pytest.raises(ValueError, match="9,000,000 right pairs"):
        right_pairs(torch.arange(3000), same, range(3000), limit=1_000_000)
