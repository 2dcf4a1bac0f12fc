"""Ranks without a table of all pairs: equal to those of the whole table, on any number of ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.exhaustive import further
from builders.spawn import spawn
from torch import Tensor

from tvr.kernels.numerics import unit
from tvr.kernels.ranking import RetrievalMetrics, ranks
from tvr.trainer.config import ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.bank import Bank, caption_ids, without_test_captions
from tvr.trainer.evaluation.retrieval import (
    Rescoring,
    Retrieval,
    paired_scores,
    rank_features,
)
from tvr.trainer.evaluation.stored_features import evaluate_features
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, device=CPU)
WORDS, FRAMES, WIDTH = 5, 3, 8


score = partial(similarity_rows, model=ModelConfig(interaction="att_wti"))


def tied_score(texts: Features, videos: Features) -> Tensor:
    """A score of few levels, so that wrong candidates often equal the positive."""
    return (score(texts, videos) * 4).round()


def features_of(captions: int, videos: int) -> tuple[Features, Tensor]:
    """Random features, and the video of each caption in ascending order; some have none."""
    draw = torch.Generator().manual_seed(captions)
    word_mask = torch.ones(captions, WORDS, dtype=torch.long)
    word_mask[1::3, 2:] = 0
    frame_mask = torch.ones(videos, FRAMES, dtype=torch.long)
    frame_mask[::4, 1:] = 0
    features = Features(
        sentence=unit(torch.randn(captions, WIDTH, generator=draw)),
        words=unit(torch.randn(captions, WORDS, WIDTH, generator=draw)),
        word_mask=word_mask,
        frames=unit(torch.randn(videos, FRAMES, WIDTH, generator=draw)),
        frame_mask=frame_mask,
        word_logits=torch.randn(captions, WORDS, generator=draw),
        frame_logits=torch.randn(videos, FRAMES, generator=draw),
        margin_hinge=None,
    )
    return features, torch.randint(videos, (captions,), generator=draw).sort().values


def slice_of(whole: Features, caption_video: Tensor, videos: range) -> tuple[Features, Tensor]:
    """What the rank of these videos holds: them and their captions."""
    rows = ((caption_video >= videos.start) & (caption_video < videos.stop)).nonzero().squeeze(1)
    columns = slice(videos.start, videos.stop)
    assert whole.word_logits is not None
    assert whole.frame_logits is not None
    own = Features(
        sentence=whole.sentence[rows],
        words=whole.words[rows],
        word_mask=whole.word_mask[rows],
        frames=whole.frames[columns],
        frame_mask=whole.frame_mask[columns],
        word_logits=whole.word_logits[rows],
        frame_logits=whole.frame_logits[columns],
        margin_hinge=None,
    )
    return own, caption_video[rows] - videos.start


def ids_of(captions: int) -> Tensor:
    """Numbers that many captions share, also of different ranks."""
    draw = torch.Generator().manual_seed(captions)
    return torch.randint(max(1, 2 * captions // 3), (captions,), generator=draw)


SIZES = ((1, 1), (7, 30), (60, 34))
PARTS = (
    "text_to_video",
    "text_ties",
    "text_quality",
    "videos",
    "video_to_text",
    "video_ties",
    "video_quality",
)
SCORES = {"distinct": score, "tied": tied_score}


def bank_of(rank: int, world_size: int) -> Features:
    """This rank's part of a bank of 11 captions; the parts are uneven."""
    whole, video = features_of(11, 11)
    first, end = (11 * part // world_size for part in (rank, rank + 1))
    return slice_of(whole, torch.arange(len(video)), range(first, end))[0]


def retrieved(rank: int, world_size: int) -> list[tuple[RetrievalMetrics, Retrieval]]:
    torch.set_num_threads(1)
    world = World(rank=rank, world_size=world_size, device=CPU)
    found = []
    rescoring = Rescoring(temperature=0.05, bank=bank_of(rank, world_size))
    for captions, videos in SIZES:
        whole, caption_video = features_of(captions, videos)
        # Uneven parts: with 34 videos on 3 ranks 8, 9 and 17; of one video two ranks have none.
        bounds = [videos * part // (world_size + 1) for part in range(world_size)] + [videos]
        own = slice_of(whole, caption_video, range(bounds[rank], bounds[rank + 1]))
        first = int((caption_video < bounds[rank]).sum())
        ids = ids_of(captions)[first : first + len(own[1])]
        for each in SCORES.values():
            for merged in (False, True):
                result = rank_features(
                    *own,
                    each,
                    world,
                    caption_ids=ids,
                    merge_equal=merged,
                    rescoring=rescoring if merged else None,
                    captions_per_block=12,
                    scores_per_tile=100,
                )
                found.append((result.ranks.metrics(), result))
    return found


def test_ranks_and_best_videos_equal_those_of_the_whole_table() -> None:
    found = iter(retrieved(0, 1))
    for captions, videos in SIZES:
        whole, caption_video = features_of(captions, videos)
        for each in SCORES.values():
            table = each(whole, whole)
            best = table.sort(dim=1, descending=True, stable=True)
            for ids in (None, ids_of(captions)):
                metrics, result = next(found)
                expected = ranks(table, caption_video, ids)
                for name in PARTS:
                    one, two = getattr(result.ranks, name), getattr(expected, name)
                    assert (one is None) == (two is None), name
                    if one is not None and two is not None:
                        assert torch.equal(one, two), name
                assert metrics == expected.metrics()
                assert torch.allclose(result.top_scores, best.values[:, :5], atol=1e-6)
                if each is score:
                    assert torch.equal(result.top_videos, best.indices[:, :5])


@pytest.mark.parametrize("world_size", [3, *further(2)])
def test_several_ranks_give_the_same_ranks_to_the_last_digit(world_size: int) -> None:
    alone = retrieved(0, 1)
    assert list(alone[-1][1].rescored) == ["dual_softmax", "qb_norm"]
    for rank, results in enumerate(spawn(retrieved, world_size)):
        for (metrics, result), (expected, whole) in zip(results, alone, strict=True):
            assert metrics == expected
            assert torch.equal(result.ranks.text_to_video, whole.ranks.text_to_video)
            assert torch.equal(result.ranks.video_to_text, whole.ranks.video_to_text)
            assert result.equal_captions == whole.equal_captions
            assert list(result.rescored) == list(whole.rescored)
            for name, ranks_of in result.rescored.items():
                same = whole.rescored[name]
                assert ranks_of.facts == same.facts
                assert torch.equal(ranks_of.text_to_video.rank, same.text_to_video.rank)
                assert ranks_of.text_to_video.metrics() == same.text_to_video.metrics()
                if ranks_of.video_to_text is not None and same.video_to_text is not None:
                    assert ranks_of.video_to_text.metrics() == same.video_to_text.metrics()
            if rank:
                assert result.top_videos.shape[0] == result.top_scores.shape[0] == 0
            else:
                assert torch.allclose(result.top_scores, whole.top_scores, atol=1e-6)


def test_a_model_that_scores_all_alike_finds_nothing() -> None:
    own, caption_video = features_of(6, 50)
    found = rank_features(own, caption_video, lambda a, b: 0 * score(a, b), ALONE)
    assert found.ranks.text_to_video.eq(50).all()
    assert found.ranks.text_ties.all()
    metrics = found.ranks.metrics()
    assert metrics.text_to_video.recall_at_10 == 0
    assert metrics.text_to_video.ties == 6


def test_a_copy_of_the_right_video_is_a_tie_whatever_the_tiles() -> None:
    own, caption_video = features_of(40, 30)
    twice = own._replace(
        frames=own.frames.repeat(2, 1, 1),
        frame_mask=own.frame_mask.repeat(2, 1),
        frame_logits=None if own.frame_logits is None else own.frame_logits.repeat(2, 1),
    )
    for width in (100, 370, 10_000):
        found = rank_features(twice, caption_video, score, ALONE, scores_per_tile=width)
        assert found.ranks.text_ties.all()
        alone = rank_features(own, caption_video, score, ALONE, scores_per_tile=width)
        assert torch.equal(found.ranks.text_to_video, 2 * alone.ranks.text_to_video)


def test_the_best_of_equal_scores_are_the_first_videos_whatever_the_tiles() -> None:
    own, caption_video = features_of(7, 40)

    def alike(texts: Features, videos: Features) -> Tensor:
        return torch.zeros(len(texts.sentence), len(videos.frames))

    for size in (1 << 20, 7 * 13, 7 * 3):
        found = rank_features(own, caption_video, alike, ALONE, scores_per_tile=size)
        assert found.top_videos.tolist() == [[0, 1, 2, 3, 4]] * 7


def test_memory_mapped_half_precision_features_are_ranked(tmp_path: Path) -> None:
    own, caption_video = features_of(20, 15)

    def mapped(name: str, values: Tensor) -> Tensor:
        stored = values.half().numpy() if values.is_floating_point() else values.numpy()
        np.save(tmp_path / f"{name}.npy", stored)
        return torch.from_numpy(np.load(tmp_path / f"{name}.npy", mmap_mode="c"))

    stored = Features(
        *(None if x is None else mapped(str(i), x) for i, x in enumerate(own))  # type: ignore[arg-type]
    )
    half = Features(
        *(x.half().float() if x is not None and x.is_floating_point() else x for x in own)  # type: ignore[arg-type]
    )
    expected = ranks(score(half, half), caption_video)
    found = rank_features(stored, caption_video, score, ALONE, scores_per_tile=64).ranks
    assert torch.equal(found.text_to_video, expected.text_to_video)
    assert torch.equal(found.video_to_text, expected.video_to_text)


def test_no_rank_scores_more_than_a_tile_at_a_time() -> None:
    own, caption_video = features_of(300, 200)
    sizes = []

    def counted(texts: Features, videos: Features) -> Tensor:
        scores = score(texts, videos)
        sizes.append(scores.numel())
        return scores

    limits: dict[str, Any] = {"captions_per_block": 32, "scores_per_tile": 1000}
    rank_features(own, caption_video, counted, ALONE, **limits)
    assert max(sizes) <= 32 * 32
    # The pairs of the table once, and the few of the positives.
    assert sum(sizes) <= 300 * 200 + 300 * 32


def test_a_caption_with_many_right_videos_is_scored_once_with_each() -> None:
    own, _ = features_of(200, 150)
    sizes = []

    def counted(texts: Features, videos: Features) -> Tensor:
        sizes.append(len(texts.sentence) * len(videos.frames))
        return score(texts, videos)

    caption, video = torch.arange(20).repeat_interleave(150), torch.arange(150).repeat(20)
    found = paired_scores(own, own, caption, video, counted, CPU, pairs_per_block=300)
    assert torch.allclose(found, score(own, own)[:20].flatten(), atol=1e-6)
    assert sum(sizes) == 20 * 150


def test_similarity_that_is_not_finite_is_refused_by_its_pair() -> None:
    own, caption_video = features_of(9, 12)

    def broken(texts: Features, videos: Features) -> Tensor:
        scores = score(texts, videos)
        return scores.where(videos.frames[:, 0, 0] != own.frames[7, 0, 0], torch.nan)

    with pytest.raises(ValueError, match=r"with video 7 is nan; 9 entries are not finite"):
        rank_features(own, caption_video, broken, ALONE)


def refused_on(rank: int, world_size: int) -> str:
    torch.set_num_threads(1)
    world = World(rank=rank, world_size=world_size, device=CPU)
    whole, caption_video = features_of(20, 12)
    own = slice_of(whole, caption_video, range(6 * rank, 6 * rank + 6))

    def broken(texts: Features, videos: Features) -> Tensor:
        scores = score(texts, videos)
        return scores.where(videos.frames[:, 0, 0] != whole.frames[7, 0, 0], torch.nan)

    with pytest.raises(ValueError, match="not finite") as error:
        rank_features(*own, broken, world, captions_per_block=8)
    # Only rank 1 has a wrong row; a negative one would choose a video from the end.
    wrong = own[1].clone()
    wrong[-1] -= 6 * rank
    with pytest.raises(ValueError, match=r"caption_video\[\d+\] is -\d; this rank has 6 videos"):
        rank_features(own[0], wrong, score, world)
    # Rank 0 gives the bank a caption that rank 1 has in its part of the test set.
    texts = [["A dog.", "a cat"], ["a bird", "a fish"]][rank]
    bank = Bank(name="train", features=bank_of(rank, 5), captions=texts)
    ids = caption_ids([["one", "two"], ["a  dog", "three"]][rank])
    with pytest.raises(ValueError, match="the bank train holds 1 captions of the test set") as leak:
        without_test_captions(bank, ids, "test", False, world)
    kept = without_test_captions(bank, ids, "test", True, world)
    assert kept.captions == [["a cat"], ["a bird", "a fish"]][rank]
    assert (kept.dropped, len(kept.features.words)) == (1, 2 - (rank == 0))
    return f"{error.value}; {leak.value}"


def test_one_ranks_broken_similarity_ends_all_ranks() -> None:
    first, second = spawn(refused_on, 2)
    assert first == second
    assert "with video 7 is nan" in first
    assert "such as 'A dog.'" in first


def named_on(rank: int, world_size: int) -> tuple[list[str], list[str], object]:
    torch.set_num_threads(1)
    world = World(rank=rank, world_size=world_size, device=CPU)
    whole, caption_video = features_of(20, 12)
    bounds = [12 * part // world_size for part in range(world_size + 1)]
    own = slice_of(whole, caption_video, range(bounds[rank], bounds[rank + 1]))
    found = evaluate_features(*own, model=ModelConfig(interaction="att_wti"), world=world)
    queries = [query["caption"] for query in found.queries]
    return queries, [query["key"] for query in found.video_queries], found.intervals


def test_features_without_names_are_numbered_through_all_ranks() -> None:
    one = named_on(0, 1)
    assert one[0] == [f"caption {number}" for number in range(20)]
    assert spawn(named_on, 2)[0] == one


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([0, 1, 5], r"caption_video\[2\] is 5; .* allowed are 0 to 4"),
        ([0, -1, 4], r"caption_video\[1\] is -1; .* allowed are 0 to 4"),
        ([0, 1], "caption_video has 2 rows for 3 captions"),
    ],
)
def test_a_row_of_no_video_is_refused(rows: list[int], named: str) -> None:
    own, _ = features_of(3, 5)
    with pytest.raises(ValueError, match=named):
        rank_features(own, torch.tensor(rows), score, ALONE)
    with pytest.raises(ValueError, match="caption_ids has 1 rows for 3 captions"):
        rank_features(own, torch.tensor([0, 1, 2]), score, ALONE, caption_ids=torch.tensor([1]))


def test_a_set_without_captions_is_refused() -> None:
    own, caption_video = features_of(9, 12)
    nothing = slice_of(own, caption_video[:0], range(12))
    with pytest.raises(ValueError, match="without captions cannot be ranked"):
        rank_features(*nothing, score, ALONE)


def test_paired_scores_are_entries_of_the_table() -> None:
    own, caption_video = features_of(30, 20)
    captions = torch.arange(30).flip(0)
    found = partial(paired_scores, own, own, captions, caption_video.flip(0), score, CPU)
    expected = score(own, own)[captions, caption_video.flip(0)]
    assert torch.allclose(found(), expected, atol=1e-6)
    assert torch.allclose(found(pairs_per_block=7), expected, atol=1e-6)
