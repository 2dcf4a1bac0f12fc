"""Recipes: full configurations by name. Each is a function without arguments.

The door of the package.
"""

from __future__ import annotations

from collections.abc import Callable

from tvr.trainer.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TowersConfig,
    TrainConfig,
)
from tvr.trainer.recipes import benchmarks


def demo() -> Config:
    """The demo: a small CLIP from scratch on clips of moving shapes, in minutes on 2 CPU cores."""
    return Config(
        data=DataConfig(
            train="runs/demo/data/train",
            test="runs/demo/data/test",
            test_exchanged="runs/demo/data/exchanged",
            num_frames=6,
            max_words=24,
            workers=0,
            cache_mib=512,
        ),
        model=ModelConfig(
            tokenizer="runs/demo/tokenizer",
            towers=TowersConfig(
                width=128, layers=3, heads=4, embed_width=128, image_size=48, patch_size=12
            ),
            sequence_header_layers=2,
        ),
        loss=LossConfig(),
        train=TrainConfig(
            steps=300,
            global_batch=128,
            micro_batch=64,
            learning_rate=1e-3,
            encoder_learning_rate=1e-3,
            warmup_steps=30,
            weight_decay=0.05,
            eval_every=100,
        ),
        checkpoint=CheckpointConfig(every=100),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    build.__name__: build
    for build in (
        demo,
        benchmarks.msrvtt_b32,
        benchmarks.msrvtt_b16,
        benchmarks.msvd_b32,
        benchmarks.didemo_b32,
        benchmarks.activitynet_b32,
        benchmarks.large_scale_l14_64gpu,
    )
}


def recipe(name: str) -> Config:
    """Returns the configuration of a recipe.

    Raises:
        ValueError: there is no recipe of that name; lists all names.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe {name} is unknown; available are: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
