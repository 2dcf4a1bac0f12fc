"""Recipes: the published numbers, and a dry run of each at its real shapes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from builders.clip_folders import SHAPES, write_clip
from builders.exhaustive import principal_and_further

from tvr.data_prep.annotations.benchmarks import BENCHMARKS
from tvr.trainer.cli import show_config
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import accumulation_steps, from_json
from tvr.trainer.dry_run import dry_run
from tvr.trainer.memory.rank_memory import rank_memory
from tvr.trainer.model.model import build_meta_model
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.recipes.benchmarks import PASSES
from tvr.trainer.recipes.recipes import RECIPES, recipe

# By recipe: benchmark, ranks, steps, frames and words.
BENCHMARK_RECIPES = {
    "msrvtt_b32": ("msrvtt", "train-9k", 4, 7_031, 12, 32),
    "msrvtt_b16": ("msrvtt", "train-9k", 4, 7_031, 12, 32),
    "msvd_b32": ("msvd", "train", 4, 1_875, 12, 32),
    "didemo_b32": ("didemo", "train", 8, 327, 64, 64),
    "activitynet_b32": ("activitynet", "train", 8, 390, 64, 64),
}
RANKS = {name: row[2] for name, row in BENCHMARK_RECIPES.items()} | {"large_scale_l14_64gpu": 64}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of all published shapes by name, with config.json and tokeniser only."""
    return {name: write_clip(tmp_path_factory.mktemp("clip"), name) for name in SHAPES}


@pytest.mark.parametrize("name", BENCHMARK_RECIPES)
def test_steps_are_the_epochs_of_the_published_split(name: str) -> None:
    dataset, split, ranks, steps, frames, words = BENCHMARK_RECIPES[name]
    config, passes = recipe(name), PASSES[name]
    assert passes.videos == BENCHMARKS[dataset][split].published  # pyright: ignore[reportArgumentType]
    assert config.train.steps == steps == passes.videos * passes.epochs // 128
    assert config.train.warmup_steps == steps // 10
    assert (config.data.num_frames, config.data.max_words) == (frames, words)
    assert config.data.train == f"data/{dataset}/{split}"
    assert accumulation_steps(config.train, ranks) == 1  # one loss over all 128 pairs


@pytest.mark.parametrize("name", BENCHMARK_RECIPES)
def test_a_benchmark_is_trained_with_clip4clips_settings(name: str) -> None:
    config = recipe(name)
    train = config.train
    assert (train.encoder_learning_rate, train.learning_rate) == (1e-7, 1e-4)
    assert (train.global_batch, train.weight_decay, train.gradient_clip) == (128, 0.2, 1.0)
    assert (train.beta1, train.beta2, config.loss.temperature) == (0.9, 0.98, 0.01)
    assert (config.data.frame_sampling, config.data.crop_scale) == ("centre", 1.0)
    assert config.data.word_drop
    assert config.data.content_words


def test_the_large_recipe_has_one_loss_for_64_ranks() -> None:
    train, passes = recipe("large_scale_l14_64gpu").train, PASSES["large_scale_l14_64gpu"]
    assert train.steps == 3_051 == passes.videos * passes.epochs // 16_384
    assert train.gradient_cache
    assert accumulation_steps(train, 64) * train.micro_batch * 64 == train.global_batch == 16_384


def test_every_recipe_is_covered_here() -> None:
    assert set(RANKS) | {"demo"} == set(RECIPES)
    assert set(PASSES) == set(RANKS)


@pytest.mark.parametrize(
    "name", principal_and_further(RANKS, ["msrvtt_b32", "large_scale_l14_64gpu"])
)
def test_every_recipe_passes_a_dry_run_at_its_real_shapes(
    name: str,
    clips: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without data sets
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(dry_run, "free_bytes", lambda: 0)
    config = recipe(name)
    folder = clips[str(config.model.pretrained).removeprefix("models/clip-vit-")]
    samples = PASSES[name].videos
    line = ["--recipe", name, "--run-dir", "run", "--model.pretrained", folder, "--dry-run"]
    assert tvr_train([*line, "--ranks", str(RANKS[name]), "--samples", str(samples)]) == 0
    printed = capsys.readouterr().out
    assert f"data.train: {config.data.train}" in printed
    assert "missing" in printed
    pairs = config.train.global_batch
    assert re.search(rf"pairs per loss +{pairs:,}: {pairs - 1:,} negatives", printed)
    epochs = float(re.search(r"^ *epochs +([\d.,]+)", printed, re.MULTILINE)[1].replace(",", ""))  # pyright: ignore[reportOptionalSubscript]
    assert epochs == pytest.approx(PASSES[name].epochs, rel=0.005)
    assert "No step was run: a single rank would need" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SHAPES)
def test_meta_models_have_the_parameters_of_the_published_towers(
    name: str, clips: dict[str, str]
) -> None:
    config = recipe("msrvtt_b32")
    model = replace(config.model, pretrained=clips[name])
    tokenizer = load_tokenizer(clips[name], config.data.max_words)
    model_on_meta = build_meta_model(model, config.loss, tokenizer, num_frames=12)
    towers = (model_on_meta.text_tower, model_on_meta.image_tower)
    assert sum(p.numel() for tower in towers for p in tower.parameters()) == SHAPES[name][-1]
    assert all(parameter.is_meta for parameter in model_on_meta.parameters())


def test_the_large_recipe_fits_its_gpus(clips: dict[str, str]) -> None:
    config = recipe("large_scale_l14_64gpu")
    config = replace(config, model=replace(config.model, pretrained=clips["large-patch14"]))
    tokenizer = load_tokenizer(clips["large-patch14"], config.data.max_words)
    needs = rank_memory(config, tokenizer, 64)
    assert needs.similarity < 5e9
    assert needs.total < 64e9


@pytest.mark.parametrize("name", RECIPES)
def test_show_config_knows_every_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_config(["--recipe", name]) == 0
    assert from_json(capsys.readouterr().out, where="stdout") == recipe(name)


def test_the_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tvr_train(["--recipe", "msrvtt_b16", "--help"])
    assert ended.value.code == 0
    printed = " ".join(re.findall(r"\w+", capsys.readouterr().out))
    assert " ".join(RECIPES) in printed
