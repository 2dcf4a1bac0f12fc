"""`tvr bench train` and `tvr bench save`: real steps on real ranks, and what is said of them."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.tiny import tiny_config
from rich.console import Console

from tvr_bench import train as bench_train
from tvr_bench.kernels import bench
from tvr_bench.train import shared_out
from tvr_bench.train_report import rows, save_row, table
from tvr.trainer.config import to_json
from tvr.trainer.monitoring.stopwatch import PARTS, Laps


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All numbers of two steps on one and on two ranks, with a save after every step."""
    folder = tmp_path_factory.mktemp("measured")
    settings, numbers = folder / "settings.json", folder / "numbers.json"
    settings.write_text(to_json(tiny_config(data, train={"micro_batch": 4})))
    flags = ["--config", str(settings), "--steps", "2", "--save-every", "1", "--threads", "1"]
    assert bench(["train", *flags, "--ranks", "1", "2", "--json", str(numbers)]) == 0
    return json.loads(numbers.read_text())


def test_every_part_of_a_step_is_measured(measured: dict[str, Any]) -> None:
    alone, two = measured["rows"]
    assert (alone["ranks"], two["ranks"]) == (1, 2)
    for row in (alone, two):
        assert list(row["shares"]) == list(PARTS)
        assert all(0 < share < 1 for share in row["shares"].values())
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert 0 < row["fastest_s"] <= row["step_s"] <= row["slowest_s"]
        assert row["pairs_per_s"] == pytest.approx(8 / row["step_s"])
    assert alone["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(alone["step_s"] / (2 * two["step_s"]))


def test_the_numbers_come_with_what_made_them(measured: dict[str, Any]) -> None:
    assert set(measured["versions"]) == {"python", "torch", "tvr"}
    assert measured["machine"]["cpu"]
    sizes = measured["sizes"]
    assert (sizes["global_batch"], sizes["steps"], sizes["threads"]) == (8, 2, 1)
    assert sizes["parameters"] > 10_000
    assert sizes["model"]["towers"]["width"] == 32
    assert "tokenizer" not in sizes["model"]


def test_saves_of_both_kinds_are_measured(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    tmp_path: Path,
) -> None:
    # Without the clips that are rendered for it, which take longer than all the rest.
    monkeypatch.setattr(bench_train, "with_data", lambda *_: tiny_config(data))
    flags = ["--ranks", "2", "--saves", "1", "--width", "64", "--layers", "1"]
    assert bench(["save", *flags, "--out", str(tmp_path), "--json", "-"]) == 0
    said = capsys.readouterr()
    numbers = json.loads(said.out)
    (row,) = numbers["rows"]
    assert len(row["background"]) == len(row["synchronous"]) == 1
    assert row["background_steps"][0] >= 2  # one to write beside, one to publish beside
    assert row["synchronous_steps"] == [0]
    assert row["synchronous_later_s"] >= row["synchronous_s"] > 0
    assert row["ratio"] == pytest.approx(row["background_s"] / row["synchronous_s"])
    # Weights, and three numbers of the optimiser for each.
    assert row["checkpoint_bytes"] > 16 * numbers["sizes"]["parameters"]
    assert "a step waits" in said.err
    assert list(tmp_path.iterdir()) == []


def test_what_metrics_cost_is_measured(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.json"
    config = tiny_config(data, train={"micro_batch": 4}, metrics={"address": "127.0.0.1"})
    settings.write_text(to_json(config))
    assert bench(["metrics", "--config", str(settings), "--steps", "20", "--json", "-"]) == 0
    said = capsys.readouterr()
    numbers = json.loads(said.out)
    (row,) = numbers["rows"]
    assert row["steps"] == 25  # whole blocks
    assert row["ratio"] == row["on_s"] / row["off_s"]
    assert row["ratio_scraped"] == row["on_scraped_s"] / row["on_s"]
    assert 0.1 < row["ratio_of_neighbours"] < 10
    assert 0 < row["monitor_s"] < row["on_s"]
    assert row["scrapes"] > 1
    assert row["scraped_s"] > 0
    assert "with metrics / without" in said.err


def test_a_rank_that_fails_is_told(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data)
    config = replace(config, data=replace(config.data, train=str(data / "nowhere")))
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(config))
    assert bench(["train", "--config", str(settings), "--ranks", "1"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_fewer_ranks_take_more_pairs_each(data: Path) -> None:
    config = tiny_config(data, train={"micro_batch": 4, "global_batch": 24})
    assert [shared_out(config, ranks, 3).train.micro_batch for ranks in (1, 2, 3)] == [12, 6, 4]
    with pytest.raises(ValueError, match=r"--ranks 5: cannot share out the 12 pairs"):
        shared_out(config, 5, 3)
    cached = tiny_config(data, train={"micro_batch": 4, "gradient_cache": True})
    assert shared_out(cached, 1, 2) == cached


def test_rows_and_table_of_known_numbers() -> None:
    alone = {"by_rank": [[{"encode": 3.0, "backward": 1.0}, {"encode": 5.0, "backward": 3.0}]]}
    two = {"by_rank": [[{"encode": 2.0, "gather": 1.0}], [{"encode": 3.0, "gather": 0.0}]]}
    found = rows({1: alone, 2: two}, 12)
    assert [row["step_s"] for row in found] == [6, 3]
    assert [row["efficiency"] for row in found] == [1, 1]
    assert found[0]["shares"]["encode"] == pytest.approx(8 / 12)
    assert found[1]["shares"]["gather"] == pytest.approx(1 / 6)
    sizes = {"global_batch": 12, "parameters": 2_000_000, "device": "cpu", "threads": 1}
    shown = io.StringIO()
    Console(width=80, file=shown).print(table(found, sizes))
    said = [line.split() for line in shown.getvalue().splitlines()]
    assert ["encode", "4000.0", "ms", "66.7%", "2500.0", "ms", "83.3%"] in said
    assert ["efficiency", "1.00", "1.00"] in said


def test_a_save_is_as_long_as_its_slowest_rank() -> None:
    def saves(*found: tuple[float, float, int]) -> list[dict[str, float]]:
        return [{"waited_s": w, "seconds": s, "steps": n} for w, s, n in found]

    of_ranks = [
        {"background": saves((1, 12, 2), (3, 14, 2)), "synchronous": saves((30, 30, 0), (9, 9, 0))},
        {"background": saves((2, 12, 2), (2, 14, 2)), "synchronous": saves((9, 9, 0), (20, 20, 0))},
    ]
    by_rank = [{**mine, "step_s": [4.0, 5.0, 6.0]} for mine in of_ranks]
    row = save_row({"by_rank": by_rank, "checkpoint_bytes": 7})
    assert (row["background"], row["synchronous"]) == ([2, 3], [30, 20])
    assert row["ratio"] == 0.1
    # Two steps of 5 s would have been done after 10 s.
    assert (row["background_later"], row["synchronous_later"]) == ([2, 4], [30, 20])
    assert row["later_ratio"] == 3 / 25


class Event:
    """One of a GPU's queue that has come to what was recorded before `Event.now`."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        Event.recorded = self.at = Event.recorded + 1.0

    def query(self) -> bool:
        return self.at <= Event.now

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return 1000 * (other.at - self.at)

    recorded = 0.0


def test_what_a_gpu_has_not_come_to_is_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: pytest.fail("it waits"))
    watch = Laps(torch.device("cuda"))  # at 1
    for part in ("encode", "backward", "encode"):  # at 2, 3, 4
        watch.lap(part)
    assert watch.take_known() == {}
    Event.now = 3.0
    assert watch.take_known() == {"encode": 1.0, "backward": 1.0}
    assert watch.take_known() == {}
    watch.lap("loss")  # at 5
    Event.now = 5.0
    assert watch.take_known() == {"encode": 1.0, "loss": 1.0}


@pytest.mark.gpu
def test_laps_of_a_gpu_are_known_without_waiting() -> None:
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    watch = Laps(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            x = (x @ x).tanh()
        watch.lap("encode")
        known = watch.take_known()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    known = {**watch.take_known(), **known}
    assert known["encode"] > 0


def test_laps_add_up_to_all_the_time_there_was() -> None:
    started = time.perf_counter()
    watch = Laps(torch.device("cpu"))
    for part in ("encode", "backward", "encode"):
        time.sleep(0.01)
        watch.lap(part)
    taken, whole = watch.take(), time.perf_counter() - started
    assert list(taken) == ["encode", "backward"]
    assert taken["backward"] >= 0.01
    assert taken["encode"] >= 0.02
    assert sum(taken.values()) <= whole
    watch.lap("loss")
    assert list(watch.take()) == ["loss"]
