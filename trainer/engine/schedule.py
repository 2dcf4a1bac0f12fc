"""Learning-rate schedule as a pure function of the step, so that a checkpoint holds none of it."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """Returns the share of the peak learning rate at an optimiser step.

    It rises linearly from 1 / warmup_steps to 1, then follows a cosine that reaches 0 at `steps`.

    Args:
        step: Optimiser step, counted from 0.
        steps: Optimiser steps of the whole run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
