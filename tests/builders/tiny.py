"""A small data set of the demo's clips, and settings of a model that trains in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from builders.batches import damage_sample

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.demo_clips import ANNOTATIONS, demo_scenes, scene_captions, write_clips
from tvr.data_prep.packing.pack import pack_shards
from tvr.trainer.config import Config, DataConfig, ModelConfig, TowersConfig, TrainConfig, merged
from tvr.trainer.model.tokenizer import train_tokenizer

NUM_FRAMES = 3
MAX_WORDS = 20
IMAGE_SIZE = 16


def make_tiny_data(
    folder: Path, *, num_train: int = 48, num_test: int = 10, words: bool = False
) -> None:
    """Packs the splits `train`, `test` and `exchanged` into `folder`, and trains a tokeniser."""
    splits = demo_scenes(num_train, num_test, seed=7)
    for split, scenes in splits.items():
        clips = folder / "clips" / split
        prefix = "train" if split == "train" else "test"
        for _ in write_clips(
            clips, scenes, prefix=prefix, seed=7, workers=1, all_wordings=split == "train"
        ):
            pass
        pack_shards(
            read_annotations(str(clips / ANNOTATIONS)),
            str(folder / split),
            layout="frames",
            num_frames=NUM_FRAMES,
            short_side=IMAGE_SIZE,
            samples_per_shard=10,
            words=words,
        )
    texts = [caption for scene in splits["train"] for caption in scene_captions(scene)]
    train_tokenizer(texts, folder / "tokenizer", vocab_size=560, max_words=MAX_WORDS)


def damaged_data(data: Path, folder: Path, *, rows: Sequence[int]) -> tuple[Path, list[str]]:
    """Copies the training data and flips a byte of some samples; returns their keys as well."""
    shutil.copytree(data / "train", folder)
    samples = read_manifest(str(folder)).samples
    for row in rows:
        damage_sample(folder, row)
    return folder, [str(samples.key[row]) for row in rows]


def tiny_config(folder: Path, **overrides: Any) -> Config:
    """Settings for the folder of `make_tiny_data`; overrides are nested, as in a --config file."""
    base = Config(
        data=DataConfig(
            train=str(folder / "train"),
            test=str(folder / "test"),
            test_exchanged=str(folder / "exchanged"),
            num_frames=NUM_FRAMES,
            max_words=MAX_WORDS,
            workers=0,
        ),
        model=ModelConfig(
            tokenizer=str(folder / "tokenizer"),
            towers=TowersConfig(
                width=32, layers=1, heads=2, embed_width=16, image_size=IMAGE_SIZE, patch_size=8
            ),
            sequence_header_layers=1,
        ),
        train=TrainConfig(
            steps=4, global_batch=8, micro_batch=8, learning_rate=1e-3, encoder_learning_rate=1e-3
        ),
    )
    return merged(base, overrides, where="test")


def with_ranks(config: Config, ranks: int) -> Config:
    """Divides the same global batch among `ranks` ranks."""
    micro_batch = config.train.global_batch // ranks
    return replace(config, train=replace(config.train, micro_batch=micro_batch))
