"""What a rank has met since the start of the job, beside what a step's record says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tally:
    """Kept by `OptimiserStep`, told by the monitor."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Bad samples that were replaced, on any rank, by reason."""
    reads: Counter[str] = field(default_factory=Counter)
    """Samples that this rank's loader read, by READ_SOURCES."""
    loading_s: float = 0.0
    """For which this rank waited for its own loader."""
    alone_s: float | None = None
    """What this rank did in its last step before it needed the others: loading and encoding. None:
    nobody measures it."""
    everyones_s: tuple[float, ...] = ()
    """The same of all ranks, of the step before the last, since it comes with that step's loss."""

    def straggler(self) -> dict[str, Any]:
        """By how much the slowest rank is behind the fastest, and which one it is."""
        if self.alone_s is None or not any(self.everyones_s):
            return {"straggler_gap_s": None, "slowest_rank": None}
        slowest = max(self.everyones_s)
        return {
            "straggler_gap_s": slowest - min(self.everyones_s),
            "slowest_rank": self.everyones_s.index(slowest),
        }
