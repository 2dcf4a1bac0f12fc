"""The errors of training that a caller acts on."""

from __future__ import annotations


class CheckpointDamaged(Exception):
    """No checkpoint of a run is whole; the message names every file that is not."""


class Fenced(Exception):
    """A newer attempt has taken over the run: this process must not write to it any more."""


class TrainingFailed(Exception):
    """Something broke after the first step began: not the user's input; its cause is chained."""


class NotSaved(Exception):
    """A run or its job ends with a step whose checkpoint could not be saved."""


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite on some rank; raised on all ranks before the optimiser step."""


class Preempted(Exception):
    """The job was told to leave; its state is saved, and the same command goes on from there."""


class PreflightFailed(ValueError):
    """A run cannot begin, for a reason on some ranks; raised on all of them.

    `rank` is the lowest one whose node or network is at fault, so that the job may begin elsewhere
    or later; none: its settings are.
    """

    def __init__(self, lines: list[str], rank: int | None = None) -> None:
        super().__init__(lines, rank)  # as it is pickled for the other ranks
        self.lines = lines
        self.rank = rank

    def __str__(self) -> str:
        return "; ".join(self.lines)


class AlreadyReported(Exception):
    """A failure that a rank of the job has told on stderr: nothing is left but to end."""

    def __init__(self, code: int) -> None:
        super().__init__(f"told; exit code {code}")
        self.code = code
