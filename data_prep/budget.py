"""The budget for bad samples, shared by packing and streaming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tvr.data_prep.records import TooManyBadSamples

EXAMPLES = 5


class BadSampleBudget:
    """Counts bad samples by reason and raises TooManyBadSamples at the first one beyond `max_bad`,
    or beyond `max_bad_in_a_row` (None: no limit).

    A sample counts once for `max_bad`, however often it is met: a run of many epochs must not spend
    its budget on one bad clip. Every failure counts for `max_bad_in_a_row`, which is about a store
    that is down. `known` are bad samples that count already, each with its reason: those that a run
    met before it was started again.
    """

    def __init__(
        self,
        max_bad: int,
        what: str,
        max_bad_in_a_row: int | None = None,
        *,
        known: Mapping[str, str] | None = None,
    ) -> None:
        if max_bad < 0:
            raise ValueError(
                f"max_bad={max_bad} must be 0 or more (0 = stop at the first bad sample)"
            )
        if max_bad_in_a_row is not None and max_bad_in_a_row < 1:
            raise ValueError(f"max_bad_in_a_row={max_bad_in_a_row} must be 1 or more")
        self.max_bad = max_bad
        self.max_bad_in_a_row = max_bad_in_a_row
        self.what = what
        self.by_reason: Counter[str] = Counter((known or {}).values())
        self._seen: set[str] = set(known or {})
        self._last: list[str] = []
        self._in_a_row = 0

    def record_bad(self, key: str, reason: str, detail: str) -> None:
        """Counts one bad sample. Raises TooManyBadSamples when that is one too many."""
        self._in_a_row += 1
        if key not in self._seen:
            self._seen.add(key)
            self.by_reason[reason] += 1
            self._last = [*self._last, f"{key}: {reason}: {detail}"][-EXAMPLES:]
            if self.by_reason.total() > self.max_bad:
                raise self.exhausted_error()
        if self.max_bad_in_a_row is not None and self._in_a_row > self.max_bad_in_a_row:
            raise self.exhausted_error()

    def record_good(self) -> None:
        """A sample was read as asked for: what fails next is the first in a row."""
        self._in_a_row = 0

    def exhausted_error(self) -> TooManyBadSamples:
        """The error that names the counts by reason and the last examples."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())
        if self.max_bad_in_a_row is not None and self._in_a_row > self.max_bad_in_a_row:
            limit = f"{self._in_a_row} in a row, max_bad_in_a_row={self.max_bad_in_a_row} allowed"
        else:
            limit = f"max_bad={self.max_bad} allowed"
        return TooManyBadSamples(
            f"{self.by_reason.total()} bad samples {self.what}, {limit}"
            f" ({counts or 'none counted'}); last: {' | '.join(self._last) or 'none'}"
        )
