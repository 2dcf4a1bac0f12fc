"""Synthetic runs for tests of the pages: log events, settings and run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tvr.trainer.config import Config, DataConfig, TrainConfig, merged, to_json

STEPS = 4
_SAVED = {"event": "saved", "num_bytes": 1000, "held_up_s": 0.5, "seconds": 2.0}
_DIRECTION = {
    "recall_at_1": 51.25,
    "recall_at_5": 88.5,
    "recall_at_10": 97.0,
    "median_rank": 1.0,
    "mean_rank": 2.345,
}


def settings(**overrides: Any) -> Config:
    """Returns settings of a run of `STEPS` steps."""
    base = Config(
        data=DataConfig(train="train", test="test", num_frames=3),
        train=TrainConfig(steps=STEPS, global_batch=8, micro_batch=8),
    )
    return merged(base, overrides, where="test")


def write_run(folder: Path, *events: dict[str, Any], **overrides: Any) -> Path:
    """Writes config.json and log.jsonl of a run, and returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(settings(**overrides)))
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def step_event(number: int, **changed: Any) -> dict[str, Any]:
    """Returns the log event of a step; steps are 60 s apart."""
    event = {
        "event": "step",
        "step": number,
        "epoch": number / 10,
        "time_s": 60.0 * number,
        "loss": 4.0 / number,
        "similarity_loss": 3.0 / number,
        "tpm_cl_loss": 1.0 / number,
        "penalty": 0.1,
        "hard_negatives_per_row": 2.0,
        "clamped_share": None,
        "learning_rate": 1e-3,
        "encoder_learning_rate": 1e-4,
        "gradient_norm": None,
        "samples_per_s": 100.0,
        "data_wait_s": 0.1,
        "step_s": 1.0,
    }
    return event | changed


def evaluation_event(number: int, **changed: Any) -> dict[str, Any]:
    """Returns the log event of an evaluation, at the time of its step."""
    event = {
        "event": "evaluation",
        "step": number,
        "time_s": 60.0 * number,
        "videos": 200,
        "captions": 240,
        "text_to_video": _DIRECTION,
        "video_to_text": _DIRECTION | {"recall_at_1": 42.5},
        "binding_accuracy": 66.5,
    }
    return event | changed


def save_event(number: int, **changed: Any) -> dict[str, Any]:
    """Returns the log event of a save, 1 s after its step."""
    return {**_SAVED, "step": number, "time_s": 60.0 * number + 1, **changed}


def query(rank: int, caption: str = "a caption", key: str = "right") -> dict[str, Any]:
    """Returns a test query of evaluation.json, with the five most similar clips."""
    top = [{"key": f"clip-{place}", "similarity": 0.5 - place / 10} for place in range(5)]
    if rank <= 5:
        top[rank - 1]["key"] = key
    return {"caption": caption, "key": key, "rank": rank, "top": top}
