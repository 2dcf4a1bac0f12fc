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


class PreflightFailed(ValueError):
    """Something is wrong with the job's surroundings, on some ranks; raised on all of them."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class Told(Exception):
    """A failure that a rank of the job has told on stderr: nothing is left but to end."""

    def __init__(self, code: int) -> None:
        super().__init__(f"told; exit code {code}")
        self.code = code
