"""Reads the weights from which a new run starts (`model.init_from`)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tvr.trainer.checkpoint.choice import CheckpointChoice, parse_choice
from tvr.trainer.checkpoint.restore import find_newest_weights, read_weights
from tvr.trainer.config import ModelConfig
from tvr.trainer.evaluation.export import SETTINGS, load_exported
from tvr.trainer.evaluation.initial_weights import load_initial, merged_adapters, parts_of
from tvr.trainer.evaluation.saved_run import ALONE
from tvr.trainer.model.model import TextVideoModel, tokenizer_folder
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.run_dir import checkpoints_of, read_config

_CHOSEN = re.compile(r"(.+)@(newest|best|\d+)")


class WarmStart:
    """Weights of another model, for the parts of a new run that `model.init_parts` names."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer) -> None:
        """Reads and verifies the weights.

        Raises:
            ValueError: the source is neither a run nor an export, or has no such checkpoint; or its
                text tower belongs to another vocabulary.
            CheckpointDamaged: the checkpoint is damaged.
        """
        assert model.init_from is not None, "there is nothing to start from"
        self._source, self._parts = model.init_from, model.init_parts
        folder, choice = split_source(model.init_from)
        if (folder / SETTINGS).is_file():
            if choice != "newest":
                raise ValueError(f"{folder} is an export, of one step: leave out @{choice}")
            self._weights: Mapping[str, Tensor] = load_exported(folder).state_dict()
            words = folder
        else:
            self._weights = _run_weights(folder, choice)
            words = Path(tokenizer_folder(read_config(folder).model))
        if "text_tower" in parts_of(self._parts):
            _check_vocabulary(words, tokenizer, self._source)

    def apply(self, built: TextVideoModel) -> None:
        """Loads the weights into a model without LoRA. Raises as `load_initial`."""
        weights, self._weights = self._weights, {}  # one copy of a model is enough
        load_initial(built, weights, self._parts, self._source)


def split_source(text: str) -> tuple[Path, CheckpointChoice]:
    """Splits RUN@best or RUN@300 into folder and checkpoint; a folder of that name comes first."""
    match = None if Path(text).exists() else _CHOSEN.fullmatch(text)
    if match is None:
        return Path(text), "newest"
    return Path(match[1]), parse_choice(match[2], "model.init_from @")


def _run_weights(run_dir: Path, choice: CheckpointChoice) -> dict[str, Tensor]:
    config = read_config(run_dir)
    storage = checkpoints_of(config.checkpoint, run_dir)
    with tempfile.TemporaryDirectory(prefix="tvr-init-") as name:
        checkpoint = find_newest_weights(storage, ALONE, Path(name), choice)
        if checkpoint is None:
            raise ValueError(f"model.init_from={run_dir} has no checkpoint yet")
        weights = merged_adapters(read_weights(storage, checkpoint, Path(name)))
        # A file on disk may be mapped: the values must outlive the folder.
        return {name: value.clone() for name, value in weights.items()}


def _check_vocabulary(folder: Path, tokenizer: Tokenizer, source: str) -> None:
    """Refuses a text tower whose rows are those of other words; shapes alone would not show it."""
    if not folder.is_dir():
        return  # moved or removed; names and shapes are still compared
    other = load_tokenizer(folder, tokenizer.max_words)
    if other.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ValueError(
            f"model.init_from={source}: its text tower was trained with the vocabulary of {folder},"
            " which is not that of model.tokenizer; give that tokeniser, or leave text_tower out"
            " of model.init_parts"
        )
