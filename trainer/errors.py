"""The errors of training that a caller acts on."""

from __future__ import annotations


class CheckpointDamaged(Exception):
    """No checkpoint of a run is whole; the message names every file that is not."""


class Fenced(Exception):
    """A newer attempt has taken over the run: this process must not write to it any more."""


class TrainingFailed(Exception):
    """Something broke after the first step began: not the user's input; its cause is chained."""


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite on some rank; raised on all ranks before the optimiser step."""


class Preempted(Exception):
    """The job was told to leave; its state is saved, and the same command goes on from there."""
