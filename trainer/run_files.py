"""Names of the files in a run's folder, and its settings by name; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CONFIG = "config.json"
EVALUATION = "evaluation.json"


def step_evaluation(step: int) -> str:
    """The file of a later evaluation of one step, which leaves evaluation.json as it is."""
    return f"evaluation-step-{step:08d}.json"


def named_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a nested configuration with its full name, such as train.steps."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from named_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
