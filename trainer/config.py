"""All settings of a run, in sections.

A recipe comes first, `--config FILE` overrides it, and flags override both. The result is resolved
once and written to `run_dir/config.json`. No setting is derived from another one: functions compute
derived numbers, such as accumulation steps, and commands print them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic
from pydantic.dataclasses import dataclass

from tvr.trainer.config_sections.data_section import DataConfig, TrainSetConfig
from tvr.trainer.config_sections.field_types import STRICT, NotNegative, Positive
from tvr.trainer.config_sections.loss_section import LossConfig
from tvr.trainer.config_sections.model_section import (
    Freeze,
    HeadPart,
    InitPart,
    ModelConfig,
    TowerPart,
    TowersConfig,
)
from tvr.trainer.config_sections.output_sections import (
    CheckpointConfig,
    MetricsConfig,
    WriterName,
)
from tvr.trainer.config_sections.train_section import TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Freeze",
    "HeadPart",
    "InitPart",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "NotNegative",
    "Positive",
    "TowerPart",
    "TowersConfig",
    "TrainConfig",
    "TrainSetConfig",
    "WriterName",
    "accumulation_steps",
    "from_json",
    "masks_equal_captions",
    "merged",
    "merged_objects",
    "read_overrides",
    "to_json",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """All settings of a run."""

    data: DataConfig
    """Data sets and reading."""
    model: ModelConfig = ModelConfig()
    """Towers and heads."""
    loss: LossConfig = LossConfig()
    """Objective."""
    train: TrainConfig
    """Steps, batches, optimiser, memory."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics."""


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Returns the micro-steps per optimiser step, which is forwards of each rank per update.

    Raises:
        ValueError: the global batch is not a multiple of micro_batch x world_size.
    """
    per_micro_step = train.micro_batch * world_size
    if train.global_batch % per_micro_step:
        raise ValueError(
            f"train.global_batch={train.global_batch} must be a multiple of micro_batch x ranks = "
            f"{train.micro_batch} x {world_size} = {per_micro_step}; set either in the recipe or "
            "by --train.global-batch / --train.micro-batch"
        )
    return train.global_batch // per_micro_step


def masks_equal_captions(loss: LossConfig) -> bool:
    """True if videos with a pair's caption are no negatives of it."""
    if loss.mask_equal_captions is None:
        return loss.similarity == "neg_nce" and loss.neg_nce_mode in ("log", "set")
    return loss.mask_equal_captions


def to_json(config: Config) -> str:
    """Returns the configuration as JSON, from which `from_json` restores an equal one."""
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(text: str, *, where: str) -> Config:
    """Reads JSON that `to_json` wrote.

    Args:
        where: Source of the text, for error messages.

    Raises:
        ValueError: names `where`, the field and the allowed values.
    """
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_describe(error)}") from None


def merged(base: Config, overrides: Mapping[str, Any], *, where: str) -> Config:
    """Returns `base` with nested overrides applied.

    Args:
        where: Source of the overrides, for error messages.

    Raises:
        ValueError: names `where`, the field and the allowed values.
    """
    try:
        # Through JSON, so that the same strict types hold as in a file.
        text = json.dumps(merged_objects(asdict(base), overrides))
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_describe(error)}") from None


def read_overrides(path: Path) -> Mapping[str, Any]:
    """Reads the partial, nested settings of a JSON file.

    Raises:
        ValueError: the file is missing, or holds no JSON object.
    """
    try:
        overrides = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--config {path}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(overrides, dict):
        raise ValueError(f"--config {path}: holds {type(overrides).__name__}, not an object")
    return overrides


def merged_objects(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with the values of `overrides`; objects in both are merged in turn."""
    result = dict(base)
    for name, value in overrides.items():
        inner = result.get(name)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            result[name] = merged_objects(inner, value)
        else:
            result[name] = value
    return result


def _describe(error: pydantic.ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        # An error of a whole section names the values itself: `input` would be the section.
        is_plain = problem["type"] in ("missing", "value_error")
        given = "" if is_plain else f" (given: {problem.get('input')!r})"
        lines.append(f"{field}: {problem['msg']}{given}")
    return "; ".join(lines)
