"""A BERT beside a PVT, the authors' kind of pair, trains, resumes bit for bit and exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.spawn import spawn
from builders.tiny import MAX_WORDS, make_tiny_data, tiny_config
from builders.tower_pairs import SIDE, save_text_encoder, save_vision_encoder
from torch import Tensor
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderModel

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.launchers.cli import main
from tvr.trainer.config import Config, merged
from tvr.trainer.evaluation.export import load_exported
from tvr.trainer.evaluation.model_source import load_source
from tvr.trainer.evaluation.saved_run import load_run
from tvr.trainer.loop import train
from tvr.trainer.run_dir import read_config

STAGES = (2, 3)
PAIRS = {"bert-pvt": ("bert", "pvt"), "mean-vit": ("mean", "vit"), "lora": ("bert", "vit")}
EXACT = {"exact": ("still", "pvt")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    make_tiny_data(root, num_train=16)
    clips = read_annotations(str(root / "clips" / "train" / ANNOTATIONS))
    captions = [caption for clip in clips for caption in clip.captions]
    save_text_encoder(root / "bert", "bert", captions)
    save_text_encoder(root / "mean", "bert", captions, pooling="mean_tokens")
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_text_encoder(root / "still", "bert", captions, **still)
    for kind in ("pvt", "vit"):  # larger than the stored frames: four stages halve them
        save_vision_encoder(root / kind, kind)
    return root


def settings(data: Path, pair: str, stage: int, **train_settings: Any) -> Config:
    text, vision = (PAIRS | EXACT)[pair]
    return tiny_config(
        data,
        model={
            "tokenizer": None,
            "text_tower": str(data / text),
            "vision_tower": str(data / vision),
            "lora_rank": 2 if pair == "lora" else 0,
        },
        train={"steps": 4, "micro_batch": 4, "zero_stage": stage} | train_settings,
        checkpoint={"every": 2, "keep_last": 2},
        metrics={"enabled": False},
    )


def run_ranks(rank: int, world_size: int, data: Path, folder: Path) -> None:
    train(settings(data, "exact", 1), folder / "exact")
    for stage in STAGES:
        config, whole, resumed = (
            settings(data, "bert-pvt", stage),
            folder / f"whole-{stage}",
            folder / f"resumed-{stage}",
        )
        train(config, whole)
        if rank == 0:
            jobs.copy_run_at_step(2, whole, resumed)
        train(config, resumed)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    spawn(run_ranks, 2, data, folder, timeout_s=400)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_and_resume_bit_for_bit(data: Path, runs: Path, stage: int) -> None:
    config = settings(data, "bert-pvt", stage)
    whole, resumed = runs / f"whole-{stage}", runs / f"resumed-{stage}"
    assert [event["step"] for event in jobs.events(resumed, "resumed")] == [2]
    assert jobs.losses(resumed) == jobs.losses(whole)
    ours, theirs = (jobs.final_weights(each, config) for each in (resumed, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    # BERT's dropout is on: a resume continues its random numbers.
    assert load_run(whole, config)[0].text_tower.config.hidden_dropout_prob == 0.1


@pytest.fixture(scope="module")
def exported(data: Path, runs: Path) -> Path:
    shutil.copytree(runs / "whole-3", data / "run-bert-pvt")
    for pair in ("mean-vit", "lora"):
        train(settings(data, pair, 2, micro_batch=8), data / f"run-{pair}")
    for pair in PAIRS:
        code = main(["export", "--run-dir", str(data / f"run-{pair}"), "--out", f"{data / pair}"])
        assert code == 0
    return data


@pytest.mark.parametrize("pair", PAIRS)
def test_an_export_is_a_folder_of_hugging_face(exported: Path, pair: str) -> None:
    run = exported / f"run-{pair}"
    config = read_config(run)
    model, tokenizer, _ = load_run(run, config)
    ours, again = model.eval(), load_exported(exported / pair)
    loaded: Any = VisionTextDualEncoderModel.from_pretrained(
        exported / pair, output_loading_info=True
    )
    whole, found = loaded
    left_out = {"bert-pvt": set(), "lora": set(), "mean-vit": {"pooler"}}[pair]
    assert {name.split(".")[1] for name in found["missing_keys"]} == left_out
    assert not found["unexpected_keys"]
    assert isinstance(AutoModel.from_pretrained(exported / pair), VisionTextDualEncoderModel)
    processor = AutoProcessor.from_pretrained(exported / pair)
    texts = processor.tokenizer(
        ["A small red circle moves left", "a large blue square moves right"],
        padding="max_length",
        truncation=True,
        max_length=MAX_WORDS,
        return_tensors="pt",
    )
    frames = torch.randint(0, 256, (2, 3, 3, SIDE, SIDE), dtype=torch.uint8)
    images = processor.image_processor(
        [frame.numpy() for frame in frames.flatten(0, 1)],
        return_tensors="pt",
        input_data_format="channels_first",
    )
    ids, mask = texts["input_ids"], texts["attention_mask"]
    inputs = (frames, torch.ones(2, 3, dtype=torch.long), ids, mask)
    with torch.no_grad():
        here, there = ours(*inputs), again(*inputs)
        text: Any = whole.eval().text_model(**texts)
        image: Any = whole.vision_model(**images)
        sentence = masked_mean(text, mask) if pair == "mean-vit" else text.pooler_output
        frame = image.last_hidden_state[:, 0] if pair == "bert-pvt" else image.pooler_output
        sentence, frame = whole.text_projection(sentence), whole.visual_projection(frame)
        ours.sequence_header = None
        plain = ours(*inputs)
    for name in ("sentence", "words", "frames", "word_logits", "frame_logits"):
        assert torch.allclose(getattr(here, name), getattr(there, name), atol=1e-6), name
    assert torch.allclose(plain.sentence, unit(sentence), atol=1e-5)
    assert torch.allclose(plain.frames.flatten(0, 1), unit(frame), atol=1e-5)
    assert whole.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)
    if pair == "lora":  # where its own forward pools as we do
        own: Any = whole(**texts, **images)
        assert torch.allclose(plain.sentence, own.text_embeds, atol=1e-5)
        assert torch.allclose(plain.frames.flatten(0, 1), own.image_embeds, atol=1e-5)
    assert tokenizer.backend.get_vocab() == processor.tokenizer.get_vocab()


def masked_mean(text: Any, mask: Tensor) -> Tensor:
    weight = mask[..., None].float()
    return (text.last_hidden_state * weight).sum(1) / weight.sum(1)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_the_card_says_how_the_towers_are_pooled(exported: Path) -> None:
    card = (exported / "mean-vit" / "README.md").read_text()
    assert "The towers started from `mean` and `vit`." in card
    assert "import AutoProcessor, VisionTextDualEncoderModel\n" in card
    captions = ["A small red circle", "a large blue square moves"]
    images = [torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8).numpy()]
    for pair in PAIRS:
        code = (exported / pair / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {
            "folder": str(exported / pair),
            "captions": captions,
            "images": images,
        }
        exec(code, names)
        source = load_source(exported / pair)
        assert source.model.sequence_header is not None
        source.model.sequence_header = None
        found = source.encode_texts(captions)
        assert torch.allclose(found.sentence, unit(names["sentences"]), atol=1e-5)
        frame = source.encode_frames([images[0][None]]).frames[0, :1]
        assert torch.allclose(frame, unit(names["frames"]), atol=1e-5)
        assert len(source.fingerprint) == 64


def test_a_run_starts_from_another_one(exported: Path, tmp_path: Path) -> None:
    start = {"init_from": str(exported / "bert-pvt")}
    base = settings(exported, "bert-pvt", 1, micro_batch=8, steps=1, learning_rate=1e-12)
    config = merged(base, {"model": start, "train": {"encoder_learning_rate": 1e-12}}, where="test")
    train(config, tmp_path / "run")
    ours, _, _ = load_run(tmp_path / "run", config)
    theirs = load_exported(exported / "bert-pvt")
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=1e-9), name


def test_two_ranks_equal_one(data: Path, runs: Path, tmp_path: Path) -> None:
    """Without dropout: each rank has random numbers of its own."""
    train(settings(data, "exact", 1, micro_batch=8), tmp_path / "run")
    one, two = jobs.losses(tmp_path / "run"), jobs.losses(runs / "exact")
    assert one == pytest.approx(two, rel=1e-4)
    assert len(one) == 4
    assert abs(one[0] - one[-1]) > 0.01
