"""Which checkpoint a command reads: the newest, the best, or that of a step."""

from __future__ import annotations

import logging
from typing import Literal

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import best_step, published_steps, read_scores

CheckpointChoice = Literal["newest", "best"] | int

log = logging.getLogger(__name__)


def parse_choice(text: str, flag: str = "--checkpoint") -> CheckpointChoice:
    """Reads `newest`, `best` or the number of a step.

    Args:
        flag: Name of the option, for the error.

    Raises:
        ValueError: it is none of these.
    """
    if text == "newest":
        return "newest"
    if text == "best":
        return "best"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ValueError(f"{flag} {text}: give newest, best, or the number of a step")


def chosen_step(storage: StorageFolder, choice: CheckpointChoice) -> int | None:
    """The step of a checkpoint that is there; None for the newest one, whatever its step.

    Raises:
        ValueError: there is none of that step, or none was evaluated; names the steps there are.
        PreflightFailed: a manifest cannot be read at the moment.
    """
    if choice == "newest":
        return None
    steps = published_steps(storage)
    if choice != "best":
        if choice not in steps:
            raise ValueError(
                f"{storage.url} has no checkpoint of step {choice}; {_listed(storage, steps)}"
            )
        return choice
    best, best_of_all = best_step(storage, steps), best_step(storage)
    if best is None:
        raise ValueError(
            f"{storage.url} has no best checkpoint, since no saved step was evaluated (data.test,"
            f" train.eval_every, checkpoint.every); {_listed(storage, steps)}"
        )
    if best != best_of_all:
        log.warning(
            "step %s scored higher, but its checkpoint is not there; step %s is the best of those"
            " that are",
            best_of_all,
            best,
        )
    return best


def _listed(storage: StorageFolder, steps: list[int]) -> str:
    if not steps:
        return "it has none at all"
    best = best_step(storage, steps)
    text = f"it has those of step {', '.join(map(str, steps))}"
    scored = read_scores(storage)
    return text if best is None else f"{text}; step {best} is the best, with {scored[best]:.2f}"
