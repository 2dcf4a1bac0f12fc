"""The budget for bad samples, shared by packing and streaming."""

from __future__ import annotations

from collections import Counter

from tvr.data_prep.records import TooManyBadSamples

EXAMPLES = 5


class Budget:
    """Counts bad samples by reason and raises TooManyBadSamples at the first one beyond `max_bad`.

    A sample counts once however often it is met: a run of many epochs must not spend its budget on
    one bad clip. The count is this process's: a restarted run begins a new one.
    """

    def __init__(self, max_bad: int, what: str) -> None:
        if max_bad < 0:
            raise ValueError(
                f"max_bad={max_bad} must be 0 or more (0 = stop at the first bad sample)"
            )
        self.max_bad = max_bad
        self.what = what
        self.by_reason: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._last: list[str] = []

    def spend(self, key: str, reason: str, detail: str) -> None:
        """Counts one bad sample. Raises TooManyBadSamples when that is one too many."""
        if key in self._seen:
            return
        self._seen.add(key)
        self.by_reason[reason] += 1
        self._last = [*self._last, f"{key}: {reason}: {detail}"][-EXAMPLES:]
        if self.by_reason.total() > self.max_bad:
            raise self.exhausted()

    def exhausted(self) -> TooManyBadSamples:
        """The error that names the counts by reason and the last examples."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())
        return TooManyBadSamples(
            f"{self.by_reason.total()} bad samples {self.what}, max_bad={self.max_bad} allowed"
            f" ({counts or 'none counted'}); last: {' | '.join(self._last) or 'none'}"
        )
