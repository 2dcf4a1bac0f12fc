"""`tvr bench train`, `save` and `metrics`: shrunk runs with real steps on real ranks."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.tiny import tiny_config
from rich.console import Console
from tvr_bench import train
from tvr_bench.train import with_same_losses
from tvr_bench.train_report import rows, save_row, table

from tvr.trainer.bench_cli import bench
from tvr.trainer.config import to_json
from tvr.trainer.monitoring.step_record import PARTS


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of two steps on one rank and on two ranks, with a save after every step."""
    folder = tmp_path_factory.mktemp("measured")
    settings, numbers = folder / "settings.json", folder / "numbers.json"
    settings.write_text(to_json(tiny_config(data, train={"micro_batch": 4})))
    flags = ["--config", str(settings), "--steps", "2", "--save-every", "1", "--threads", "1"]
    assert bench(["train", *flags, "--ranks", "1", "2", "--json", str(numbers)]) == 0
    return json.loads(numbers.read_text())


def test_the_measured_parts_make_up_the_step(measured: dict[str, Any]) -> None:
    assert [row["ranks"] for row in measured["rows"]] == [1, 2]
    for row in measured["rows"]:
        assert list(row["shares"]) == list(PARTS)
        assert all(0 < share < 1 for share in row["shares"].values())
        assert sum(row["shares"].values()) == pytest.approx(1)


def test_the_json_has_versions_machine_and_sizes(measured: dict[str, Any]) -> None:
    assert set(measured["versions"]) == {"python", "torch", "tvr"}
    assert measured["machine"]["cpu"]
    sizes = measured["sizes"]
    assert (sizes["global_batch"], sizes["steps"], sizes["threads"]) == (8, 2, 1)
    assert sizes["parameters"] > 10_000
    assert sizes["model"]["towers"]["width"] == 32
    assert "tokenizer" not in sizes["model"]


@pytest.mark.exhaustive
def test_saves_of_both_kinds_are_measured(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    tmp_path: Path,
) -> None:
    # Rendering clips of its own would take longer than the rest of the test.
    monkeypatch.setattr(train, "with_data", lambda *_: tiny_config(data))
    flags = ["--ranks", "2", "--saves", "1", "--width", "64", "--layers", "1"]
    assert bench(["save", *flags, "--out", str(tmp_path), "--json", "-"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    (row,) = result["rows"]
    assert len(row["background"]) == len(row["synchronous"]) == 1
    # Training continues while a background save is written and while it is published.
    assert row["background_steps"][0] >= 2
    assert row["synchronous_steps"] == [0]
    assert row["synchronous_later_s"] >= row["synchronous_s"] > 0
    # Weights, and three numbers of the optimiser for each.
    assert row["checkpoint_bytes"] > 16 * result["sizes"]["parameters"]
    assert "a step waits" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_steps_with_and_without_metrics_and_scrapes_are_measured(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.json"
    config = tiny_config(data, train={"micro_batch": 4}, metrics={"address": "127.0.0.1"})
    settings.write_text(to_json(config))
    assert bench(["metrics", "--config", str(settings), "--steps", "20", "--json", "-"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    (row,) = result["rows"]
    assert row["steps"] == 25  # whole blocks
    assert 0 < row["monitor_s"] < row["on_s"]
    assert row["scrapes"] > 1
    assert row["scraped_s"] > 0
    assert result["sizes"]["ranks"] == 2
    assert "with metrics / without" in printed.err


@pytest.mark.exhaustive
def test_a_failing_rank_is_reported(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data)
    config = replace(config, data=replace(config.data, train=str(data / "nowhere")))
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(config))
    assert bench(["train", "--config", str(settings), "--ranks", "1"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_fewer_ranks_get_larger_micro_batches(data: Path) -> None:
    config = tiny_config(data, train={"micro_batch": 4, "global_batch": 24})
    scaled = [with_same_losses(config, ranks, 3).train.micro_batch for ranks in (1, 2, 3)]
    assert scaled == [12, 6, 4]
    with pytest.raises(ValueError, match=r"--ranks 5: cannot split the 12 pairs"):
        with_same_losses(config, 5, 3)
    cached = tiny_config(data, train={"micro_batch": 4, "gradient_cache": True})
    assert with_same_losses(cached, 1, 2) == cached


def test_rows_and_table_of_known_numbers() -> None:
    alone = {"by_rank": [[{"encode": 3.0, "backward": 1.0}, {"encode": 5.0, "backward": 3.0}]]}
    two = {"by_rank": [[{"encode": 2.0, "gather": 1.0}], [{"encode": 3.0, "gather": 0.0}]]}
    found = rows({1: alone, 2: two}, 12)
    assert [row["step_s"] for row in found] == [6, 3]
    assert [row["efficiency"] for row in found] == [1, 1]
    assert found[0]["shares"]["encode"] == pytest.approx(8 / 12)
    assert found[1]["shares"]["gather"] == pytest.approx(1 / 6)
    sizes = {"global_batch": 12, "parameters": 2_000_000, "device": "cpu", "threads": 1}
    printed = io.StringIO()
    Console(width=80, file=printed).print(table(found, sizes))
    lines = [line.split() for line in printed.getvalue().splitlines()]
    assert ["encode", "4000.0", "ms", "66.7%", "2500.0", "ms", "83.3%"] in lines
    assert ["efficiency", "1.00", "1.00"] in lines


def test_a_save_takes_as_long_as_its_slowest_rank() -> None:
    def saves(*timed: tuple[float, float, int]) -> list[dict[str, float]]:
        return [{"waited_s": w, "seconds": s, "steps": n} for w, s, n in timed]

    of_ranks = [
        {"background": saves((1, 12, 2), (3, 14, 2)), "synchronous": saves((30, 30, 0), (9, 9, 0))},
        {"background": saves((2, 12, 2), (2, 14, 2)), "synchronous": saves((9, 9, 0), (20, 20, 0))},
    ]
    by_rank = [{**one, "step_s": [4.0, 5.0, 6.0]} for one in of_ranks]
    row = save_row({"by_rank": by_rank, "checkpoint_bytes": 7})
    assert (row["background"], row["synchronous"]) == ([2, 3], [30, 20])
    assert row["ratio"] == 0.1
    # Two steps of 5 s would have been done after 10 s.
    assert (row["background_later"], row["synchronous_later"]) == ([2, 4], [30, 20])
    assert row["later_ratio"] == 3 / 25
