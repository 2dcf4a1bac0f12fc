"""Counters of a rank, beside the values of a step's record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class RankCounters:
    """Counters since the start of the job: `TrainStep` advances them, the monitor exports them."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Bad samples that were replaced on any rank, by reason."""
    skipped_by_set: Counter[str] = field(default_factory=Counter)
    """The same samples by the name of their training set; empty for the only set."""
    reads: Counter[str] = field(default_factory=Counter)
    """Samples that this rank's loader read, by READ_SOURCES."""
    loading_s: float = 0.0
    """Time that this rank waited for its own loader."""
    local_work_s: float | None = None
    """This rank's local work in its last step: loading and encoding, before it needs the other
    ranks. None: no monitor measures it."""
    local_work_by_rank_s: tuple[float, ...] = ()
    """Every rank's local work time, one step late: it travels with the next step's loss."""

    def straggler(self) -> tuple[float | None, int | None]:
        """The gap between the slowest and the fastest rank in seconds, and the slowest rank.

        Both are None before the first measurement, and where nothing is measured.
        """
        if self.local_work_s is None or not any(self.local_work_by_rank_s):
            return None, None
        slowest = max(self.local_work_by_rank_s)
        gap = slowest - min(self.local_work_by_rank_s)
        return gap, self.local_work_by_rank_s.index(slowest)
