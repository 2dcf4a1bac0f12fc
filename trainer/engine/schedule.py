"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """Share of the peak rate at optimiser step `step` (0-based) of `steps`.

    Linear from 1 / warmup_steps up to 1, then a cosine that would reach 0 at `steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
