"""Activation checkpointing and torch.compile of the towers' layers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tvr.trainer.config import TrainConfig
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.model.model import TextVideoModel, checkpoint_activations
from tvr.trainer.model.tower_depth import tower_layers

# Environment variable with torch.compile's cache folder.
COMPILE_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def wrap_tower_layers(model: TextVideoModel, train: TrainConfig) -> None:
    """Applies activation checkpointing and torch.compile to the towers' layers, in place.

    Raises:
        ValueError: the layers of a tower are not known.
    """
    if train.activation_checkpointing:
        checkpoint_activations(model)
    for tower in (model.text_tower, model.image_tower):
        if train.compile:
            for layer in tower_layers(tower):
                # In place, so that parameter names stay. fullgraph raises where torch would
                # otherwise run part of a layer uncompiled without a word.
                layer.compile(fullgraph=True)


@contextmanager
def explain_compile_cache_errors(train: TrainConfig) -> Iterator[None]:
    """Replaces torch's error about a broken file in its compile cache by one that names the remedy.

    Raises:
        TrainingFailed: chained to torch's error.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        folder = os.environ.get(COMPILE_CACHE_VARIABLE)  # torch sets it if the user does not
        if not train.compile or folder is None or folder not in str(error):
            raise
        line = next(line for line in str(error).splitlines() if folder in line)
        raise TrainingFailed(
            f"train.compile: {line}. A process that is killed while it compiles leaves a broken"
            f" file in torch's cache: remove {folder}"
        ) from error
