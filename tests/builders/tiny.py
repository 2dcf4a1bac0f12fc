"""A data set of rendered shapes and a model small enough to train in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    """Packs `train`, `test` and `exchanged` under `folder`, and a tokeniser beside them."""
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
    said = [caption for scene in splits["train"] for caption in scene_captions(scene)]
    train_tokenizer(said, folder / "tokenizer", vocab_size=560, max_words=MAX_WORDS)


def damaged_data(data: Path, folder: Path, *, rows: Sequence[int]) -> tuple[Path, list[str]]:
    """A copy of the training data with a byte of some samples flipped, and their keys."""
    shutil.copytree(data / "train", folder)
    samples = read_manifest(str(folder)).samples
    for row in rows:
        shard = folder / f"shard-{int(samples.shard[row]):06d}.tar"
        content = bytearray(shard.read_bytes())
        content[int(samples.offset[row]) + 600] ^= 1
        shard.write_bytes(content)
    return folder, [str(samples.key[row]) for row in rows]


def tiny_config(folder: Path, **overrides: Any) -> Config:
    """Settings for `make_tiny_data`'s folder; overrides are nested, as in a --config file."""
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
    """The same global batch, shared out among that many ranks."""
    micro_batch = config.train.global_batch // ranks
    return replace(config, train=replace(config.train, micro_batch=micro_batch))
