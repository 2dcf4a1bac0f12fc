"""Settings: validation by recipe, file and flags, their precedence, and derived numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tvr.trainer.cli import show_config
from tvr.trainer.config import (
    Config,
    DataConfig,
    TowersConfig,
    TrainConfig,
    accumulation_steps,
    from_json,
    merged,
    to_json,
)
from tvr.trainer.recipes.recipes import RECIPES, recipe

SMALL = Config(
    data=DataConfig(train="somewhere"),
    train=TrainConfig(steps=10, global_batch=64, micro_batch=8),
)


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_and_round_trips(name: str) -> None:
    config = recipe(name)
    assert from_json(to_json(config), where=name) == config
    assert config != SMALL


def test_values_that_are_not_defaults_round_trip() -> None:
    config = merged(
        SMALL,
        {
            "data": {"test": "over/there", "workers": 0},
            "model": {"pretrained": "folder", "towers": {"width": 64}, "interaction": "ti"},
            "loss": {"mask_same_video": False, "temperature": 0.07, "margin": 0},
            "train": {"learning_rate": 1.5e-7, "seed": 3, "precision": "bf16"},
        },
        where="here",
    )
    again = from_json(to_json(config), where="there")
    assert again == config
    assert again.model.towers == TowersConfig(width=64)
    assert again.loss.mask_same_video is False
    assert (again.train.seed, again.train.learning_rate) == (3, 1.5e-7)
    assert again.data == replace(SMALL.data, test="over/there", workers=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss": {"margn": 0.2}}, r"loss\.margn: .*given: 0\.2"),
        ({"model": {"towers": {"depth": 3}}}, r"model\.towers\.depth"),
        ({"optimiser": {}}, r"optimiser: "),
        ({"train": {"steps": "many"}}, r"train\.steps: .*integer.*given: 'many'"),
        ({"train": {"steps": 2.5}}, r"train\.steps: .*integer.*given: 2\.5"),
        ({"train": {"steps": "5"}}, r"train\.steps: .*integer.*given: '5'"),
        ({"train": {"steps": True}}, r"train\.steps: .*integer.*given: True"),
        ({"train": {"log_keys": 1}}, r"train\.log_keys: .*boolean.*given: 1"),
        ({"loss": {"margin": "0.3"}}, r"loss\.margin: .*number.*given: '0\.3'"),
        ({"train": {"steps": None}}, r"train\.steps: .*given: None"),
        ({"data": {"train": 5}}, r"data\.train: .*string.*given: 5"),
        ({"loss": 3}, r"loss: .*given: 3"),
        ({"train": {"steps": 0}}, r"train\.steps: .*greater than 0.*given: 0"),
        ({"data": {"workers": -1}}, r"data\.workers: .*greater than or equal to 0"),
        ({"train": {"seed": -1}}, r"train\.seed: .*greater than or equal to 0.*given: -1"),
        ({"data": {"max_words": 2}}, r"data\.max_words: .*greater than or equal to 3"),
        ({"model": {"weight_layers": 4}}, r"model\.weight_layers: .*less than or equal to 3"),
        ({"model": {"interaction": "mean"}}, r"model\.interaction: .*'att_wti'.*given: 'mean'"),
        ({"loss": {"temperature": 0}}, r"loss\.temperature: .*greater than 0"),
        ({"loss": {"mask_threshold": 1.1}}, r"loss\.mask_threshold: .*less than or equal to 1"),
        ({"loss": {"tpm_cl": 5}}, r"loss\.tpm_cl: .*should be 0, 2, 3 or 4"),
        ({"train": {"zero_stage": 4}}, r"train\.zero_stage: .*less than or equal to 3"),
        ({"train": {"precision": "fp16"}}, r"train\.precision: .*'bf16'"),
        ({"train": {"exchange": "tree"}}, r"train\.exchange: .*'gather' or 'ring'.*given: 'tree'"),
        ({"train": {"scores": "drop"}}, r"train\.scores: .*'keep' or 'stream'.*given: 'drop'"),
        ({"train": {"gradient_cache": 1}}, r"train\.gradient_cache: .*boolean.*given: 1"),
    ],
)
def test_an_invalid_setting_is_named_with_its_source(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^some-file: .*{message}"):
        merged(SMALL, overrides, where="some-file")
    stored = asdict(SMALL)
    for name, value in overrides.items():
        stored[name] = stored.get(name, {}) | value if isinstance(value, dict) else value
    if "towers" not in overrides.get("model", {}):  # nested deeper than this plain overlay
        with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
            from_json(json.dumps(stored), where="config.json")


def test_two_errors_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"loss\.margn.*; .*train\.stepz"):
        merged(SMALL, {"loss": {"margn": 1}, "train": {"stepz": 1}}, where="x")


def test_a_missing_setting_and_an_incomplete_file_are_named() -> None:
    stored = asdict(SMALL)
    del stored["train"]["global_batch"]
    with pytest.raises(ValueError, match=r"^old: train\.global_batch: Field required"):
        from_json(json.dumps(stored), where="old")
    with pytest.raises(ValueError, match=r"^torn: .*Invalid JSON"):
        from_json(to_json(SMALL)[:50], where="torn")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        SMALL.train.steps = 5  # pyright: ignore[reportAttributeAccessIssue]


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> Config:
    assert show_config(list(flags)) == 0
    return from_json(capsys.readouterr().out, where="stdout")


def test_flags_override_the_file_and_the_file_the_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(
        json.dumps(
            {
                "loss": {"margin": 0.3, "temperature": 0.05},
                "model": {"towers": {"layers": 5}},
                "train": {"steps": 7},
            }
        )
    )
    assert shown(capsys) == recipe("demo")
    assert shown(capsys, "--recipe", "demo") == recipe("demo")
    given = merged(recipe("demo"), json.loads(file.read_text()), where="expected")
    assert shown(capsys, "--config", str(file)) == given
    flagged = shown(
        capsys, f"--config={file}", "--loss.margin", "0.4", "--model.towers.width", "64"
    )
    assert (flagged.loss.margin, flagged.loss.temperature) == (0.4, 0.05)
    assert (flagged.model.towers.width, flagged.model.towers.layers) == (64, 5)
    assert flagged.train == replace(recipe("demo").train, steps=7)
    nothing_else = replace(
        given,
        loss=replace(given.loss, margin=0.4),
        model=replace(given.model, towers=replace(given.model.towers, width=64)),
    )
    assert flagged == nothing_else


def test_hardware_and_code_paths_are_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_config([]) == 0
    printed = capsys.readouterr().err
    assert "runs on: " in printed
    assert "sample order: windows of about 16 shards, or all of a smaller set" in printed
    assert "checkpoints: written in the background, if copies of the state fit" in printed
    assert show_config(["--checkpoint.no-background"]) == 0
    assert "checkpoints: steps wait for the disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recipe", "nonesuch"],
            f"--recipe nonesuch is unknown; available are: {', '.join(sorted(RECIPES))}",
        ),
        (["--config", "absent.json"], "--config absent.json: there is no such file"),
    ],
)
def test_a_bad_recipe_or_file_ends_with_code_2(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert show_config(flags) == 2
    assert capsys.readouterr().err == f"tvr show-config: error: {message}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "holds list, not an object"),
        ('{"loss": {"margn": 1}}', "loss.margn"),
    ],
)
def test_a_bad_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(content)
    assert show_config(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--config {file}: " in error
    assert message in error


@pytest.mark.parametrize("flags", [["--train.stepz", "3"], ["--train.steps", "many"]])
def test_a_bad_flag_ends_with_code_2(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        show_config(flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_flag_out_of_range_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = show_config(["--loss.temperature", "0"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert "temperature" in capsys.readouterr().err


def test_accumulation_fills_the_global_batch() -> None:
    assert accumulation_steps(SMALL.train, 1) == 8
    assert accumulation_steps(SMALL.train, 2) == 4
    assert accumulation_steps(SMALL.train, 8) == 1
    with pytest.raises(ValueError, match=r"train\.global_batch=64 .* 8 x 3 = 24; .*--train\.micro"):
        accumulation_steps(SMALL.train, 3)
    with pytest.raises(ValueError, match="8 x 16 = 128"):
        accumulation_steps(SMALL.train, 16)


def test_there_are_fewer_than_120_settings() -> None:
    names = list(leaves(asdict(recipe("demo"))))
    assert len(set(names)) == len(names) < 120
