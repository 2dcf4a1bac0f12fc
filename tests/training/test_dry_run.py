"""`tvr train --dry-run`: its arithmetic, its estimates against measurements, and its step."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_folders import write_clip
from builders.exhaustive import principal_and_further
from builders.tiny import MAX_WORDS, tiny_config

from tvr.data_prep.records import Batch
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.distributed.world import join_world
from tvr.trainer.dry_run import dry_run, synthetic_step
from tvr.trainer.dry_run.synthetic_step import (
    random_batches,
    run_synthetic_step,
    single_rank_config,
)
from tvr.trainer.engine.engine import Engine
from tvr.trainer.memory.model_memory import (
    AllocationTracker,
    activation_bytes,
    checkpoint_bytes,
    model_bytes,
)
from tvr.trainer.model.model import (
    build_meta_model,
    build_model,
    checkpoint_activations,
    model_inputs,
)
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return load_tokenizer(data / "tokenizer", MAX_WORDS)


@pytest.fixture(autouse=True)
def wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def line_for(config: Config, folder: Path, *flags: str) -> list[str]:
    settings = folder / "settings.json"
    settings.write_text(to_json(config))
    return ["--config", str(settings), "--run-dir", str(folder / "run"), "--dry-run", *flags]


def rows_of(text: str) -> dict[str, str]:
    """Returns the values of the tables by row name."""
    parts = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    return {part[0]: part[1] for part in parts if len(part) == 2}


def test_a_dry_run_computes_runs_a_step_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        data,
        train={"steps": 12, "global_batch": 24, "micro_batch": 4, "warmup_steps": 3},
        checkpoint={"every": 4, "keep_last": 1, "keep_best": False},
    )
    assert tvr_train(line_for(config, tmp_path, "--ranks", "2")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[f"data.train: {data}/train"].split() == ["48", "144", "5"]
    assert rows["pairs per step"] == "24 = 4 per micro-batch x 2 ranks x 3 micro-steps"
    assert rows["pairs per loss"] == "8: 7 negatives for each caption"
    assert rows["steps per epoch"] == "2.00 (48 samples)"
    assert rows["epochs"] == "6.00"
    assert rows["1 (0%)"].split()[0] == "0.000333"
    assert rows["7 (50%)"].split()[0] == "0.00075"
    assert rows["saved"] == "3, every 4 steps"
    assert rows["kept at most"].startswith("1: ")
    assert "one step of 12 random pairs on a single rank" in rows
    assert float(rows["gradient_norm"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_preflight_problems_are_printed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def problems() -> str:
        assert tvr_train(line_for(tiny_config(data), tmp_path)) == 0
        return capsys.readouterr().out.split("problems that would stop a run on this machine")[1]

    assert problems().split("one step of")[0].split()[-1] == "nothing"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("no folder")
    assert "run/checkpoints cannot be used for checkpoints" in problems().replace("\n", "")


def test_the_gradient_cache_counts_all_pairs_as_negatives(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data, train={"global_batch": 24, "micro_batch": 4, "gradient_cache": True})
    assert tvr_train(line_for(config, tmp_path)) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["pairs per loss"] == "24: 23 negatives for each caption"


def test_without_data_the_given_samples_are_used(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data, data={"train": str(tmp_path / "nowhere")})
    assert tvr_train(line_for(config, tmp_path)) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[f"data.train: {tmp_path}/nowhere"] == "missing"
    assert rows["steps per epoch"].startswith("unknown")
    assert "epochs" not in rows
    assert tvr_train(line_for(config, tmp_path, "--samples", "80")) == 0
    assert rows_of(capsys.readouterr().out)["steps per epoch"] == "10.00 (80 samples)"


@pytest.mark.parametrize(
    ("overrides", "flags", "message"),
    [
        ({}, ("--samples", "9"), "--samples 9 is for a training set that does not exist"),
        ({}, ("--ranks", "3"), "train.global_batch=8 must be a multiple"),
        ({}, ("--ranks", "0"), "--ranks 0 must be at least 1"),
        ({"model": {"tokenizer": "nowhere"}}, (), "tokenizer folder nowhere holds neither"),
        ({"model": {"pretrained": "nowhere"}}, (), "model.pretrained='nowhere'"),
        ({"data": {"content_words": True}}, (), "data.content_words needs the words"),
        ({"train": {"precision": "bf16", "zero_stage": 0}}, (), "needs train.zero_stage >= 1"),
    ],
)
def test_settings_that_cannot_run_end_with_code_2(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert tvr_train(line_for(tiny_config(data, **overrides), tmp_path, *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("tvr train: error: ")


def test_its_flags_need_dry_run_and_a_launcher_is_refused(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = line_for(tiny_config(data), tmp_path)
    real = [word for word in line if word != "--dry-run"]
    assert tvr_train([*real, "--ranks", "2"]) == 2
    assert "--ranks 2 needs --dry-run" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert tvr_train(line) == 2
    assert "omit `tvr launch`" in capsys.readouterr().err


def test_too_little_memory_is_printed_instead_of_a_step(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dry_run, "free_bytes", lambda: 100_000)
    assert tvr_train(line_for(tiny_config(data), tmp_path)) == 0
    assert "No step was run: a single rank would need" in capsys.readouterr().out


def test_a_clip_b32_runs_a_real_step_of_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_clip(tmp_path / "clip", "base-patch32", weights=True)
    flags = ["--train.global-batch", "2", "--train.micro-batch", "2", "--model.pretrained", folder]
    line = ["--recipe", "msrvtt_b32", "--run-dir", str(tmp_path / "run"), "--dry-run", *flags]
    assert tvr_train(line) == 0
    rows = rows_of(capsys.readouterr().out)
    assert float(rows["gradient_norm"]) > 0
    assert float(rows["loss"]) > 0
    assert not (tmp_path / "run").exists()


def test_the_step_is_deterministic(data: Path, tokenizer: Tokenizer) -> None:
    config = tiny_config(data, train={"global_batch": 8, "micro_batch": 4})
    first, second = (run_synthetic_step(config, tokenizer) for _ in range(2))
    assert first.loss == second.loss
    assert first.gradient_norm == second.gradient_norm
    assert first.gradient_norm is not None
    assert first.gradient_norm > 0
    assert first.tpm_cl_loss is not None
    assert first.tpm_cl_loss > 0


@pytest.mark.parametrize("mode", ["log", "reference"])
def test_a_step_of_equal_captions_has_no_negatives_in_log_mode(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config = tiny_config(
        data, loss={"neg_nce_mode": mode}, train={"global_batch": 8, "micro_batch": 4}
    )

    def equal_captions(*arguments: Any) -> Iterator[Batch]:
        for batch in random_batches(*arguments):
            yield replace(batch, caption_ids=torch.zeros_like(batch.caption_ids))

    different = run_synthetic_step(config, tokenizer)
    assert different.similarity_loss > 0
    monkeypatch.setattr(synthetic_step, "random_batches", equal_captions)
    equal = run_synthetic_step(config, tokenizer)
    if mode == "log":
        assert (equal.similarity_loss, equal.equal_captions_per_row) == (0.0, 3.0)
        assert different.equal_captions_per_row == 0.0
    else:
        assert equal.similarity_loss == different.similarity_loss
        assert equal.equal_captions_per_row is None


def test_random_batches_have_no_padding_and_no_repeated_video(
    data: Path, tokenizer: Tokenizer
) -> None:
    config = tiny_config(data, data={"content_words": True})
    batches = random_batches(config.data, config.model, config.train, tokenizer)
    first, second = next(batches), next(batches)
    assert first.frames.shape == (8, 3, 3, 16, 16)
    assert first.token_ids.shape == first.word_mask.shape == (8, MAX_WORDS)
    assert set(first.word_mask.unique().tolist()) == {1, 2}
    assert not set(first.video_ids.tolist()) & set(second.video_ids.tolist())
    assert single_rank_config(config, 4).train.global_batch == 2


@pytest.mark.parametrize(("frames", "again"), [(3, False), (12, False), (12, True)])
def test_estimated_activations_bound_measured_ones(
    data: Path, tokenizer: Tokenizer, frames: int, again: bool
) -> None:
    shape = {"width": 128, "heads": 4, "layers": 4, "image_size": 64}
    config = tiny_config(
        data,
        data={"num_frames": frames},
        model={"towers": shape},
        train={"activation_checkpointing": again},
    )
    config = replace(config, loss=replace(config.loss, tpm_cl=0))
    model = build_model(config.model, config.loss, tokenizer, num_frames=frames)
    if again:
        checkpoint_activations(model)
    inputs = model_inputs(
        next(random_batches(config.data, config.model, config.train, tokenizer)),
        torch.device("cpu"),
    )
    with AllocationTracker(model.parameters()) as tracker:
        features = model(*inputs)
        forward = tracker.peak
        sum(x.sum() for x in features if x is not None and x.grad_fn).backward()  # pyright: ignore[reportAttributeAccessIssue]
    gradients = sum(4 * p.numel() for p in model.parameters())
    measured = max(forward, tracker.peak - gradients)
    assert measured > 5e6
    # An upper bound, because it counts attention scores as kept; close to it at this length.
    estimated = activation_bytes(config, tokenizer)
    assert measured <= estimated < 1.15 * measured
    if again:
        whole = replace(config, train=replace(config.train, activation_checkpointing=False))
        assert estimated < 0.5 * activation_bytes(whole, tokenizer)


STAGES = [("fp32", stage) for stage in range(4)] + [("bf16", stage) for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    ("precision", "stage"),
    principal_and_further(STAGES, [("fp32", 0), ("fp32", 3), ("bf16", 2)]),
)
def test_a_checkpoint_has_the_estimated_size(
    data: Path, tokenizer: Tokenizer, precision: str, stage: int
) -> None:
    config = tiny_config(
        data,
        model={"towers": {"width": 128, "embed_width": 64}},
        train={"precision": precision, "zero_stage": stage},
    )
    parts = {"num_frames": config.data.num_frames}
    with join_world() as world:
        model = build_model(config.model, config.loss, tokenizer, **parts)
        engine = Engine(model, config.train, world)
        batch = next(random_batches(config.data, config.model, config.train, tokenizer))
        features = engine.encode(*model_inputs(batch, world.device))
        engine.backward(features.sentence.float().sum() + features.frames.float().sum())
        engine.step(1.0)
        saved = 0
        for value in engine.state_dict().values():
            torch.save(value, buffer := io.BytesIO())
            saved += buffer.tell()
    outline = build_meta_model(config.model, config.loss, tokenizer, **parts)
    assert checkpoint_bytes(outline, config.train) == pytest.approx(saved, rel=0.05)


def test_states_are_partitioned_by_the_zero_stage(data: Path, tokenizer: Tokenizer) -> None:
    def of(stage: int, ranks: int, precision: str = "fp32", sums: str = "fp32") -> tuple[Any, ...]:
        changes = {"zero_stage": stage, "precision": precision, "accumulation_dtype": sums}
        config = tiny_config(data, train=changes)
        needs = model_bytes(config, tokenizer, ranks)
        outline = build_meta_model(config.model, config.loss, tokenizer, num_frames=3)
        numbers = sum(parameter.numel() for parameter in outline.parameters())
        states = (needs.weights, needs.gradients, needs.optimiser)
        weights, gradients, optimiser = (size / numbers for size in states)
        return round(weights, 2), round(gradients, 2), round(optimiser, 2)

    assert of(0, 4) == (4, 4, 8)
    assert of(1, 4) == (4, 4, 3)
    assert of(2, 4) == (4, 1, 3)
    assert of(3, 4) == (1, 1, 3)
    # The sums of gradients are fp32, and at stage 1 every rank holds them whole.
    assert of(1, 4, "bf16") == (2, 4, 3)
    assert of(1, 1, "bf16") == (2, 4, 12)
    assert of(2, 4, "bf16") == (2, 1, 3)
    assert of(3, 4, "bf16") == (0.5, 1, 3)
    assert of(1, 4, "bf16", "bf16") == (2, 2, 3)
    assert of(2, 4, "bf16", "bf16") == (2, 0.5, 3)
