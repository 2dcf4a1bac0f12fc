"""Models without a run: a plain CLIP is the zero-shot baseline, and its features can be stored."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import numbered_video
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES, make_tiny_data, tiny_config
from transformers import CLIPModel

from tvr.data_prep.reading.loader import read_samples
from tvr.kernels.ranking import retrieval_metrics
from tvr.launchers.cli import main
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.embed import embed
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.evaluation.model_source import SourceModel, load_source
from tvr.trainer.evaluation.options import EvaluationOptions
from tvr.trainer.evaluation.saved_run import evaluate_run
from tvr.trainer.evaluation.stored_features import evaluate_features, evaluate_source
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.loop import train
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import build_model
from tvr.trainer.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_data(folder, num_train=10)
    words = load_tokenizer(folder / "tokenizer", MAX_WORDS)
    save_clip(folder / "clip", words, width=16, image_size=IMAGE_SIZE)
    return folder


@pytest.fixture(scope="module")
def source(data: Path) -> SourceModel:
    return load_source(data / "clip", num_frames=NUM_FRAMES)


@pytest.fixture(scope="module")
def embedded(data: Path) -> Path:
    out = data / "features"
    line = ["embed", str(data / "clip"), "--data", str(data / "test"), "--out", str(out)]
    assert main([*line, "--dtype", "fp32", "--num-frames", str(NUM_FRAMES)]) == 0
    return out


def by_transformers(data: Path, embedded: Path) -> torch.Tensor:
    """Sentence times mean of frames, with Hugging Face's own model and pictures in 0 to 1."""
    clip: Any = CLIPModel.from_pretrained(data / "clip").eval()
    found = FeatureSet.open(embedded)
    samples = read_samples(
        str(data / "test"), list(found.keys), num_frames=NUM_FRAMES, image_size=IMAGE_SIZE
    )
    words = load_tokenizer(data / "clip", MAX_WORDS)
    texts = words.backend(
        list(found.captions),
        padding="max_length",
        truncation=True,
        max_length=MAX_WORDS,
        return_tensors="pt",
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    def vectors(out: Any) -> torch.Tensor:
        values = getattr(out, "pooler_output", out)
        return values / values.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        sentences = vectors(clip.get_text_features(**texts))
        means = []
        for sample in samples:
            pixels = torch.from_numpy(sample.frames).permute(0, 3, 1, 2) / 255
            frames = vectors(clip.get_image_features(pixel_values=(pixels - mean) / std)).mean(0)
            means.append(frames / frames.norm())
    return sentences @ torch.stack(means).T


def test_a_plain_clip_is_sentence_times_mean_of_frames(
    data: Path, source: SourceModel, embedded: Path
) -> None:
    expected = by_transformers(data, embedded)
    found = FeatureSet.open(embedded)
    assert "zero-shot, mean of frames" in found.info.model
    similarity = similarity_rows(found.texts(), found.videos(), source.config.model)
    assert torch.allclose(similarity, expected, rtol=0, atol=1e-5)
    metrics = retrieval_metrics(expected, found.caption_video)
    assert evaluate_features(found).metrics == metrics
    one = source.encode_texts([found.captions[3]])
    assert torch.allclose(one.sentence, found.texts([3]).sentence, rtol=0, atol=1e-5)


def test_evaluation_of_folder_and_of_its_features_agree(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tvr.trainer.evaluation.cli.SECONDS_BETWEEN_LINES", 0.0)
    line = ["evaluate", "--model", str(data / "clip"), "--data", str(data / "test")]
    results = []
    for name, more in (
        ("direct", line),
        ("saved", [*line, "--save-features", str(tmp_path / "saved")]),
        ("again", ["evaluate", "--features", str(tmp_path / "saved")]),
    ):
        # The tiny data set stores 3 frames, a plain folder takes 12 of other sets.
        file = tmp_path / f"{name}.json"
        assert main([*more, "--json", str(file), *frames_flag(more)]) == 0
        results.append(json.loads(file.read_text()))
    for result in results:
        assert "zero-shot, mean of frames" in result["model"]
        assert result["videos"] == 10
        assert result == results[0]
    shown = capsys.readouterr()
    assert "zero-shot, mean of frames" in shown.out
    assert "encoded 10 videos on rank 0 of 1, " in shown.err
    assert "Loading weights" not in shown.err


def test_qb_norm_of_a_data_set_and_of_its_features_agree(
    data: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = str(data / "train")
    frames = ["--num-frames", str(NUM_FRAMES)]
    line = ["embed", str(data / "clip"), "--data", train, "--out", str(tmp_path / "bank")]
    assert main([*line, "--dtype", "fp32", *frames]) == 0
    direct = ["evaluate", "--model", str(data / "clip"), "--data", str(data / "test"), *frames]
    stored = ["evaluate", "--features", str(embedded)]
    found = []
    for source_line, bank in ((direct, train), (stored, str(tmp_path / "bank"))):
        more = ["--dual-softmax", "0.01", "--bank-captions", "20", "--bank-shared", "drop"]
        file = tmp_path / "result.json"
        assert main([*source_line, "--qb-norm", bank, *more, "--json", str(file)]) == 0
        assert f"20 captions of {bank}" in capsys.readouterr().out
        result = json.loads(file.read_text())
        assert result["rescored"]["qb_norm"].pop("bank") == bank
        found.append(result)
    assert found[0]["rescored"] == found[1]["rescored"]
    assert found[0]["queries"] == found[1]["queries"]
    assert found[0]["rescored"]["qb_norm"]["bank_captions"] == 20
    # The test set itself is the worst bank; its captions are refused by name.
    for source_line, bank in ((direct, str(data / "test")), (stored, str(embedded))):
        assert main([*source_line, "--qb-norm", bank]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"the bank {bank} holds 10 captions of the test set" in error
    # Features of other settings cannot be mixed.
    assert main([*line[:-1], str(tmp_path / "other"), "--num-frames", "2"]) == 0
    assert main([*stored, "--qb-norm", str(tmp_path / "other")]) == 2
    assert "of another model or of other settings" in " ".join(capsys.readouterr().err.split())
    # Stored captions cannot be joined.
    assert main([*stored, "--paragraphs"]) == 2
    assert "--paragraphs encodes captions anew" in " ".join(capsys.readouterr().err.split())


def test_features_of_a_trained_form_give_the_evaluation_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, data={"test_exchanged": None}, train={"micro_batch": 4})
    words = load_tokenizer(data / "tokenizer", MAX_WORDS)
    torch.manual_seed(4)
    model = build_model(config.model, config.loss, words, num_frames=NUM_FRAMES).eval()
    own = SourceModel(
        model=model,
        tokenizer=words,
        config=config,
        mean_of_frames=False,
        name="untrained",
        step=None,
        weights="0" * 64,
    )
    sizes: dict[str, Any] = {"stored": "fp32", "videos_per_block": 4}
    test = str(data / "test")
    monkeypatch.chdir(data)
    assert embed(own, "test", tmp_path / "one", **sizes)  # noted as an absolute path
    assert not embed(own, test, tmp_path / "two", task=(1, 2), **sizes)
    assert embed(own, test, tmp_path / "two", task=(0, 2), **sizes)
    one, two = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one == two
    direct = evaluate(own.encode, config, words, own_world)
    stored = evaluate_features(FeatureSet.open(tmp_path / "one", verify=True))
    assert replace(stored, model=None) == direct


def test_run_and_its_export_are_sources(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, train={"steps": 2, "zero_stage": 0})
    run_dir, exported = tmp_path / "run", tmp_path / "exported"
    train(config, run_dir)
    assert main(["export", "--run-dir", str(run_dir), "--out", str(exported)]) == 0
    own, other = load_source(run_dir), load_source(exported)
    assert (own.step, other.step) == (2, None)
    assert [own.mean_of_frames, other.mean_of_frames] == [False, False]
    assert own.settings == other.settings
    assert not own.model.training
    one, two = (
        evaluate_source(folder, str(data / "test")).metrics for folder in (run_dir, exported)
    )
    stored = json.loads((run_dir / "evaluation.json").read_text())["text_to_video"]
    assert asdict(one.text_to_video) == asdict(two.text_to_video) == stored
    with pytest.raises(ValueError, match="step 7"):
        load_source(run_dir, 7)
    # A run keeps results of the default protocol; other blocks are added beside the raw one.
    before = (run_dir / "evaluation.json").read_bytes()
    other = evaluate_run(run_dir, None, options=EvaluationOptions(equal_captions=True))
    assert other.protocol["equal_captions"] == "right"
    assert (run_dir / "evaluation.json").read_bytes() == before
    line = ["evaluate", "--run-dir", str(run_dir), "--dual-softmax", "0.01"]
    bank = ["--qb-norm", str(data / "train"), "--bank-shared", "drop"]
    assert main([*line, *bank]) == 0
    content = json.loads((run_dir / "evaluation.json").read_text())
    assert content["text_to_video"] == stored
    assert set(content["rescored"]) == {"dual_softmax", "qb_norm"}
    assert content["rescored"]["qb_norm"]["bank_captions"] <= 30


own_world = World(rank=0, world_size=1, device=torch.device("cpu"))


def frames_flag(line: list[str]) -> list[str]:
    return [] if "--features" in line else ["--num-frames", str(NUM_FRAMES)]


def test_fingerprint_follows_weights_and_settings(data: Path, source: SourceModel) -> None:
    again = load_source(data / "clip", num_frames=NUM_FRAMES)
    assert again.fingerprint == source.fingerprint
    assert load_source(data / "clip", num_frames=2).fingerprint != source.fingerprint
    with torch.no_grad():
        next(again.model.parameters()).add_(1e-3)
    assert load_source(data / "clip", num_frames=NUM_FRAMES).weights == source.weights
    assert replace(again, weights="0").fingerprint != source.fingerprint


def test_a_folder_of_videos_is_embedded_and_bad_ones_are_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    (videos / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "more/a.mp4"):
        (videos / name).write_bytes(numbered_video(6))
    (videos / "bad.mp4").write_bytes(b"no video")
    line = ["embed", str(data / "clip"), "--data", str(videos), "--out", str(tmp_path / "out")]
    assert main([*line, "--max-bad", "0"]) == 3
    assert main(line) == 0
    assert "1 left out" in capsys.readouterr().err
    found = FeatureSet.open(tmp_path / "out")
    assert (len(found), found.num_captions) == (3, 0)
    assert len(set(found.keys)) == 3
    assert [found.source(row)[1].file for row in range(3)] == ["a.mp4", "b.mp4", "more/a.mp4"]
    assert found.left_out_reasons == {"unreadable": 1}
    assert main(["evaluate", "--features", str(tmp_path / "out")]) == 2
    assert "holds no captions" in capsys.readouterr().err


def test_wrong_sources_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no checkpoint best"):
        load_source(data / "clip", "best")
    with pytest.raises(ValueError, match="no learned token weights"):
        load_source(data / "clip", interaction="att_wti")
