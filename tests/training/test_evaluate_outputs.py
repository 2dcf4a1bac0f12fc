"""Outputs of `tvr evaluate` beside the metrics: intervals, a run of TREC, and the MMEB-V2 score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, make_tiny_data, tiny_config

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.data_prep.packing.pack import pack_shards
from tvr.launchers.cli import main
from tvr.trainer.comparison.mmeb import mmeb_v2_score
from tvr.trainer.comparison.statistics import intervals
from tvr.trainer.config import to_json
from tvr.trainer.evaluation import stored_features
from tvr.trainer.evaluation.stored_features import evaluate_source
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.records import Evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_data(folder, num_train=10)
    words = load_tokenizer(folder / "tokenizer", MAX_WORDS)
    save_clip(folder / "clip", words, width=16, image_size=IMAGE_SIZE)
    clips = folder / "clips/train"
    lines = [json.loads(line) for line in (clips / ANNOTATIONS).read_text().splitlines()]
    lines[0]["captions"][1] = lines[4]["captions"][2] + "."  # equal but for the sign at the end
    listed = clips / "eight.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pack_shards(
        read_annotations(str(listed)),
        str(folder / "eight"),
        layout="frames",
        num_frames=8,
        short_side=IMAGE_SIZE,
    )
    return folder


def evaluated(data: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Results on a set in which each video has three captions."""
    line = ["evaluate", "--model", str(data / "clip"), "--data", str(data / "eight"), *flags]
    assert main([*line, "--json", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(data: Path) -> dict[str, Any]:
    run = data / "best.run"
    flags = ("--trec", str(run), "--top-videos", "10", "--mmeb-v2")
    return evaluated(data, data / "result.json", *flags)


def measured(run: Path, measures: set[str]) -> dict[str, dict[str, float]]:
    with run.with_name(run.name + ".qrels").open() as lines:
        right = pytrec_eval.parse_qrel(lines)
    with run.open() as lines:
        found = pytrec_eval.parse_run(lines)
    return pytrec_eval.RelevanceEvaluator(right, measures).evaluate(found)


def mean(found: dict[str, dict[str, float]], measure: str) -> float:
    return float(np.mean([one[measure] for one in found.values()]))


def test_trec_eval_reads_our_numbers(data: Path, result: dict[str, Any]) -> None:
    found = measured(data / "best.run", {"success.1,5,10", "recip_rank"})
    assert len(found) == 30
    for k in (1, 5, 10):
        wanted = result["text_to_video"][f"recall_at_{k}"]
        assert 100 * mean(found, f"success_{k}") == pytest.approx(wanted)
    ranks = [1 / one["recip_rank"] for one in found.values()]
    assert np.median(ranks) == pytest.approx(result["text_to_video"]["median_rank"])
    assert [len(query["top"]) for query in result["queries"]] == [10] * 30


def test_trec_eval_reads_equal_captions(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "equal.run"
    flags = ("--num-frames", "8", "--equal-captions", "--trec", str(run), "--top-videos", "10")
    ours = evaluated(data, tmp_path / "equal.json", *flags)["text_to_video"]
    found = measured(run, {"map", "ndcg_cut.10", "success.1"})
    lines = run.with_name("equal.run.qrels").read_text().splitlines()
    assert len(lines) == 32  # two captions are equal
    assert 100 * mean(found, "success_1") == pytest.approx(ours["recall_at_1"])
    assert 100 * mean(found, "map") == pytest.approx(ours["mean_average_precision"])
    assert 100 * mean(found, "ndcg_cut_10") == pytest.approx(ours["ndcg_at_10"])


def test_intervals_are_stored_and_printed(
    data: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for direction, rows in (("text_to_video", "queries"), ("video_to_text", "video_queries")):
        ranks = [query["rank"] for query in result[rows]]
        expected = intervals(ranks, [query["key"] for query in result[rows]])
        assert result["intervals"][direction] == {n: list(v) for n, v in expected.items()}
        for name, (low, high) in expected.items():
            assert low <= result[direction][name] <= high
    low, high = result["intervals"]["text_to_video"]["recall_at_10"]
    found = evaluate_source(data / "clip", str(data / "eight"), num_frames=8)
    assert "95 % intervals" in found.table()
    assert f"{low:.1f} to {high:.1f}" in found.table()
    assert main(["compare", str(data / "result.json"), str(data / "result.json")]) == 0
    assert "30 tied" in capsys.readouterr().out


def test_mmeb_v2_asks_the_first_caption_of_each_video(data: Path, result: dict[str, Any]) -> None:
    # The captions of a video lie next to each other, in the order of its annotations.
    first = result["queries"][::3]
    assert len({query["key"] for query in first}) == 10
    hits = [query["rank"] == 1 for query in first]
    assert result["mmeb_v2"]["hit_at_1"] == pytest.approx(100 * np.mean(hits))
    assert result["mmeb_v2"]["queries"] == 10
    assert result["text_to_video"]["recall_at_1"] != result["mmeb_v2"]["hit_at_1"]


def test_mmeb_v2_refuses_other_settings(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["evaluate", "--model", str(data / "clip"), "--data", str(data / "eight"), "--mmeb-v2"]
    assert main([*line, "--num-frames", "12"]) == 2
    assert "takes 8 frames of a video, not 12" in capsys.readouterr().err
    features = tmp_path / "features"
    stored = ["embed", str(data / "clip"), "--data", str(data / "test"), "--out", str(features)]
    assert main([*stored, "--num-frames", "3"]) == 0
    assert main(["evaluate", "--features", str(features), "--mmeb-v2"]) == 2
    assert "takes 8 frames of a video, not 3" in capsys.readouterr().err
    found = evaluate_source(data / "clip", str(data / "eight"), num_frames=8)
    with pytest.raises(ValueError, match="11 videos, of which 10 have a caption"):
        mmeb_v2_score(replace(found, videos=11))
    equal = {**found.protocol, "equal_captions": "right"}
    with pytest.raises(ValueError, match="leave --equal-captions out"):
        mmeb_v2_score(replace(found, protocol=equal))
    joined = {**found.protocol, "name": "paragraph"}
    with pytest.raises(ValueError, match="leave --paragraphs out"):
        mmeb_v2_score(replace(found, protocol=joined))
    # Before anything is encoded.
    (tmp_path / "none").mkdir()
    line = ["evaluate", "--model", str(tmp_path / "none"), "--data", "x", "--mmeb-v2"]
    for option in ("--equal-captions", "--paragraphs"):
        assert main([*line, option]) == 2
        assert f"leave {option} out" in capsys.readouterr().err


def test_mmeb_v2_of_a_run_takes_8_frames_and_stores_nothing(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = evaluate_source(data / "clip", str(data / "eight"), num_frames=8)
    asked: list[Any] = []

    def evaluates(source: Path, url: str, choice: str, **options: Any) -> Evaluation:
        asked.append((source, url, choice, options["num_frames"]))
        return found

    monkeypatch.setattr(stored_features, "evaluate_source", evaluates)
    config = tiny_config(data)
    without = replace(config, data=replace(config.data, test=None))
    (tmp_path / "config.json").write_text(to_json(without))
    line = ["evaluate", "--run-dir", str(tmp_path), "--mmeb-v2", "--checkpoint", "best"]
    assert main(line) == 2
    assert "has no data.test: give --data" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(to_json(config))
    assert main(line) == 0
    assert asked == [(tmp_path, str(data / "test"), "best", 8)]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
