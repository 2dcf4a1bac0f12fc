"""Training on stored outputs of frozen towers equals training on the videos to the last bit."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.tiny import damaged_data, tiny_config, with_ranks

from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.engine.engine import consolidated_weights

TRAIN = {"steps": 4, "log_keys": True, "eval_every": 2}


def train(config: Config, run_dir: Path, ranks: int = 1) -> tuple[int, str]:
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(with_ranks(config, ranks)))
    if ranks == 1:
        with redirect_stderr(io.StringIO()) as stderr:
            code = tvr_train(["--config", str(settings), "--run-dir", str(run_dir)])
        return code, stderr.getvalue()
    errors = run_dir.with_suffix(".txt")
    code, *_ = jobs.run_forked(settings, run_dir, ranks, errors=errors)
    assert code is not None
    return code, errors.read_text()


def with_features(config: Config, folder: Path | None, **changes: Any) -> Config:
    data = replace(config.data, features=None if folder is None else str(folder), **changes)
    return replace(config, data=data)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a run without times."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    timed = ("time_s", "seconds")
    return [
        {k: v for k, v in line.items() if k not in timed} for line in lines if line["event"] == kind
    ]


def result(run_dir: Path, step: int = 4) -> tuple[Any, ...]:
    steps = [(each["step"], each["loss"], each["gradient_norm"]) for each in events(run_dir, "step")]
    weights = consolidated_weights(jobs.shards_folder(run_dir, step), 1)
    bits = {name: value.numpy().tobytes() for name, value in weights.items()}
    keys = sorted(file.read_text() for file in (run_dir / "keys").iterdir())
    return steps, bits, keys, events(run_dir, "evaluation"), events(run_dir, "replaced")


def test_training_equals_that_from_videos_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, model={"freeze": "both"}, train=TRAIN)
    folder = tmp_path / "features"
    for ranks in (1, 2):
        video, stored = tmp_path / f"video-{ranks}", tmp_path / f"stored-{ranks}"
        assert train(config, video, ranks)[0] == 0
        code, text = train(with_features(config, folder), stored, ranks)
        assert code == 0, text
        # The first run makes the folder, the second one uses it.
        assert ("features: " in text) == (ranks == 1), text
        assert result(stored) == result(video)
