"""The result of a save, as the saver returns it to the training loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """The result of a save. Apart from `blocked_s` and `seconds` it is the same on every rank."""

    step: int
    error: str | None
    """The error on the lowest rank that failed; None: the checkpoint is published."""
    num_bytes: int
    blocked_s: float
    """Seconds for which steps waited on this rank: for the copy and for the agreement of the ranks,
    or for the whole save without `background`."""
    seconds: float
    """From the start to the publication."""
    background: bool
    """True if a copy was written while training continued."""
    no_room: str | None = None
    """Why the state was not copied although `background` was set."""
