"""Runs and qrels of TREC, read back by pytrec_eval: its numbers are ours, ties included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from torch import Tensor

from tvr.kernels.ranking import ranks, retrieval_metrics
from tvr.trainer.comparison.trec import write_trec


def queries_of(similarity: Tensor, video: Tensor, depth: int, keys: list[str]) -> list[dict]:
    """What an evaluation stores of each caption."""
    top = similarity.topk(depth, dim=1)
    rank = ranks(similarity, video).text_to_video
    return [
        {
            "caption": f"caption {row}",
            "key": keys[int(video[row])],
            "rank": int(rank[row]),
            "top": [
                {"key": keys[column], "similarity": value}
                for column, value in zip(columns, values, strict=True)
            ],
        }
        for row, (columns, values) in enumerate(
            zip(top.indices.tolist(), top.values.tolist(), strict=True)
        )
    ]


def measured(run: Path, qrels: Path, measures: set[str]) -> dict[str, dict[str, float]]:
    with qrels.open() as lines:
        right = pytrec_eval.parse_qrel(lines)
    with run.open() as lines:
        found = pytrec_eval.parse_run(lines)
    return pytrec_eval.RelevanceEvaluator(right, measures).evaluate(found)


@pytest.mark.parametrize("levels", [0, 12, 3, 1])
@pytest.mark.parametrize("depth", [50, 10])
def test_trec_eval_finds_our_recalls_and_ranks(tmp_path: Path, levels: int, depth: int) -> None:
    """With all similarities different, with ties, with many, and all equal."""
    generator = torch.Generator().manual_seed(levels)
    similarity = torch.rand(60, 50, generator=generator)
    if levels:
        similarity = (similarity * levels).floor() / levels
    # Half of the tolerance and less: ties that are not exact.
    similarity += 4e-7 * torch.rand(60, 50, generator=generator)
    video = torch.randint(50, (60,), generator=generator)
    keys = [f"v{9 * place % 50}" for place in range(50)]
    queries = queries_of(similarity, video, depth, keys)
    run = tmp_path / "a.run"
    qrels = write_trec(queries, run, depth)
    assert qrels == tmp_path / "a.run.qrels"
    found = measured(run, qrels, {"success.1,5,10", "recip_rank"})
    ours = retrieval_metrics(similarity, video).text_to_video
    for k, recall in ((1, ours.recall_at_1), (5, ours.recall_at_5), (10, ours.recall_at_10)):
        theirs = [one[f"success_{k}"] for one in found.values()]
        assert 100 * np.sum(theirs) / 60 == pytest.approx(recall), k
    rank = np.array([query["rank"] for query in queries])
    reciprocal = [found.get(f"q{number}", {}).get("recip_rank", 0) for number in range(1, 61)]
    assert reciprocal == pytest.approx(np.where(rank <= depth, 1 / rank, 0))


def test_lines_are_in_the_order_of_the_scores(tmp_path: Path) -> None:
    queries = queries_of(torch.zeros(2, 30), torch.tensor([3, 4]), 30, [f"k{n}" for n in range(30)])
    run = tmp_path / "run"
    write_trec(queries, run, 20, tag="mine")
    lines = [line.split() for line in run.read_text().splitlines()]
    assert {(len(line), line[1], line[5]) for line in lines} == {(6, "Q0", "mine")}
    assert [line[0] for line in lines] == ["q1"] * 20 + ["q2"] * 20
    scores = np.array([line[4] for line in lines[:20]], dtype=np.float32)
    assert (np.diff(scores) < 0).all()
    assert np.abs(scores).max() < 1e-40  # lowered by steps of single precision
    assert [int(line[3]) for line in lines[:20]] == list(range(1, 21))
    assert "k3" not in {line[2] for line in lines[:20]}  # all others tie with it


def test_several_right_videos(tmp_path: Path) -> None:
    top = [{"key": f"v{place}", "similarity": 1 - place / 10} for place in range(6)]
    query = {"caption": "c", "key": "v1", "keys": ["v1", "v4"], "rank": 2, "top": top}
    run = tmp_path / "run"
    found = measured(run, write_trec([query], run, 6), {"map", "ndcg_cut.10"})["q1"]
    assert found["map"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    gains = 1 / np.log2(3) + 1 / np.log2(6)
    assert found["ndcg_cut_10"] == pytest.approx(gains / (1 + 1 / np.log2(3)))


def test_keys_without_spaces(tmp_path: Path) -> None:
    top = [{"key": "a b%\u2003c", "similarity": 0.5}]
    run = tmp_path / "run"
    qrels = write_trec([{"key": "a b%\u2003c", "rank": 1, "top": top}], run, 1)
    assert run.read_text() == "q1 Q0 a%20b%25%E2%80%83c 1 0.5 tvr\n"
    assert qrels.read_text() == "q1 0 a%20b%25%E2%80%83c 1\n"


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    twice = [{"key": "a", "similarity": 0.5}] * 2
    with pytest.raises(ValueError, match="two videos have the key 'a'"):
        write_trec([{"key": "a", "rank": 1, "top": twice}], run, 2)
    with pytest.raises(ValueError, match="no queries"):
        write_trec([], run, 2)
    with pytest.raises(ValueError, match="must be one word"):
        write_trec([{"key": "a", "rank": 1, "top": twice[:1]}], run, 2, tag="two words")
    assert not run.exists()
