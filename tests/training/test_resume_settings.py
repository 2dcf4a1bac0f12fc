"""What may change when a run resumes: the rules, the refusals, and the values that hold then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders import jobs
from builders.engine_states import seeded_model
from builders.exhaustive import principal_and_further
from builders.savers import saver, stage, state
from builders.tiny import tiny_config
from builders.worlds import CPU, SINGLE_RANK

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.trainer import loop
from tvr.trainer.build_run import TrainingRun
from tvr.trainer.checkpoint.resume_rules import GROUPS, RULES, rule_of, rules_table
from tvr.trainer.config import Config, merged, to_json
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import consolidated_weights
from tvr.trainer.engine.schedule import learning_rate_factor
from tvr.trainer.loop import train
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.pages.report import write_report
from tvr.trainer.run_dir import claim, read_config
from tvr.trainer.run_files import named_settings

README = Path(__file__).parents[2] / "trainer" / "README.md"
SETS = {"web": {"url": "/web", "weight": 2.0}, "own": {"url": "/own", "weight": 1.0}}


def changed(config: Config, **changes: Any) -> Config:
    return merged(config, changes, where="test")


# --------------------------------------------------------------- the rules


def test_every_setting_has_exactly_one_rule() -> None:
    single = tiny_config(Path("/data"))
    mixed = changed(single, data={"train": None, "train_sets": SETS})
    keyed = changed(single, train={"deepspeed": {"zero_optimization": {"sub_group_size": 1}}})
    names = [n for c in (single, mixed, keyed) for n, _ in named_settings(asdict(c))]
    used = {name for rule in map(rule_of, names) for name in rule.names}
    assert sorted(used) == sorted(RULES)
    assert sum(len(group.names) for group in GROUPS) == len(RULES)
    for name in ("loss.temperature", "train.seed", "model.lora_rank", "train.deepspeed.a.b"):
        assert rule_of(name).kind == "refused"
    with pytest.raises(KeyError):
        rule_of("train.unknown")


def test_the_readme_has_the_rules() -> None:
    assert rules_table() in README.read_text()


# ---------------------------------------------------------------- refusals


class FirstRank(World):
    """The first of several ranks, which asks no other one."""

    def run_on_first(self, action: Any, *, patient: bool = False) -> Any:
        return action()


def begun(
    run_dir: Path, config: Config, *, step: int = 4, contents: Mapping[str, str] | None = None
) -> Path:
    """A run's folder with a checkpoint of this step; no model is trained."""
    claim(run_dir, config, SINGLE_RANK)
    save_step(run_dir, config, step, contents or {})
    return run_dir


def save_step(run_dir: Path, config: Config, step: int, contents: Mapping[str, str]) -> None:
    url = config.checkpoint.url or run_dir / "checkpoints"
    settings = json.loads(to_json(config))
    saved = state(step, settings=settings, contents=dict(contents))
    saver(url, run_dir).save(saved, lambda copy: stage(1.0))


def refusal(
    run_dir: Path, config: Config, *, contents: Mapping[str, str] | None = None, ranks: int = 1
) -> str:
    """The error of a resume with these settings; "" if it is accepted."""
    before = (run_dir / "config.json").read_text()
    try:
        claim(run_dir, config, FirstRank(rank=0, world_size=ranks, device=CPU), contents or {})
    except ValueError as error:
        assert (run_dir / "config.json").read_text() == before
        return str(error)
    assert read_config(run_dir) == config
    return ""


def test_one_error_names_all_refused_settings_and_the_way_out(tmp_path: Path) -> None:
    config = tiny_config(Path("/data"))
    run_dir = begun(tmp_path / "run", config)
    wrong = changed(
        config,
        loss={"margin": 0.2},
        model={"interaction": "wti", "towers": {"width": 64}},
        train={"seed": 7, "log_every": 5, "learning_rate": 1.0},
    )
    text = refusal(run_dir, wrong)
    for part in (
        "loss.margin was 0.6, is 0.2 (the loss;",
        "model.interaction was 'att_wti', is 'wti' (the model and",
        "model.towers.width was 32, is 64",
        "train.seed was 0, is 7 (the order of the samples;",
        f"--model.init-from {run_dir}",
        "--model.init-parts",
    ):
        assert part in text
    assert "log_every" not in text
    assert "learning_rate" not in text


def test_results_that_stay_or_change_by_rule_are_accepted(tmp_path: Path) -> None:
    config = tiny_config(Path("/data"))
    run_dir = begun(tmp_path / "run", config)
    other = changed(
        config,
        data={"workers": 3, "decoder": "torchcodec", "crop_scale": 0.9, "shard_cache": "/x"},
        train={
            "steps": 9,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "zero_stage": 2,
            "eval_every": 1,
            "timeout_s": 9.0,
            "similarity_backend": "torch",
        },
        checkpoint={"every": 1, "keep_last": 7},
        metrics={"port": 99},
    )
    assert refusal(run_dir, other) == ""


def test_a_run_cannot_end_before_its_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(Path("/data"), train={"steps": 9})
    run_dir = begun(tmp_path / "run", config)
    assert refusal(run_dir, changed(config, train={"steps": 4})) == ""
    text = refusal(run_dir, changed(config, train={"steps": 3}))
    # The settings of the checkpoint count, not those of the start in between.
    assert "train.steps was 9, is 3 (the checkpoint is of step 4; give at least that)" in text


def test_the_pairs_of_a_loss_stay_the_same(tmp_path: Path) -> None:
    config = tiny_config(Path("/data"))
    run_dir = begun(tmp_path / "run", config)
    assert "was 8 x 1 = 8, is 8 x 2 = 16" in refusal(run_dir, config, ranks=2)
    halved = changed(config, train={"micro_batch": 4})
    assert refusal(run_dir, halved, ranks=2) == ""
    assert "was 8 x 1 = 8, is 4 x 1 = 4" in refusal(run_dir, halved)
    assert refusal(run_dir, changed(halved, train={"gradient_cache": True})) == ""


@pytest.mark.parametrize("name", ["train", "test"])
def test_data_may_move_and_other_data_may_not(tmp_path: Path, name: str) -> None:
    config = tiny_config(Path("/data"))
    setting = f"data.{name}"
    run_dir = begun(tmp_path / "run", config, contents={setting: "a"})
    moved = changed(config, data={name: "s3://bucket/elsewhere"})
    assert refusal(run_dir, moved, contents={setting: "a"}) == ""
    text = refusal(run_dir, moved, contents={setting: "b"})
    assert f"{setting} was '/data/{name}', is 's3://bucket/elsewhere' (" in text
    # Packed anew at the old place.
    text = refusal(run_dir, config, contents={setting: "b"})
    assert ("its content has changed" if name == "train" else "another test set") in text


def test_a_test_set_may_come_and_go(tmp_path: Path) -> None:
    config = tiny_config(Path("/data"))
    run_dir = begun(tmp_path / "run", config, contents={"data.test": "a", "data.train": "t"})
    without = changed(config, data={"test": None, "test_exchanged": None})
    assert refusal(run_dir, without, contents={"data.train": "t"}) == ""
    sets = changed(config, data={"train": None, "train_sets": SETS})
    assert "data.train was '/data/train', is None (another one;" in refusal(run_dir, sets)


def test_several_sets_may_move_and_keep_their_weights(tmp_path: Path) -> None:
    config = changed(tiny_config(Path("/data")), data={"train": None, "train_sets": SETS})
    names = {f"data.train_sets.{name}.url": name for name in SETS}
    run_dir = begun(tmp_path / "run", config, contents=names)
    moved = changed(config, data={"train_sets": {"web": {"url": "/new", "max_bad": 3}}})
    assert refusal(run_dir, moved, contents=names) == ""
    heavier = changed(config, data={"train_sets": {"web": {"weight": 3.0}}})
    assert "data.train_sets.web.weight was 2.0, is 3.0" in refusal(run_dir, heavier, contents=names)


def test_model_folders_may_move(tmp_path: Path) -> None:
    for name, words in (("old", "{}"), ("new", "{}"), ("other", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(words)
    config = tiny_config(Path("/data"), model={"tokenizer": str(tmp_path / "old")})
    contents = dict(claim(tmp_path / "run", config, SINGLE_RANK).contents)
    assert list(contents) == ["model.tokenizer"]
    run_dir = begun(tmp_path / "run", config, contents=contents)
    assert refusal(run_dir, changed(config, model={"tokenizer": str(tmp_path / "new")})) == ""
    text = refusal(run_dir, changed(config, model={"tokenizer": str(tmp_path / "other")}))
    assert "other' (another vocabulary; start a new run)" in text


def test_the_vocabulary_of_a_pretrained_folder_may_not_change(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    config = tiny_config(Path("/data"), model={"tokenizer": None, "pretrained": str(folder)})
    contents = dict(claim(tmp_path / "run", config, SINGLE_RANK).contents)
    run_dir = begun(tmp_path / "run", config, contents=contents)
    assert refusal(run_dir, config) == ""
    moved = folder.rename(tmp_path / "moved")
    elsewhere = changed(config, model={"pretrained": str(moved)})
    assert refusal(run_dir, elsewhere) == ""
    (moved / "tokenizer.json").write_text('{"a": 1}')
    assert "another vocabulary" in refusal(run_dir, elsewhere)


def test_a_clip_beside_an_open_clip_file_has_the_digest_of_earlier_releases(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    (folder / "tokenizer.json").write_text("{}")
    config = tiny_config(Path("/data"), model={"tokenizer": None, "pretrained": str(folder)})
    before = dict(claim(tmp_path / "run", config, SINGLE_RANK).contents)
    (folder / "open_clip_config.json").write_text("{}")
    assert dict(claim(tmp_path / "run", config, SINGLE_RANK).contents) == before
    # A PE-Core is read by it.
    (folder / "config.json").unlink()
    one = claim(tmp_path / "run", config, SINGLE_RANK).contents["model.pretrained"]
    (folder / "open_clip_config.json").write_text('{"a": 1}')
    assert claim(tmp_path / "run", config, SINGLE_RANK).contents["model.pretrained"] != one


def test_a_run_of_an_earlier_release_keeps_its_loss_unless_told_otherwise(tmp_path: Path) -> None:
    """The settings that its release did not have count as it behaved."""
    loss = {"similarity": "neg_nce", "neg_nce_mode": "log"}
    config = tiny_config(Path("/data"), loss=loss)
    claim(tmp_path, config, SINGLE_RANK)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["loss"]["mask_equal_captions"], stored["data"]["frame_spacing"]
    path.write_text(json.dumps(stored))
    saver(tmp_path / "checkpoints", tmp_path).save(state(4), lambda copy: stage(1.0))
    assert "loss.mask_equal_captions was False, is None (the loss;" in refusal(tmp_path, config)
    assert "train.layer_decay was 1.0, is 0.5 (the checkpoint does not record" in refusal(
        tmp_path, changed(config, train={"layer_decay": 0.5})
    )
    kept = changed(config, loss={"mask_equal_captions": False})
    taken = claim(tmp_path, kept, SINGLE_RANK)
    assert taken.before.data.frame_spacing == "index"
    assert read_config(tmp_path) == kept


def test_a_checkpoint_without_settings_takes_those_of_the_folder(tmp_path: Path) -> None:
    """Earlier releases recorded neither settings nor contents."""
    config = tiny_config(Path("/data"))
    claim(tmp_path, config, SINGLE_RANK)
    saver(tmp_path / "checkpoints", tmp_path).save(state(4), lambda copy: stage(1.0))
    assert "loss.margin was 0.6, is 0.2" in refusal(tmp_path, changed(config, loss={"margin": 0.2}))
    assert refusal(tmp_path, config, contents={"data.train": "a"}) == ""
    moved = changed(config, data={"train": "/moved"})
    text = refusal(tmp_path, moved, contents={"data.train": "a"})
    assert "'/moved' (the checkpoint does not record what it held; give the old place" in text


def test_checkpoints_may_move_with_the_newest_among_them(tmp_path: Path) -> None:
    config = tiny_config(Path("/data"))
    run_dir = begun(tmp_path / "run", config)
    moved = changed(config, checkpoint={"url": str(tmp_path / "moved")})
    assert "holds step-00000004 of this run, " in (text := refusal(run_dir, moved))
    assert "no checkpoint. Copy the checkpoints there" in text
    shutil.copytree(run_dir / "checkpoints", tmp_path / "moved")
    save_step(run_dir, config, 6, {})
    assert "only step-00000004" in refusal(run_dir, moved)
    save_step(run_dir, moved, 6, {})
    assert refusal(run_dir, moved) == ""


def test_the_content_of_a_copy_is_that_of_the_data_set(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "copy")
    contents = [read_manifest(str(p)).content for p in (data / "train", tmp_path / "copy")]
    assert contents[0] == contents[1] != read_manifest(str(data / "test")).content


# -------------------------------------------------------------------- runs

FORMS: dict[str, dict[str, Any]] = {
    # Stage 0 is tested below, with other groups of parameters.
    "stage 1": {"zero_stage": 1},
    "stage 3": {"zero_stage": 3},
    # DeepSpeed's BF16_Optimizer.
    "bf16 at stage 1": {"zero_stage": 1, "precision": "bf16"},
}
NEW_VALUES = {
    "steps": 3,
    "warmup_steps": 1,
    "learning_rate": 4e-3,
    "encoder_learning_rate": 0.0,
    "weight_decay": 0.05,
    "beta1": 0.8,
    "gradient_clip": 0.25,
}


def quick(data: Path, **train_settings: Any) -> Config:
    return tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        train={"steps": 2, **train_settings},
        metrics={"enabled": False},
    )


def train_captured(config: Config, run_dir: Path) -> TrainingRun:
    """Trains in this process, and returns the run as it ended."""
    found: list[TrainingRun] = []

    def build_run(*args: Any, **options: Any) -> TrainingRun:
        found.append(original(*args, **options))
        return found[0]

    original = loop.build_run
    with patch.object(loop, "build_run", build_run):
        train(config, run_dir)
    return found[0]


def weights(run_dir: Path, step: int, config: Config) -> dict[str, torch.Tensor]:
    return consolidated_weights(jobs.shards_folder(run_dir, step), config.train.zero_stage)


@pytest.mark.parametrize("form", principal_and_further(FORMS, ["stage 3"]))
def test_the_optimiser_uses_the_new_values(data: Path, tmp_path: Path, form: str) -> None:
    config, run_dir = quick(data, **FORMS[form]), tmp_path / "run"
    train(config, run_dir)
    longer = changed(config, train=NEW_VALUES)
    ended = train_captured(longer, run_dir)
    optimizer: Any = ended.engine._optimizer
    factor = learning_rate_factor(2, warmup_steps=1, steps=3)
    assert factor == 0.5
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"encoder": 0.0, "head": 4e-3 * factor}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.98)}
    assert optimizer.clip_grad == 0.25
    # At a rate of 0 the towers stay; the heads move.
    before, after = weights(run_dir, 2, config), weights(run_dir, 3, longer)
    for name, value in after.items():
        if "tower." in name:
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert jobs.events(run_dir, "step")[-1]["learning_rate"] == 4e-3 * factor
    (event,) = jobs.events(run_dir, "settings_changed")
    assert event["step"] == 2
    assert sorted(event["settings"]) == sorted(f"train.{name}" for name in NEW_VALUES)
    assert event["settings"]["train.steps"][:2] == [2, 3]


def test_new_groups_of_parameters_keep_weights_and_moments(data: Path, tmp_path: Path) -> None:
    config, run_dir = quick(data, zero_stage=0), tmp_path / "run"
    train(config, run_dir)
    # One more step that changes next to nothing.
    still = {"learning_rate": 1e-30, "encoder_learning_rate": 1e-30, "beta1": 0.999999}
    decayed = changed(config, train={"steps": 3, "layer_decay": 0.5, **still})
    optimizer: Any = train_captured(decayed, run_dir).engine._optimizer
    assert len(optimizer.param_groups) > 4
    assert {group["betas"] for group in optimizer.param_groups} == {(0.999999, 0.98)}
    assert max(group["lr"] for group in optimizer.param_groups) < 1e-30
    found = []
    for step, settings in ((2, config), (3, decayed)):
        model = seeded_model(settings)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, settings.train)
        order = [names[parameter] for group in groups for parameter in group["params"]]
        (file,) = jobs.shards_folder(run_dir, step).glob("*model_states.pt")
        moments = torch.load(file, weights_only=False)["optimizer"]["state"]
        found.append({name: moments[number]["exp_avg"] for number, name in enumerate(order)})
    assert list(found[0]) != list(found[1])
    for name, moment in found[0].items():
        torch.testing.assert_close(found[1][name], moment, rtol=1e-3, atol=1e-6)
        assert found[1][name].shape == moment.shape
    before, after = weights(run_dir, 2, config), weights(run_dir, 3, decayed)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-9)


def test_moved_data_and_free_settings_change_no_bit(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, train={"steps": 4}, checkpoint={"every": 2})
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(config, whole)
    jobs.copy_run_at_step(2, whole, moved)
    for split in ("train", "test"):
        shutil.copytree(data / split, tmp_path / split)
    other = changed(
        config,
        data={
            "train": str(tmp_path / "train"),
            "test": str(tmp_path / "test"),
            "test_exchanged": None,
            "cache_mib": 1,
        },
        train={"gc_every": 1, "timeout_s": 99.0},
        checkpoint={"keep_last": 5},
    )
    train(other, moved)
    assert jobs.losses(moved) == jobs.losses(whole)
    ours, theirs = weights(moved, 4, other), weights(whole, 4, config)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    (event,) = jobs.events(moved, "settings_changed")
    assert event["settings"]["data.train"][:2] == [config.data.train, other.data.train]
    page = write_report(moved).read_text()
    assert "checkpoint.keep_last: 2 &rarr; 5" in page
    # A change that its checkpoint has is not logged again.
    train(changed(other, train={"steps": 5}), moved)
    assert list(jobs.events(moved, "settings_changed")[-1]["settings"]) == ["train.steps"]
    # Another data set, at the place of the run's.
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(data / "test", tmp_path / "train")
    with pytest.raises(ValueError, match=r"data\.train was .*its content has changed"):
        train(changed(other, train={"steps": 6}), moved)
