"""The budget for bad samples covers all ranks and all attempts of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import jobs
from builders.tiny import damaged_data, tiny_config, with_ranks

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.order import SampleOrder
from tvr.data_prep.records import TooManyBadSamples
from tvr.trainer.config import Config, to_json
from tvr.trainer.loop import train

GLOBAL_BATCH = 8


def settings(folder: Path, data: Path, max_bad: int, **changes: Any) -> Config:
    return tiny_config(
        data,
        data={"train": str(folder), "test": None, "test_exchanged": None, "max_bad": max_bad},
        checkpoint={"every": 1, "keep_last": 12},
        **changes,
    )


def rows_at(data: Path, positions: list[int]) -> list[int]:
    """Rows of the data set that the first epoch reads at these positions."""
    order = SampleOrder(read_manifest(str(data / "train")).shard_sizes, 0)
    return [order.locate(position).sample for position in positions]


def with_budget(config: Config, max_bad: int) -> Config:
    return replace(config, data=replace(config.data, max_bad=max_bad))


def test_resumed_run_continues_the_count(data: Path, tmp_path: Path) -> None:
    # In both epochs, steps 2 and 5 of 6 read a bad sample.
    rows = rows_at(data, [GLOBAL_BATCH + 1, 4 * GLOBAL_BATCH + 1])
    folder, keys = damaged_data(data, tmp_path / "damaged", rows=rows)
    config = settings(folder, data, 2, train={"steps": 12})
    whole, resumed, spent = (tmp_path / name for name in ("whole", "resumed", "spent"))
    train(config, whole)
    replaced = [(event["step"], event["key"]) for event in jobs.events(whole, "replaced")]
    assert replaced[:2] == [(2, keys[0]), (5, keys[1])]
    assert sorted(key for _, key in replaced[2:]) == sorted(keys)
    for run_dir in (resumed, spent):
        jobs.copy_run_at_step(3, whole, run_dir)
    # The first sample is already counted; the second one exceeds a budget of 1.
    train(config, resumed)
    assert [step["quarantined"] for step in jobs.events(resumed, "step")][-1] == 2
    assert jobs.losses(resumed) == jobs.losses(whole)
    with pytest.raises(TooManyBadSamples, match=rf"2 bad samples .* max_bad=1 .*{keys[1]}"):
        train(with_budget(config, 1), spent)
    assert jobs.steps_logged(spent) == 4


def test_budget_covers_all_ranks(data: Path, tmp_path: Path) -> None:
    # One bad sample on each of two ranks, both in the second step.
    rows = rows_at(data, [GLOBAL_BATCH + 1, GLOBAL_BATCH + 5])
    folder, _ = damaged_data(data, tmp_path / "damaged", rows=rows)
    config = with_ranks(settings(folder, data, 2, train={"steps": 3}), 2)
    for max_bad, code, steps in ((2, 0, 3), (1, 3, 1)):
        file, run_dir = tmp_path / f"{max_bad}.json", tmp_path / str(max_bad)
        file.write_text(to_json(with_budget(config, max_bad)))
        assert jobs.run_forked(file, run_dir, 2) == [code, code]
        assert jobs.steps_logged(run_dir) == steps
