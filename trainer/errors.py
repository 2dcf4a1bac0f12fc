"""The errors of training that a caller acts on."""

from __future__ import annotations


class CheckpointIncompatible(Exception):
    """A checkpoint that this run cannot continue; the message says what differs."""


class TrainingFailed(Exception):
    """Something broke after the first step began: not the user's input; its cause is chained."""


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite on some rank; raised on all ranks before the optimiser step."""
