"""Whole runs through the command line: sample order, resume, and failures."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.exhaustive import further
from builders.tiny import damaged_data, tiny_config, with_ranks

from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.engine.engine import consolidated_weights


@dataclass(frozen=True)
class Ended:
    returncode: int
    stderr: str


def train(config: Config, run_dir: Path, *, ranks: int = 1, flags: tuple[str, ...] = ()) -> Ended:
    """Runs `tvr train`: one rank in this process, several ranks in forked ones."""
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(with_ranks(config, ranks)))
    if ranks == 1:
        with redirect_stderr(io.StringIO()) as stderr:
            line = ["--config", str(settings), "--run-dir", str(run_dir), *flags]
            return Ended(tvr_train(line), stderr.getvalue())
    assert not flags
    errors = run_dir.with_suffix(".txt")
    code, *others = jobs.run_forked(settings, run_dir, ranks, errors=errors)
    assert code is not None
    assert others == [code] * (ranks - 1)
    return Ended(code, errors.read_text())


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in events(run_dir, "step")]


def keys_by_step(run_dir: Path) -> list[list[str]]:
    """Returns the keys of each micro-step's global batch, in rank order."""
    files = sorted((run_dir / "keys").glob("rank-*.jsonl"))
    ranks = [[json.loads(line)["keys"] for line in file.read_text().splitlines()] for file in files]
    return [[key for keys in step for key in keys] for step in zip(*ranks, strict=True)]


def weights(run_dir: Path, step: int, zero_stage: int = 1) -> dict[str, torch.Tensor]:
    return consolidated_weights(jobs.shards_folder(run_dir, step), zero_stage)


def test_workers_and_ranks_do_not_change_the_samples(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, train={"steps": 20, "log_keys": True}, data={"test": None})
    seen, first_losses = {}, {}
    for ranks, workers in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 2)):
        run_dir = tmp_path / f"ranks-{ranks}-workers-{workers}"
        settings = replace(config, data=replace(config.data, workers=workers))
        done = train(settings, run_dir, ranks=ranks)
        assert done.returncode == 0, done.stderr
        seen[ranks, workers] = keys_by_step(run_dir)
        first_losses[ranks, workers] = losses(run_dir)
    assert len(seen[1, 0]) == 20
    assert all(len(set(keys)) == 8 for keys in seen[1, 0])
    assert all(keys == seen[ranks, 0] for (ranks, _), keys in seen.items())
    # Ranks divide a micro-step by the place of its samples: its set is the same, not its order.
    assert [sorted(keys) for keys in seen[2, 0]] == [sorted(keys) for keys in seen[1, 0]]
    assert first_losses[1, 1] == first_losses[1, 2] == first_losses[1, 0]
    assert first_losses[2, 2] == first_losses[2, 0]
    # 48 samples, 8 a step: every sample once in the first 6 steps.
    assert len({key for step in seen[1, 0][:6] for key in step}) == 48


@pytest.mark.parametrize("zero_stage", [3, *further(1)])
def test_resumed_equals_uninterrupted_to_the_last_bit(
    data: Path, tmp_path: Path, zero_stage: int
) -> None:
    config = tiny_config(
        data, train={"steps": 6, "zero_stage": zero_stage}, checkpoint={"every": 3}
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(config, whole, ranks=2)
    assert done.returncode == 0, done.stderr
    # The second run copies the first one after step 3, as if killed while it wrote a checkpoint.
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000006")
    (stopped / "checkpoints" / "latest").write_text("step-00000003\n")
    (stopped / "checkpoints" / "step-00000006" / "attempt-000001-0a1b2c3d-2").mkdir(parents=True)
    (stopped / "evaluation.json").unlink()
    done = train(config, stopped, ranks=2)
    assert done.returncode == 0, done.stderr
    assert events(stopped, "resumed")[-1]["step"] == 3
    assert losses(stopped) == losses(whole)
    ours, theirs = weights(stopped, 6, zero_stage), weights(whole, 6, zero_stage)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    old, new = (json.loads((run / "evaluation.json").read_text()) for run in (whole, stopped))
    assert old == new


def test_a_run_of_other_settings_is_refused(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, train={"steps": 1}, data={"test": None})
    run_dir = tmp_path / "run"
    assert train(config, run_dir).returncode == 0
    refused = train(config, run_dir, flags=("--loss.margin", "0.2"))
    assert refused.returncode == 2
    assert "loss.margin was 0.6, is 0.2" in refused.stderr
    again = train(config, run_dir, flags=("--data.workers", "1"))
    assert again.returncode == 0, again.stderr
    assert len(losses(run_dir)) == 1  # the run was complete
    refused = train(config, run_dir, flags=("--train.micro-batch", "4"))
    assert refused.returncode == 2
    assert "was 8 x 1 = 8, is 4 x 1 = 4" in refused.stderr
    assert train(config, run_dir, flags=("--train.zero-stage", "2")).returncode == 0
    refused = train(config, run_dir, flags=("--resume", "never"))
    assert refused.returncode == 2
    assert "holds step-00000001 and --resume is never" in refused.stderr


def test_settings_may_change_before_the_first_checkpoint(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, train={"steps": 1}, data={"test": None})
    run_dir = tmp_path / "run"
    assert train(config, run_dir, flags=("--data.num-frames", "9")).returncode == 2
    assert train(config, run_dir).returncode == 0


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_step(
    data: Path, tmp_path: Path
) -> None:
    # At this learning rate the first step makes the weights overflow, so the second loss is NaN.
    config = tiny_config(
        data,
        train={
            "steps": 5,
            "learning_rate": 1e30,
            "encoder_learning_rate": 1e30,
            "log_keys": True,
        },
        data={"test": None},
        checkpoint={"every": 1, "background": False},
    )
    run_dir = tmp_path / "run"
    failed = train(config, run_dir, ranks=2)
    assert failed.returncode == 3
    assert failed.stderr.count("step 2: the loss is not finite on rank 0, 1 of 2") == 1
    assert " ".join(keys_by_step(run_dir)[1][:4]) in failed.stderr
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_accumulation_uses_the_same_samples_in_smaller_batches(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data,
        train={"steps": 2, "log_keys": True},
        data={"test": None},
    )
    run_dir = tmp_path / "run"
    done = train(config, run_dir, flags=("--train.micro-batch", "4"))
    assert done.returncode == 0, done.stderr
    micro_steps = keys_by_step(run_dir)
    assert [len(keys) for keys in micro_steps] == [4, 4, 4, 4]
    assert [event["step"] for event in events(run_dir, "step")] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.train", "nowhere"), "nowhere"),
        (("--model.tokenizer", "nowhere"), "tokenizer folder nowhere"),
        (("--model.pretrained", "nowhere"), "nowhere"),
        (("--train.micro-batch", "3"), "global_batch=8 must be a multiple"),
        (("--data.num-frames", "9"), "num_frames=9 must be from 1 to 3"),
        (("--train.precision", "bf16", "--train.zero-stage", "0"), "zero_stage >= 1"),
    ],
)
def test_bad_settings_end_with_code_2_and_a_line_that_names_them(
    data: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    refused = train(tiny_config(data), tmp_path / "run", flags=flags)
    assert refused.returncode == 2
    assert refused.stderr.startswith("tvr train: error: ")
    assert message in refused.stderr


def test_a_bad_sample_is_replaced_and_logged(data: Path, tmp_path: Path) -> None:
    folder, (key,) = damaged_data(data, tmp_path / "damaged", rows=[17])
    config = tiny_config(
        data,
        data={"train": str(folder), "test": str(folder), "test_exchanged": None},
        train={"steps": 6, "log_keys": True, "eval_every": 3},  # one epoch
    )
    done = train(config, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (replaced,) = events(tmp_path / "run", "replaced")
    assert (replaced["key"], replaced["reason"]) == (key, "checksum")
    left_out = [(event["step"], event["key"]) for event in events(tmp_path / "run", "left_out")]
    assert left_out == [(3, key), (6, key)]
    seen = [name for step in keys_by_step(tmp_path / "run") for name in step]
    assert len(seen) == 48
    assert key not in seen


def test_the_log_reports_how_a_checkpoint_was_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, data={"test": None, "test_exchanged": None}, train={"steps": 1})
    off = replace(config, checkpoint=replace(config.checkpoint, background=False))

    def checkpoint_line(name: str, config: Config) -> tuple[bool, str | None]:
        done = train(config, tmp_path / name)
        assert done.returncode == 0, done.stderr
        (saved,) = events(tmp_path / name, "saved")
        return saved["background"], saved.get("no_room")

    assert checkpoint_line("beside", config) == (True, None)
    assert checkpoint_line("off", off) == (False, None)
    monkeypatch.setattr(
        "tvr.trainer.checkpoint.saver.staging_shortage", lambda state, world: "the node is small"
    )
    assert checkpoint_line("full", config) == (False, "the node is small")


def test_too_many_bad_samples_on_one_rank_stop_all(data: Path, tmp_path: Path) -> None:
    folder, (key,) = damaged_data(data, tmp_path / "damaged", rows=[17])
    config = tiny_config(
        data,
        data={"train": str(folder), "test": None, "max_bad": 0},
        train={"steps": 6},
    )
    failed = train(config, tmp_path / "run", ranks=2)
    assert failed.returncode == 3
    # All ranks raise the error; the first one reports it.
    assert failed.stderr.count(f"1 bad samples in {folder} on rank") == 1
    assert failed.stderr.count(f"{key}: checksum") == 1
