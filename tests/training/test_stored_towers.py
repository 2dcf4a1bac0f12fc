"""Training on stored outputs of frozen towers equals training on the videos to the last bit.

The folder of outputs is bound to towers, settings and content, survives a stop while it is made,
and is compared with its hashes whenever it is opened.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.tiny import damaged_data, tiny_config, with_ranks

from tvr.data_prep.records import ShardCorrupt
from tvr.launchers.cli import main as tvr
from tvr.trainer.cli import features as tvr_features
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, merged, to_json
from tvr.trainer.data import build_tokenizer
from tvr.trainer.engine.engine import consolidated_weights
from tvr.trainer.evaluation.export import export_run, load_exported
from tvr.trainer.evaluation.saved_run import ALONE, evaluate_run
from tvr.trainer.features.feature_set import FeatureSet, FeatureWriter
from tvr.trainer.frozen import identity
from tvr.trainer.frozen.tower_outputs import check_settings, features_line, open_or_make
from tvr.trainer.memory.rank_memory import rank_memory
from tvr.trainer.model.model import TextVideoModel, build_model
from tvr.trainer.monitoring.flops import flops_per_pair

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


def frozen_config(data: Path, folder: Path | None = None, **changes: Any) -> Config:
    config = tiny_config(data, **({"model": {"freeze": "both"}, "train": TRAIN} | changes))
    features = None if folder is None else str(folder)
    return replace(config, data=replace(config.data, features=features))


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a run without times."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    timed = ("time_s", "seconds")
    return [
        {k: v for k, v in line.items() if k not in timed} for line in lines if line["event"] == kind
    ]


def result(run_dir: Path, step: int = 4, stage: int = 1) -> tuple[Any, ...]:
    """All that a run computes: losses, gradients, weights, keys, evaluations, bad samples."""
    steps = [
        (each["step"], each["loss"], each["gradient_norm"]) for each in events(run_dir, "step")
    ]
    weights = consolidated_weights(jobs.shards_folder(run_dir, step), stage)
    bits = {name: value.float().numpy().tobytes() for name, value in weights.items()}
    keys = sorted(file.read_text() for file in (run_dir / "keys").iterdir())
    # A resumed run may evaluate the step of its checkpoint again.
    scores = {each["step"]: each for each in events(run_dir, "evaluation")}
    return steps, bits, keys, scores, events(run_dir, "replaced")


def stopped_copy(run_dir: Path, copy: Path) -> Path:
    """The run as it was when it was killed after the checkpoint of step 2."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    (copy / "checkpoints" / "latest").write_text("step-00000002\n")
    (copy / "evaluation.json").unlink()
    return copy


def test_training_equals_that_from_videos_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    bad, keys = damaged_data(data, tmp_path / "train", rows=range(0, 48, 7))
    # More than a batch of the towers' tiles, and not a multiple of it.
    config = frozen_config(data, checkpoint={"every": 2})
    config = replace(config, data=replace(config.data, train=str(bad)))
    features = replace(config, data=replace(config.data, features=str(tmp_path / "features")))
    for ranks in (1, 2):
        video, stored = tmp_path / f"video-{ranks}", tmp_path / f"stored-{ranks}"
        assert train(config, video, ranks)[0] == 0
        code, text = train(features, stored, ranks)
        assert code == 0, text
        # The first run makes the folder, the second one uses it.
        assert ("blocks encoded" in text) == (ranks == 1), text
        assert result(stored) == result(video)
        assert {each["key"] for each in events(stored, "replaced")} <= set(keys)
        assert events(stored, "replaced")
    # Killed and resumed: to the last bit on as many ranks, and even if it goes on from the videos.
    whole = result(tmp_path / "stored-2")
    again = stopped_copy(tmp_path / "stored-2", tmp_path / "again")
    assert train(features, again, 2)[0] == 0
    assert events(again, "resumed")[-1]["step"] == 2
    assert result(again) == whole
    # On one rank it reads the same samples.
    other = stopped_copy(tmp_path / "stored-2", tmp_path / "other")
    code, text = train(features, other, 1)
    assert code == 0, text
    assert [loss for _, loss, _ in result(other)[0]] == pytest.approx(
        [loss for _, loss, _ in whole[0]], rel=1e-4
    )
    # The run's model still encodes videos.
    stored = tmp_path / "stored-1"
    before = json.loads((stored / "evaluation.json").read_text())
    found = evaluate_run(stored, None)
    assert json.loads(json.dumps(found.document() | {"step": 4})) == before
    export_run(stored, tmp_path / "export")
    assert load_exported(tmp_path / "export").image_tower is not None


def test_several_sets_workers_and_the_gradient_cache(data: Path, tmp_path: Path) -> None:
    sets = {"a": {"url": str(data / "train"), "weight": 3.0}}
    sets["b"] = {"url": str(data / "exchanged"), "weight": 1.0}
    config = frozen_config(
        data,
        train=TRAIN | {"micro_batch": 4, "gradient_cache": True, "zero_stage": 2, "steps": 3},
        model={"freeze": "both", "sequence_header_layers": 0},
    )
    mixed = {"data": {"train": None, "train_sets": sets, "workers": 1}}
    config = merged(config, mixed, where="test")
    folder = tmp_path / "features"
    features = replace(config, data=replace(config.data, features=str(folder)))
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(features))
    with redirect_stderr(io.StringIO()) as stderr:
        assert tvr_features(["--config", str(settings)]) == 0
    assert "blocks encoded" in stderr.getvalue()
    runs = []
    for name, each in (("video", config), ("stored", features)):
        run_dir = tmp_path / name
        path = run_dir.with_suffix(".json")
        path.write_text(to_json(each))
        with redirect_stderr(io.StringIO()) as stderr:
            assert tvr_train(["--config", str(path), "--run-dir", str(run_dir)]) == 0
        assert "blocks encoded" not in stderr.getvalue()
        runs.append(result(run_dir, 3, 2))
    assert runs[0] == runs[1]


def made(config: Config, seed: int = 0, **limits: Any) -> tuple[Any, TextVideoModel]:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(config.model, config.data)
    model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
    return open_or_make(config, model, tokenizer, ALONE, **limits), model


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("model", {"freeze": "text"}, "model.freeze=both, and it is text"),
        ("model", {"freeze": 0, "lora_rank": 2}, "model.freeze=both, and it is 0"),
        ("data", {"frame_sampling": "random"}, "data.frame_sampling=centre"),
        ("data", {"crop_scale": 0.9}, r"data.crop_scale=1.0, and it is 0.9"),
        ("data", {"word_drop": True}, "data.word_drop=False"),
        ("data", {"features": "s3://bucket/features"}, "must be a local folder"),
        ("train", {"zero_stage": 3}, "train.zero_stage 0, 1 or 2, and it is 3"),
    ],
)
def test_settings_that_change_the_outputs_are_refused(
    data: Path, section: str, change: dict[str, Any], text: str
) -> None:
    config = frozen_config(data, Path("features"))
    part = replace(getattr(config, section), **change)
    with pytest.raises(ValueError, match=text):
        check_settings(replace(config, **{section: part}))


def test_a_folder_of_other_towers_settings_or_content_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    test = tmp_path / "test"
    shutil.copytree(data / "test", test)
    config = frozen_config(data, folder)
    config = replace(config, data=replace(config.data, test=str(test), test_exchanged=None))
    stored, _ = made(config)
    assert stored is not None
    assert set(stored) == {str(data / "train"), str(test)}
    assert "stored in" in features_line(config)

    def refused(text: str, seed: int = 0, **changes: Any) -> None:
        with pytest.raises(ValueError, match=text):
            made(replace(config, data=replace(config.data, **changes)), seed)

    refused("another model, towers of the run, whose weights differ", seed=1)
    refused("num_frames=3, not 2", num_frames=2)
    refused("stored=fp32, not fp16", features_type="fp16")
    # The same content at another place is found; a place whose content has changed is refused.
    again, _ = made(replace(config, data=replace(config.data, test=str(data / "test"))))
    assert again is not None
    for url in (str(data / "train"), str(data / "test")):
        _, captions = again[url].place(0)
        assert len(again[url].captions(captions)) > 0
    assert len(FeatureSet.open(folder, towers=True).sources) == 2
    shutil.rmtree(test)
    shutil.copytree(data / "exchanged", test)
    refused("as it was before")
    shutil.rmtree(test)
    shutil.copytree(data / "test", test)
    with pytest.raises(ValueError, match="outputs of towers, for training; needed are features of"):
        FeatureSet.open(folder)
    # A byte that differs is found at the next start.
    file = next(folder.glob("set-*/block-*/words.bin"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ShardCorrupt, match=r"words.bin: its content differs"):
        made(config)
    # Of a store that takes long to read, a start compares some parts, and `tvr features` all.
    monkeypatch.setattr(FeatureSet, "verify", lambda *part: verified.append(part))
    for most, parts in ((0, 0), (1, 1), (None, 2)):
        verified = list[Any]()
        made(config, verify_bytes=most)
        assert len(verified) == parts


def test_an_interrupted_start_continues_with_the_blocks_that_are_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "VIDEOS_PER_BLOCK", 10)
    whole = tmp_path / "whole"
    made(frozen_config(data, whole))
    written, write = list[int](), FeatureWriter.write

    def stopping(self: FeatureWriter, block: int, *rest: Any, **named: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        write(self, block, *rest, **named)
        written.append(block)

    monkeypatch.setattr(FeatureWriter, "write", stopping)
    config = frozen_config(data, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        made(config)
    assert written == [0, 1, 2]
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    written.clear()
    monkeypatch.setattr(
        FeatureWriter,
        "write",
        lambda self, block, *rest, **named: (
            write(self, block, *rest, **named),
            written.append(block),
        ),
    )
    made(config)
    assert written == [3, 4, 0, 0]  # the last blocks of train, then test and exchanged
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.bin"))
    assert files
    for file in files:
        assert (whole / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_a_frozen_tower_encodes_a_row_alike_in_any_batch(data: Path) -> None:
    config = frozen_config(data)
    _, model = made(config)
    model.train()
    assert not model.image_tower.training
    assert model.training
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (11, 3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.randint(500, (11, 20), generator=generator)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        together = model.tower_outputs(frames, ids, mask)
        for row in range(11):
            alone = model.tower_outputs(frames[row:][:1], ids[row:][:1], mask[row:][:1])
            for one, all_rows in zip(alone, together, strict=True):
                assert torch.equal(one[0], all_rows[row])


def test_the_estimates_leave_the_towers_out(data: Path, tmp_path: Path) -> None:
    config, stored = frozen_config(data), frozen_config(data, tmp_path / "features")
    tokenizer = build_tokenizer(config.model, config.data)
    model = build_model(config.model, config.loss, tokenizer, num_frames=3)
    assert flops_per_pair(model, stored, 1) < flops_per_pair(model, config, 1) / 10
    sizes = [rank_memory(each, tokenizer, 1).model.activations for each in (stored, config)]
    assert sizes[0] < sizes[1]
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(stored))
    with redirect_stderr(io.StringIO()) as stderr:
        assert tvr(["show-config", "--config", str(settings)]) == 0
    assert "towers: not run in training; their outputs are to be stored" in stderr.getvalue()
    with redirect_stderr(io.StringIO()):
        run = ["train", "--config", str(settings), "--run-dir", str(tmp_path / "run")]
        assert tvr([*run, "--dry-run"]) == 0
    assert not (tmp_path / "features").exists()


def test_half_precision_is_stored_and_read(data: Path, tmp_path: Path) -> None:
    config = frozen_config(data, tmp_path / "half")
    half, _ = made(replace(config, data=replace(config.data, features_type="fp16")))
    full, _ = made(frozen_config(data, tmp_path / "full"))
    url = str(data / "test")
    reads: list[Callable[[Any], tuple[torch.Tensor, torch.Tensor]]] = [
        lambda stored: stored[url].videos([0, 3]),
        lambda stored: stored[url].texts([1, 0]),
    ]
    for read in reads:
        (short, mask), (exact, same) = read(half), read(full)
        assert short.dtype == torch.float32
        assert torch.equal(mask, same)
        assert torch.equal(short, exact.half().float())
