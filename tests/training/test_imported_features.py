"""Features that a user brings: files are checked, bad ones left out, heads train on the rest."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pretrained import save_clip
from builders.tiny import MAX_WORDS, NUM_FRAMES, tiny_config
from safetensors.torch import save_file

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.records import BadSample, TooManyBadSamples
from tvr.launchers.cli import main as tvr
from tvr.trainer.config import Config, TowersConfig, to_json
from tvr.trainer.evaluation.export import export_run
from tvr.trainer.evaluation.saved_run import evaluate_run, load_run
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.frozen.feature_files import read_file
from tvr.trainer.frozen.import_files import import_features
from tvr.trainer.frozen.tower_outputs import check_settings
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.run_dir import read_config

WIDTH, TEXT_WIDTH = 24, 16


def keys_of(url: Path) -> list[str]:
    return [str(key) for key in read_manifest(str(url)).samples.key]


def write_frames(folder: Path, keys: list[str], lengths: Callable[[int], int]) -> None:
    folder.mkdir()
    for index, key in enumerate(keys):
        values = np.random.default_rng(index).normal(size=(lengths(index), WIDTH))
        np.save(folder / f"{key}.npy", values.astype(np.float32))


def imported_config(data: Path, folder: Path, **changes: Any) -> Config:
    config = tiny_config(
        data,
        data={"features": str(folder), "test_exchanged": None},
        model={"pretrained": str(folder), "tokenizer": None} | changes,
        train={"steps": 3, "eval_every": 3},
    )
    return replace(config, model=replace(config.model, towers=TowersConfig(embed_width=16)))


def run(*line: str) -> tuple[int, str]:
    with redirect_stderr(io.StringIO()) as stderr:
        return tvr(list(line)), stderr.getvalue()


def test_heads_and_projections_train_on_imported_frames_and_captions_encoded_here(
    data: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(data / "tokenizer", MAX_WORDS)
    save_clip(tmp_path / "clip", tokenizer, width=TEXT_WIDTH, image_size=16)
    out, bad = tmp_path / "features", keys_of(data / "train")[5]
    for name in ("train", "test"):
        files = tmp_path / name
        # Shorter and longer than the number of frames.
        write_frames(files, keys_of(data / name), lambda index: 1 + index % 5)
        if name == "train":
            (files / f"{bad}.npy").write_bytes(b"no array")
        line = ["--data", str(data / name), "--files", str(files), "--out", str(out)]
        line += ["--name", "noise", "--num-frames", str(NUM_FRAMES)]
        line += ["--max-words", str(MAX_WORDS), "--text-tower", str(tmp_path / "clip")]
        code, text = run("import-features", *line)
        assert code == 0, text
        assert ("1 clips have no good file" in text) == (name == "train"), text
    found = FeatureSet.open(out, towers=True, verify=True)
    assert [each.key for each in found.left_out] == [bad]
    first = found.videos([0])
    stored = np.load(tmp_path / "train" / f"{found.keys[0]}.npy")
    assert torch.equal(first.frames[0, 0], torch.from_numpy(stored[0]))
    assert first.frame_mask[0].tolist() == [1, 0, 0]
    assert found.texts([0]).words.shape == (1, MAX_WORDS, TEXT_WIDTH)

    config, run_dir = imported_config(data, out), tmp_path / "run"
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(config))
    code, text = run("train", "--config", str(settings), "--run-dir", str(run_dir))
    assert code == 0, text
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert {each["key"] for each in log if each["event"] == "replaced"} <= {bad}
    model, _, step = load_run(run_dir, read_config(run_dir))
    assert step == 3
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {"text_projection.weight", "visual_projection.weight"} <= trained
    assert model.visual_projection is not None
    assert model.visual_projection.weight.shape == (16, WIDTH)
    before = json.loads((run_dir / "evaluation.json").read_text())
    found_again = evaluate_run(run_dir, None).document() | {"step": 3}
    assert json.loads(json.dumps(found_again)) == before
    with pytest.raises(ValueError, match="has no towers to export"):
        export_run(run_dir, tmp_path / "export")
    with pytest.raises(ValueError, match="it cannot encode videos"):
        model.encode_texts(torch.zeros(1, MAX_WORDS, dtype=torch.int64), torch.ones(1, MAX_WORDS))
    code, text = run("train", "--config", str(settings), "--run-dir", str(run_dir), "--dry-run")
    assert code == 0, text


def test_files_may_bring_words(data: Path, tmp_path: Path) -> None:
    files, url = tmp_path / "files", data / "test"
    files.mkdir()
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(10, 1, 4, TEXT_WIDTH, generator=generator)
    words[:, :, 3] = 0  # padding
    for index, key in enumerate(keys_of(url)):
        content = {"frames": torch.ones(2, WIDTH, dtype=torch.float16), "words": words[index]}
        save_file(content, files / f"{key}.safetensors")
    out = tmp_path / "features"
    settings = {"name": "noise", "num_frames": NUM_FRAMES, "max_words": MAX_WORDS}
    assert import_features(str(url), files, out, **settings) == 0
    found = FeatureSet.open(out, towers=True).texts()
    assert torch.equal(found.words[:, :4], words[:, 0])
    assert found.word_mask.sum(1).tolist() == [3] * 10
    assert torch.allclose(found.sentence, words[:, 0, :3].mean(1))
    # The same call again has nothing to do; other encoders need another folder.
    assert import_features(str(url), files, out, **settings) == 0
    with pytest.raises(ValueError, match="is of other features"):
        import_features(str(url), files, out, **(settings | {"name": "others"}))
    config = imported_config(data, out)
    for section, change, text in (
        ("data", {"num_frames": 2}, "num_frames must be 3, .* and it is 2"),
        ("data", {"features": "elsewhere"}, "data.features must be the same folder"),
        ("data", {"features": None}, "set data.features to the same folder"),
        ("data", {"hard_batches": 0.5, "hard_every": 2}, "set data.hard_every=0, and it is 2"),
    ):
        part = replace(getattr(config, section), **change)
        with pytest.raises(ValueError, match=text):
            check_settings(replace(config, **{section: part}))


def test_more_bad_files_than_allowed_end_the_import(data: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    write_frames(files, keys_of(data / "test")[:8], lambda index: 3)
    tokenizer = load_tokenizer(data / "tokenizer", MAX_WORDS)
    save_clip(tmp_path / "clip", tokenizer, width=TEXT_WIDTH, image_size=16)
    with pytest.raises(TooManyBadSamples, match="missing_file"):
        import_features(
            str(data / "test"),
            files,
            tmp_path / "features",
            name="noise",
            num_frames=3,
            max_words=MAX_WORDS,
            text_tower=str(tmp_path / "clip"),
            max_bad=1,
        )
    assert not (tmp_path / "features" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"frames": torch.ones(3)}, "needed is \\(F, D\\)"),
        ({"frames": torch.ones(0, 3)}, "needed is \\(F, D\\)"),
        ({"frames": torch.ones(2, 3, dtype=torch.int64)}, "not floats"),
        ({"frames": torch.tensor([[1.0, float("nan")]])}, "not finite"),
        ({"words": torch.ones(1, 2, 3)}, "holds no frames"),
        ({"frames": torch.ones(1, 3), "word_mask": torch.ones(1, 2)}, "word_mask without words"),
        ({"frames": torch.ones(1, 3), "words": torch.ones(2, 3)}, "needed is \\(A, T, W\\)"),
        ({"frames": torch.ones(1, 3), "words": torch.zeros(1, 2, 3)}, "no caption empty"),
        (
            {
                "frames": torch.ones(1, 3),
                "words": torch.ones(1, 2, 3),
                "sentence": torch.ones(1, 4),
            },
            "sentence has shape",
        ),
    ],
)
def test_a_file_with_other_content_is_a_bad_sample(
    tmp_path: Path, content: dict[str, torch.Tensor], text: str
) -> None:
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(BadSample, match=text):
        read_file(tmp_path, "a", num_frames=3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array([{}], dtype=object), "allow_pickle"),
        (np.ones((2, 3), dtype=np.int32), "no floats"),
        (np.full((2, 3), np.inf), "not finite"),
        (np.full((2, 3), 1e300), "not finite in float32"),
    ],
)
def test_an_array_with_other_content_is_a_bad_sample(
    tmp_path: Path, values: np.ndarray, text: str
) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(BadSample, match=text):
        read_file(tmp_path, "a", num_frames=3)
    with pytest.raises(BadSample, match=r"neither b.npy nor b.safetensors"):
        read_file(tmp_path, "b", num_frames=3)


def test_arrays_of_other_machines_are_read_and_a_storage_that_is_down_is_no_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3).astype(">f4"))
    assert read_file(tmp_path, "a", num_frames=3).frames.tolist() == [[0, 1, 2], [3, 4, 5]]

    def down(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np, "load", down)
    with pytest.raises(BadSample) as bad:
        read_file(tmp_path, "a", num_frames=3)
    assert bad.value.reason == "unavailable"


def test_captions_whose_words_would_all_be_cut_are_refused(data: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for index, key in enumerate(keys_of(data / "test")):
        words = torch.ones(1, MAX_WORDS + 2, TEXT_WIDTH)
        words[:, : MAX_WORDS if index == 3 else 0] = 0  # padded on the left
        save_file({"frames": torch.ones(2, WIDTH), "words": words}, files / f"{key}.safetensors")
    out = tmp_path / "features"
    settings = {"name": "noise", "num_frames": NUM_FRAMES, "max_words": MAX_WORDS}
    assert import_features(str(data / "test"), files, out, **settings) == 1
    found = FeatureSet.open(out, towers=True)
    assert "put the words first" in found.left_out[0].detail
    assert found.texts().word_mask.any(dim=1).all()


def test_numbers_that_half_precision_cannot_hold_are_refused(data: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for key in keys_of(data / "test"):
        content = {"frames": torch.full((2, WIDTH), 7e4), "words": torch.ones(1, 2, TEXT_WIDTH)}
        save_file(content, files / f"{key}.safetensors")
    with pytest.raises(ValueError, match=r"frames of block-00000000 .* not finite in fp16"):
        import_features(
            str(data / "test"),
            files,
            tmp_path / "features",
            name="noise",
            num_frames=3,
            max_words=MAX_WORDS,
            stored="fp16",
        )
