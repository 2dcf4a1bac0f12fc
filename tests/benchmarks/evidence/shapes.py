"""Runs on the shapes: a warm-up for each seed, and from its weights every row by `tvr train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence.rows import DMAE, FIRST, ROWS, nested, slug
from evidence.shapes_data import MAX_WORDS, NUM_FRAMES, data_of
from tvr_bench.harness import MeasurementFailed

from tvr.trainer.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TowersConfig,
    TrainConfig,
    from_json,
    merged,
    to_json,
)

# Every row has these parts; those of TPM-CL are new where it is on.
COMMON_PARTS = ("towers", "sequence_header", "text_weight", "frame_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesRuns:
    """Folders, steps and test set of the runs."""

    data: Path
    out: Path
    image_size: int = 32
    warm_steps: int = 600
    bridge_steps: int = 250
    """Steps of InfoNCE on att_wti after the warm-up on wti, so that words are trained as well."""
    steps: int = 30
    starts: int = 2
    """Warm-ups; seed s starts from warm-up s modulo their number."""
    global_batch: int = 512
    tested_on: str = "test"
    """The split `test`, or `tune` for the choice of settings."""


def base(runs: ShapesRuns) -> Config:
    """The settings that all rows share; chosen on the split `tune`, see README.md."""
    exchanged = str(data_of(runs.data, "exchanged")) if runs.tested_on == "test" else None
    return Config(
        data=DataConfig(
            train=str(data_of(runs.data, "train")),
            test=str(data_of(runs.data, runs.tested_on)),
            test_exchanged=exchanged,
            num_frames=NUM_FRAMES,
            max_words=MAX_WORDS,
            workers=0,
            cache_mib=512,
        ),
        model=ModelConfig(
            tokenizer=str(runs.data / "tokenizer"),
            towers=TowersConfig(
                width=64,
                layers=2,
                heads=2,
                embed_width=64,
                image_size=runs.image_size,
                patch_size=8,
            ),
            sequence_header_layers=2,
        ),
        loss=LossConfig(temperature=0.02, mask_same_video=True, mask_equal_captions=True),
        train=TrainConfig(
            steps=runs.steps,
            global_batch=runs.global_batch,
            micro_batch=runs.global_batch,
            learning_rate=1e-3,
            encoder_learning_rate=1e-3,
            warmup_steps=5,
            weight_decay=0.05,
        ),
    )


def run_dir_of(runs: ShapesRuns, name: str, seed: int) -> Path:
    """Folder of a run."""
    return runs.out / f"{slug(name)}-{seed}"


def warm_up(runs: ShapesRuns, seed: int) -> Path:
    """The run whose weights all rows of a seed start from: InfoNCE at batch 128.

    First on `wti`, then on `att_wti`: both similarities of the primary comparison are trained.
    """
    seed %= runs.starts
    settings = {
        "train.global_batch": 128,
        "train.micro_batch": 128,
        # The rows do not repeat the order of its samples.
        "train.seed": 1000 + seed,
    }
    warm = {
        **ROWS[FIRST],
        **settings,
        "train.steps": runs.warm_steps,
        "train.warmup_steps": min(50, runs.warm_steps),
    }
    first = trained(runs, "warm-up", seed, warm)
    bridge = {
        **ROWS[DMAE],
        **settings,
        "train.seed": 2000 + seed,
        "train.steps": runs.bridge_steps,
        "model.init_from": str(first),
    }
    return trained(runs, "bridge", seed, bridge)


def train_row(runs: ShapesRuns, row: str, seed: int, more: Mapping[str, Any] | None = None) -> Path:
    """Trains a row from the warm-up's weights, unless it is there already; returns its folder.

    Args:
        more: Settings beside the row's own, for the choice of settings.
    """
    settings = {
        **ROWS[row],
        "train.seed": seed,
        "model.init_from": str(warm_up(runs, seed)),
        "model.init_parts": COMMON_PARTS,
        **(more or {}),
    }
    name = row + "".join(
        f" {key.rpartition('.')[2]} {value}" for key, value in (more or {}).items()
    )
    return trained(runs, name, seed, settings)


def trained(runs: ShapesRuns, name: str, seed: int, settings: Mapping[str, Any]) -> Path:
    """One `tvr train` on one core, skipped if its evaluation is there.

    Raises:
        MeasurementFailed: the run ended with an error; names its log.
        ValueError: a finished run of this name has other settings.
    """
    run_dir = run_dir_of(runs, name, seed)
    config = merged(base(runs), nested(settings), where=name)
    if (run_dir / "evaluation.json").exists():
        stored = from_json((run_dir / "config.json").read_text(), where=str(run_dir))
        if stored != config:
            raise ValueError(f"{run_dir} holds a run of other settings: remove it, or give --out")
        return run_dir
    runs.out.mkdir(parents=True, exist_ok=True)
    file = run_dir.with_suffix(".json")
    file.write_text(to_json(replace(config)))
    line = [sys.executable, "-m", "tvr.launchers.cli", "train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["DS_ACCELERATOR"] = "cpu"
    log = run_dir.with_suffix(".log")
    with open(log, "w") as stream:
        command = [*line, "--run-dir", str(run_dir)]
        done = subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False)
    if done.returncode:
        raise MeasurementFailed(f"{name}, seed {seed}: exit code {done.returncode}; see {log}")
    return run_dir


def outcome(run_dir: Path) -> dict[str, Any]:
    """Ranks by key of the clip, binding accuracy, and means over the last steps of a run."""
    found = json.loads((run_dir / "evaluation.json").read_text())
    events = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    hard = [x["hard_negatives_per_row"] for x in steps[-20:]]
    hard = [x for x in hard if x is not None]
    return {
        "text_to_video": {query["key"]: query["rank"] for query in found["queries"]},
        "video_to_text": {query["key"]: query["rank"] for query in found["video_queries"]},
        "binding_accuracy": found["binding_accuracy"],
        "hard_negatives_per_row": sum(hard) / len(hard) if hard else None,
        "train_s": steps[-1]["trained_s"],
    }
