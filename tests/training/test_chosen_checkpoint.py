"""Commands read the newest, the best or a named checkpoint, and new runs start from one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.engine_states import seeded_model
from builders.savers import save, saver
from builders.tiny import MAX_WORDS, tiny_config
from torch import Tensor

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.launchers.cli import main
from tvr.trainer.checkpoint.catalogue import (
    BEST,
    Retention,
    best_step,
    forget_later_scores,
    published_steps,
    read_scores,
    record_evaluation,
)
from tvr.trainer.checkpoint.choice import chosen_step, parse_choice
from tvr.trainer.config import Config, merged
from tvr.trainer.engine.engine import consolidated_weights
from tvr.trainer.evaluation.export import load_exported
from tvr.trainer.evaluation.initial_weights import load_initial, merged_adapters, parts_of
from tvr.trainer.evaluation.warm_start import WarmStart, split_source
from tvr.trainer.loop import train
from tvr.trainer.model.parameter_groups import merge_adapters
from tvr.trainer.model.tokenizer import load_tokenizer, train_tokenizer
from tvr.trainer.run_dir import remove_later_evaluations

STEPS = 6
BEST_STEP = 2


def changed(config: Config, **changes: Any) -> Config:
    return merged(config, changes, where="test")


# ------------------------------------------------------------- best and retention


def test_the_best_saved_step_stays_if_a_better_one_could_not_be_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path, retention=Retention(last=1, best=True))
    storage = StorageFolder(str(folder))
    for step, score in ((1, 50.0), (2, 10.0)):
        save(writer, step)
        record_evaluation(storage, step, score)
    record_evaluation(storage, 3, 99.0)  # its save failed
    save(writer, 4)
    assert published_steps(storage) == [1, 4]
    assert best_step(storage) == 3
    assert best_step(storage, [1, 4]) == 1
    assert json.loads((folder / BEST).read_text())["step"] == 3


def test_the_record_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    (tmp_path / BEST).write_text('{"step": 7, "score": 40.0}\n')
    storage = StorageFolder(str(tmp_path))
    assert best_step(storage) == 7
    record_evaluation(storage, 9, 30.0)
    assert best_step(storage) == 7
    record_evaluation(storage, 11, 40.0)  # the newer one of two equal scores
    assert best_step(storage) == 11


def test_scores_of_lost_steps_and_of_other_test_sets_do_not_count(tmp_path: Path) -> None:
    storage = StorageFolder(str(tmp_path))
    for step, score in ((1, 50.0), (2, 30.0), (6, 90.0)):
        record_evaluation(storage, step, score, "first set")
    assert best_step(storage) == 6
    forget_later_scores(storage, 4)  # a run resumes from step 4 and trains step 6 anew
    assert read_scores(storage) == {1: 50.0, 2: 30.0}
    record_evaluation(storage, 6, 34.0, "first set")
    assert best_step(storage) == 1
    record_evaluation(storage, 8, 20.0, "second set")
    assert read_scores(storage) == {8: 20.0}
    forget_later_scores(storage, 0)
    assert best_step(storage) is None


def test_evaluations_of_lost_steps_are_removed(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        path = tmp_path / ("evaluation.json" if step == 9 else f"evaluation-step-{step:08d}.json")
        path.write_text(json.dumps({"step": step}))
    remove_later_evaluations(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-step-00000003.json"]


def test_a_choice_that_is_not_there_names_those_that_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    storage = StorageFolder(str(folder))
    with pytest.raises(ValueError, match="has no checkpoint of step 3; it has none at all"):
        chosen_step(storage, 3)
    writer = saver(folder, tmp_path, retention=Retention(last=5))
    for step in (2, 4):
        save(writer, step)
    assert chosen_step(storage, "newest") is None
    with pytest.raises(
        ValueError, match=r"no best checkpoint, since no saved step was evaluated .*step 2, 4$"
    ):
        chosen_step(storage, "best")
    record_evaluation(storage, 2, 31.25)
    record_evaluation(storage, 3, 40.0)
    with pytest.raises(
        ValueError, match=r"step 3; it has those of step 2, 4; step 2 is the best, with 31\.25"
    ):
        chosen_step(storage, 3)
    with caplog.at_level(logging.WARNING):
        assert chosen_step(storage, "best") == 2
    assert "step 3 scored higher, but its checkpoint is not there" in caplog.text


@pytest.mark.parametrize("text", ["last", "0", "-2", "2.0", "", "step-2"])
def test_a_wrong_choice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--checkpoint .*: give newest, best, or the number of"):
        parse_choice(text)
    assert [parse_choice(good) for good in ("newest", "best", "12")] == ["newest", "best", 12]


# ------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def ended(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run with three checkpoints, all evaluated, of which that of step 2 counts as the best."""
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    config = tiny_config(
        data,
        data={"test_exchanged": None},
        train={"steps": STEPS, "eval_every": 2, "learning_rate": 1e-2},
        checkpoint={"every": 2, "keep_last": 3},
        metrics={"enabled": False},
    )
    train(config, run_dir)
    record_evaluation(StorageFolder(str(run_dir / "checkpoints")), BEST_STEP, 99.0)
    return config, run_dir


def saved_weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    return consolidated_weights(jobs.shards_folder(run_dir, step), 1)


def tvr(capsys: pytest.CaptureFixture[str], *line: str | Path) -> tuple[int, str, str]:
    code = main([str(word) for word in line])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(("choice", "step"), [("best", 2), ("4", 4), ("newest", 6)])
def test_evaluation_is_of_the_chosen_checkpoint(
    ended: tuple[Config, Path], capsys: pytest.CaptureFixture[str], choice: str, step: int
) -> None:
    _, run_dir = ended
    last = (run_dir / "evaluation.json").read_bytes()
    code, out, err = tvr(capsys, "evaluate", "--run-dir", run_dir, "--checkpoint", choice)
    assert code == 0, err
    assert f", checkpoint of step {step}\n" in out
    name = "evaluation.json" if step == STEPS else f"evaluation-step-{step:08d}.json"
    found = json.loads((run_dir / name).read_text())
    (logged,) = (e for e in jobs.events(run_dir, "evaluation") if e["step"] == step)
    assert found["step"] == step
    for way in ("text_to_video", "video_to_text"):
        assert found[way] == logged[way]
    assert (run_dir / "evaluation.json").read_bytes() == last


def test_the_export_holds_the_weights_of_the_chosen_checkpoint(
    ended: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run_dir = ended
    line = ("export", "--run-dir", run_dir, "--checkpoint", "best", "--out", tmp_path / "out")
    code, out, err = tvr(capsys, *line)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "exported the checkpoint of step 2\n" in err
    theirs = saved_weights(run_dir, BEST_STEP)
    for name, value in load_exported(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "for 2 steps of" in card
    # The results come from the log: evaluation.json is of the last step.
    assert ", checkpoint of step 2\n" in card


def test_the_report_shows_the_chosen_checkpoint(
    ended: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(ended[1], run_dir)
    for choice, step in ((None, 6), ("best", 2), ("4", 4)):
        chosen = () if choice is None else ("--checkpoint", choice)
        code, _, err = tvr(capsys, "report", "--run-dir", run_dir, *chosen)
        assert code == 0, err
        assert f"test videos, after step {step}" in (run_dir / "report.html").read_text()
    lines = (run_dir / "log.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "log.jsonl").write_text("".join(x for x in lines if '"evaluation"' not in x))
    for file in run_dir.glob("evaluation-step-*"):
        file.unlink()
    code, _, err = tvr(capsys, "report", "--run-dir", run_dir, "--checkpoint", "4")
    assert code == 2
    assert f"run `tvr evaluate --run-dir {run_dir} --checkpoint 4` first" in err


@pytest.mark.parametrize("command", ["evaluate", "export", "report"])
def test_an_absent_checkpoint_is_refused(
    ended: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = ("--out", tmp_path / "out") if command == "export" else ()
    line = (command, "--run-dir", ended[1], *out, "--checkpoint")
    code, _, err = tvr(capsys, *line, "5")
    assert code == 2
    assert "no checkpoint of step 5; it has those of step 2, 4, 6; step 2 is the best" in err
    assert tvr(capsys, *line, "latest")[0] == 2
    assert not list(tmp_path.iterdir())


def test_a_damaged_choice_is_not_replaced_by_another(
    ended: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(ended[1], run_dir)
    (file,) = jobs.shards_folder(run_dir, 4).glob("*model_states.pt")
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = tvr(capsys, "evaluate", "--run-dir", run_dir, "--checkpoint", "4")
    assert code != 0
    assert "the checkpoint of step 4: " in err
    assert file.name in err


# ------------------------------------------------------------------ warm start


def small(folder: Path, **changes: Any) -> Config:
    return tiny_config(folder, **changes)


def refused(config: Config, other: Config, *parts: Any) -> str:
    """The error of starting `config`'s model from the weights of `other`'s."""
    model, source = seeded_model(config), seeded_model(other, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.init_from=there does not fit") as caught:
        load_initial(model, source.state_dict(), parts, "there")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return str(caught.value)


def test_weights_that_do_not_fit_are_named(data: Path) -> None:
    config = small(data)
    text = refused(config, small(data, model={"sequence_header_layers": 0}))
    assert "it lacks sequence_header.positions, " in text
    text = refused(small(data, loss={"tpm_cl": 0}), config)
    assert "this model has no word_predictor." in text
    text = refused(config, small(data, data={"num_frames": 2}))
    assert "other shapes: word_predictor." in text
    assert "model.init_parts" in text
    text = refused(
        small(data, loss={"tpm_cl": 0}), small(data, loss={"tpm_cl": 0}), "word_predictor"
    )
    assert "neither model has the part word_predictor" in text


def test_stated_parts_alone_are_taken(data: Path) -> None:
    config, other = small(data), small(data, data={"num_frames": 2})
    parts: Any = ("towers", "text_weight", "frame_weight")
    model, source = seeded_model(config), seeded_model(other, seed=1).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_initial(model, source, parts, "there")
    taken = ("text_tower", "image_tower", "text_weight", "frame_weight")
    assert parts_of(parts) == taken
    for name, value in model.state_dict().items():
        expected = source if name.split(".")[0] in taken else before
        assert torch.equal(value, expected[name]), name


def test_lora_is_merged_as_the_export_merges_it(data: Path) -> None:
    model = seeded_model(small(data, model={"lora_rank": 2}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    merged_weights = merged_adapters(model.state_dict())
    for tower in (model.text_tower, model.image_tower):
        merge_adapters(tower)
    expected = model.state_dict()
    assert merged_weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged_weights[name], value, rtol=0, atol=1e-6)


def test_parts_need_a_source(data: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init_parts=\('heads',\) needs model\.init_from"):
        small(data, model={"init_parts": ["heads"]})


def test_a_source_may_name_a_checkpoint(tmp_path: Path) -> None:
    assert split_source("runs/a") == (Path("runs/a"), "newest")
    assert split_source("runs/a@best") == (Path("runs/a"), "best")
    assert split_source("runs/a@300") == (Path("runs/a"), 300)
    assert split_source("me@host/a") == (Path("me@host/a"), "newest")
    (tmp_path / "a@best").mkdir()
    assert split_source(f"{tmp_path}/a@best") == (tmp_path / "a@best", "newest")


def test_other_words_are_refused(ended: tuple[Config, Path], tmp_path: Path) -> None:
    captions = [f"{word} of another vocabulary" for word in ("words", "clips", "videos")]
    words = train_tokenizer(captions, tmp_path, vocab_size=540, max_words=MAX_WORDS)
    model = changed(ended[0], model={"init_from": str(ended[1])}).model
    with pytest.raises(ValueError, match=r"trained with the vocabulary of .*tokenizer, which is"):
        WarmStart(model, words)
    with pytest.raises(ValueError, match=r"elsewhere is no run: it has no config\.json"):
        WarmStart(changed(ended[0], model={"init_from": "elsewhere"}).model, words)


def still(config: Config, source: str, **changes: Any) -> Config:
    """One step from the weights of `source` that changes next to nothing."""
    rates = {"learning_rate": 1e-30, "encoder_learning_rate": 1e-30, "weight_decay": 0.0}
    base = changed(
        config,
        data={"test": None},
        train={"steps": 1, **rates},
        model={"init_from": source},
        checkpoint={"every": 0},
    )
    return changed(base, **changes)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-20)


def test_a_run_starts_from_a_checkpoint_and_never_reads_it_again(
    ended: tuple[Config, Path], tmp_path: Path
) -> None:
    config, source = ended[0], tmp_path / "source"
    shutil.copytree(ended[1], source)
    start = still(config, f"{source}@2")
    train(start, tmp_path / "run")
    theirs, ours = saved_weights(source, 2), saved_weights(tmp_path / "run", 1)
    assert ours.keys() == theirs.keys()
    assert all(same(value, theirs[name]) for name, value in ours.items())
    shutil.rmtree(source)
    train(changed(start, train={"steps": 2}), tmp_path / "run")
    assert [event["step"] for event in jobs.events(tmp_path / "run", "step")] == [1, 2]


def test_heads_of_an_export_and_towers_of_its_own(
    ended: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert tvr(capsys, "export", "--run-dir", ended[1], "--out", out)[0] == 0
    start = changed(ended[0], model={"init_from": str(out), "init_parts": ["heads"]})
    words = load_tokenizer(str(start.model.tokenizer), MAX_WORDS)
    model = seeded_model(start)
    theirs, plain = saved_weights(ended[1], STEPS), seeded_model(start).state_dict()
    WarmStart(start.model, words).apply(model)
    for name, value in model.state_dict().items():
        expected = plain if "tower." in name else theirs
        assert torch.equal(value, expected[name]), name
    assert any(not same(theirs[name], plain[name]) for name in plain if "tower." in name)
    with pytest.raises(ValueError, match="is an export, of one step: leave out @best"):
        WarmStart(changed(start, model={"init_from": f"{out}@best"}).model, words)


def test_all_ranks_start_from_the_same_weights(ended: tuple[Config, Path], tmp_path: Path) -> None:
    start, theirs = still(ended[0], f"{ended[1]}@4"), saved_weights(ended[1], 4)
    train(start, tmp_path / "alone")
    # At stage 3 the other rank builds a model without weights.
    for zero_stage in (1, 3):
        config, run_dir = jobs.with_stage(start, zero_stage), tmp_path / f"stage-{zero_stage}"
        assert jobs.run_forked(jobs.write_settings(config, run_dir, 2), run_dir, 2) == [0, 0]
        assert jobs.losses(run_dir) == pytest.approx(jobs.losses(tmp_path / "alone"), rel=1e-5)
        ours = consolidated_weights(jobs.shards_folder(run_dir, 1), zero_stage)
        assert all(same(value, theirs[name]) for name, value in ours.items())
