"""Errors of training that a caller handles by type."""

from __future__ import annotations


class CheckpointDamaged(Exception):
    """A run has checkpoints, and none of them is whole; the message names every damaged file."""


class Fenced(Exception):
    """A newer attempt has taken over the run, so this process must not write to it any more."""


class TrainingFailed(Exception):
    """Training failed after the first step began; the cause is chained."""


class NotSaved(Exception):
    """A run or its job ended with a step whose checkpoint could not be saved."""


class NonFiniteLoss(Exception):
    """The loss or its gradient is NaN or infinite on some rank; raised on all ranks."""


class Preempted(Exception):
    """A signal asked the job to stop; its state is saved, and the same command resumes it."""


class PreflightFailed(ValueError):
    """A check before the first step failed on some rank; raised on all ranks.

    `rank` is the lowest rank whose node or network is at fault: the job may start on other nodes,
    or later. None means that the settings are at fault.
    """

    def __init__(self, lines: list[str], rank: int | None = None) -> None:
        super().__init__(lines, rank)  # pickled for the other ranks with these arguments
        self.lines = lines
        self.rank = rank

    def __str__(self) -> str:
        return "; ".join(self.lines)


class AlreadyReported(Exception):
    """A rank of the job has written the failure to stderr; this process only has to exit."""

    def __init__(self, code: int) -> None:
        super().__init__(f"already reported; exit code {code}")
        self.code = code
