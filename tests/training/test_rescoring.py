"""Dual softmax and QB-Norm: by hand, and streamed against their definitions."""

from __future__ import annotations

from math import log

import pytest
import torch
from builders.numbered_features import numbered, score_of
from torch import Tensor

from tvr.kernels.rescoring import dual_softmax, qb_norm
from tvr.trainer.config import ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.bank import Bank, caption_ids, without_test_captions
from tvr.trainer.evaluation.options import EvaluationOptions
from tvr.trainer.evaluation.retrieval import Rescoring, Retrieval, rank_features
from tvr.trainer.evaluation.stored_features import evaluate_features
from tvr.trainer.model.model import Features
from tvr.trainer.records import Evaluation, metric_blocks

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))
# Powers of two: exp(s / TEMPERATURE) = exp(BETA s) = 2 ** (10 s).
TEMPERATURE = 0.1 / log(2)
BETA = 10 * log(2)


def rescored(
    table: Tensor,
    text_video: Tensor,
    rescoring: Rescoring | None,
    block: int = 2048,
    tile: int = 1 << 22,
    ids: Tensor | None = None,
) -> Retrieval:
    """Ranks of the first captions of a table; the bank's are its further rows."""
    own = numbered(len(text_video), table.shape[1])
    return rank_features(
        own,
        text_video,
        score_of(table),
        ALONE,
        caption_ids=ids,
        merge_equal=ids is not None,
        rescoring=rescoring,
        captions_per_block=block,
        scores_per_tile=tile,
    )


def test_dual_softmax_by_hand() -> None:
    table = torch.tensor([[0.6, 0.5], [0.6, 0.1]])
    texts, videos = dual_softmax(table.double(), TEMPERATURE)
    # Columns of 2 ** (10 s): (64, 64) and (32, 2); rows: (64, 32) and (64, 2).
    expected = [[0.6 * 64 / 128, 0.5 * 32 / 34], [0.6 * 64 / 128, 0.1 * 2 / 34]]
    assert torch.allclose(texts, torch.tensor(expected).double())
    expected = [[0.6 * 64 / 96, 0.5 * 32 / 96], [0.6 * 64 / 66, 0.1 * 2 / 66]]
    assert torch.allclose(videos, torch.tensor(expected).double())
    # Caption 0 is of video 1, which both captions' favourite, video 0, hides from it.
    found = rescored(table, torch.tensor([1, 0]), Rescoring(temperature=TEMPERATURE))
    assert found.ranks.text_to_video.tolist() == [2, 1]
    assert found.ranks.video_to_text.tolist() == [2, 1]  # of video 0 a tie
    by_softmax = found.rescored["dual_softmax"]
    assert by_softmax.text_to_video.rank.tolist() == [1, 1]
    assert by_softmax.video_to_text is not None
    assert by_softmax.video_to_text.rank.tolist() == [1, 1]


TEST = torch.tensor([[0.6, 0.5, 0.1], [0.7, 0.3, 0.2], [0.1, 0.5, 0.6]])
BANK = torch.tensor([[0.6, 0.1, 0.1], [0.5, 0.3, 0.1], [0.7, 0.1, 0.6]])


def test_qb_norm_by_hand() -> None:
    # Video 0 is first for all of the bank. Sums of 2 ** (10 s): 64 + 32 + 128, 2 + 8 + 2 and
    # 2 + 2 + 64.
    # Caption 2 has video 2 first, which is not in the set, so its row stays.
    expected = [[64 / 224, 32 / 12, 2 / 68], [128 / 224, 8 / 12, 4 / 68], [0.1, 0.5, 0.6]]
    found = qb_norm(TEST.double(), BANK.double(), BETA)
    assert torch.allclose(found, torch.tensor(expected).double())
    ranked = rescored(
        torch.cat([TEST, BANK]),
        torch.tensor([1, 0, 2]),
        Rescoring(bank=numbered(3, 0, first=3), beta=BETA),
    )
    assert ranked.ranks.text_to_video.tolist() == [2, 1, 1]
    by_bank = ranked.rescored["qb_norm"]
    assert by_bank.text_to_video.rank.tolist() == [1, 2, 1]
    assert by_bank.video_to_text is None
    assert by_bank.facts == {"bank_captions": 3, "activation_set": 1, "normalised_queries": 2}


def best_ranks(scores: Tensor, right: Tensor) -> list[int]:
    """Rank of each row's best right answer; an equal wrong one comes first."""
    found = []
    for row, is_right in zip(scores, right, strict=True):
        best = row[is_right].max()
        found.append(1 + int((row[~is_right] >= best - 1e-9 * best.abs()).sum()))
    return found


@pytest.mark.parametrize("temperature", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("merged", [False, True])
def test_streamed_ranks_equal_the_definitions(temperature: float, merged: bool) -> None:
    draw = torch.Generator().manual_seed(7)
    table = torch.rand(70, 24, generator=draw) * 1.6 - 0.6
    table[:, 5] = table[:, 9]  # copies are ties
    text_video = torch.randint(24, (50,), generator=draw)
    ids = torch.randint(30, (50,), generator=draw) if merged else None
    right = torch.zeros(50, 24, dtype=torch.bool)
    for number, video in enumerate(text_video.tolist()):
        same = [number] if ids is None else (ids == ids[number]).nonzero().squeeze(1).tolist()
        right[same, video] = True
    exact = table.double()
    texts, videos = dual_softmax(exact[:50], temperature)
    by_bank = qb_norm(exact[:50], exact[50:], 20.0)
    has_text = right.any(dim=0)
    plain = rescored(table, text_video, None, ids=ids)
    rescoring = Rescoring(temperature=temperature, bank=numbered(20, 0, first=50))
    for block, tile in ((7, 30), (50, 200), (2048, 1 << 22)):
        found = rescored(table, text_video, rescoring, block, tile, ids)
        softmax, bank = found.rescored["dual_softmax"], found.rescored["qb_norm"]
        assert softmax.text_to_video.rank.tolist() == best_ranks(texts, right)
        assert softmax.video_to_text is not None
        expected = best_ranks(videos.T[has_text], right.T[has_text])
        assert softmax.video_to_text.rank.tolist() == expected
        assert bank.text_to_video.rank.tolist() == best_ranks(by_bank, right)
        assert 0 < bank.facts["normalised_queries"] < 50
        # The raw ranks are those without rescoring.
        assert found.ranks.metrics() == plain.ranks.metrics()
        assert torch.equal(found.ranks.text_to_video, plain.ranks.text_to_video)


def texts(count: int, seed: int) -> Features:
    draw = torch.Generator().manual_seed(seed)
    return Features(
        sentence=torch.randn(count, 8, generator=draw),
        words=torch.randn(count, 3, 8, generator=draw),
        word_mask=torch.ones(count, 3, dtype=torch.long),
        frames=torch.randn(4, 2, 8, generator=draw),
        frame_mask=torch.ones(4, 2, dtype=torch.long),
        word_logits=None,
        frame_logits=None,
        margin_hinge=None,
    )


def evaluated(bank: list[str] | None, captions: list[str] | None, **options: object) -> Evaluation:
    return evaluate_features(
        texts(4, seed=1),
        torch.arange(4),
        model=ModelConfig(interaction="ti"),
        captions=captions,
        data="test",
        options=EvaluationOptions(**options),  # type: ignore[arg-type]
        bank=None
        if bank is None
        else Bank(name="train", features=texts(len(bank), seed=2), captions=bank),
    )


def test_blocks_are_labelled_and_apart_in_table_and_json() -> None:
    names = ["a dog", "a cat", "a fish", "a bird"]
    result = evaluated(["x", "y"], names, dual_softmax=0.05, qb_norm="train")
    plain = evaluated(None, names)
    assert result.metrics == plain.metrics
    summary = result.summary()
    assert "rescored" not in plain.summary()
    assert list(summary["rescored"]) == ["dual_softmax", "qb_norm"]
    assert summary["rescored"]["dual_softmax"]["temperature"] == 0.05
    assert summary["rescored"]["qb_norm"]["bank"] == "train"
    assert "video_to_text" not in summary["rescored"]["qb_norm"]
    for query in result.queries:
        assert set(query["rescored_ranks"]) == {"dual_softmax", "qb_norm"}
    assert set(result.video_queries[0]["rescored_ranks"]) == {"dual_softmax"}
    lines = result.table().splitlines()
    assert [block.title for block in metric_blocks(summary)] == [
        "raw",
        "dual softmax, temperature 0.05: sees all test queries at once",
        "QB-Norm, beta 20, bank of 2 captions of train",
    ]
    assert lines[6] == "dual softmax, temperature 0.05: sees all test queries at once"
    assert [line[:13] for line in lines[8:11]] == [
        "text to video",
        "video to text",
        "mean of both ",
    ]
    assert lines[11] == "QB-Norm, beta 20, bank of 2 captions of train"
    assert lines[13].startswith("text to video")
    assert lines[14] == "95 % intervals of the raw results:"
    assert len(lines) == 18


def test_a_bank_with_a_test_caption_is_refused_or_cleaned() -> None:
    names = ["a dog", "a cat", "a fish", "a bird"]
    shared = ["x", "A  Fish!", "y"]
    with pytest.raises(ValueError, match=r"train holds 1 captions of .* test, such as 'A  Fish!'"):
        evaluated(shared, names, qb_norm="train")
    cleaned = evaluated(shared, names, qb_norm="train", bank_shared="drop")
    block = cleaned.rescored["qb_norm"]
    assert (block["bank_captions"], block["dropped_test_captions"]) == (2, 1)
    assert "1 test captions dropped" in cleaned.table()
    with pytest.raises(ValueError, match="must hold none of them"):
        evaluated(["x"], None, qb_norm="train")
    with pytest.raises(ValueError, match="the bank of QB-Norm holds no caption"):
        evaluated(["a dog"], names, qb_norm="train", bank_shared="drop")
    with pytest.raises(ValueError, match="needs both"):
        evaluated(None, names, qb_norm="train")


def test_a_bank_caption_without_its_text_is_refused() -> None:
    bank = Bank(name="train", features=numbered(3, 0), captions=["x", "y"])
    with pytest.raises(ValueError, match="train has 2 texts for 3 captions"):
        without_test_captions(bank, caption_ids(["z"]), "test", False, ALONE)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dual_softmax": 0.0}, "dual_softmax=0.0 must be from 1e-5 to 100"),
        ({"dual_softmax": float("inf")}, "dual_softmax=inf must be from 1e-5 to 100"),
        ({"dual_softmax": 1e-320}, "dual_softmax=1e-320 must be"),
        ({"qb_norm": "b", "beta": -1.0}, "beta=-1.0 must be from 1e-3 to 1e5"),
        ({"qb_norm": "b", "beta": float("inf")}, "beta=inf must be"),
        ({"bank_captions": 5}, "need qb_norm"),
        ({"beta": 5.0}, "beta=5.0 needs qb_norm"),
        ({"qb_norm": "b", "bank_captions": 0}, "bank_captions=0"),
        ({"top_videos": 0}, "top_videos=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EvaluationOptions(**options)  # type: ignore[arg-type]
