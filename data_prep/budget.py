"""The budget for bad samples, shared by packing and reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tvr.data_prep.records import (
    LIMIT_REASONS,
    TRANSIENT_REASONS,
    Batch,
    RefusedRow,
    Replacement,
    TooManyBadSamples,
    TrainingSet,
    set_of_key,
)

NUM_EXAMPLES = 5
# Rows that are read for more examples once there are too many bad ones.
LOOK_FURTHER = 1000


class BadSampleBudget:
    """Counts bad samples by reason and raises TooManyBadSamples beyond a limit.

    A sample counts once towards `max_bad`, however often it fails: a run of many epochs must not
    spend its budget on one bad clip. Every failure counts towards `max_bad_in_a_row`, which detects
    a damaged part of a data set.

    A read that fails for a reason outside of the sample (TRANSIENT_REASONS) counts towards
    `max_unavailable_in_a_row` only, which detects a storage that is down.

    Args:
        max_bad: Allowed number of different bad samples.
        activity: Activity that the error message names, such as "while packing URL".
        max_bad_in_a_row: Allowed number of consecutive bad samples; None means no limit.
        max_unavailable_in_a_row: Allowed number of consecutive reads that fail for the moment; None
            means no limit.
        known: Reasons by key of bad samples from earlier starts of the run; they count already.
    """

    def __init__(
        self,
        max_bad: int,
        activity: str,
        max_bad_in_a_row: int | None = None,
        *,
        max_unavailable_in_a_row: int | None = None,
        known: Mapping[str, str] | None = None,
    ) -> None:
        if max_bad < 0:
            raise ValueError(
                f"max_bad={max_bad} must be 0 or more (0 = stop at the first bad sample)"
            )
        if max_bad_in_a_row is not None and max_bad_in_a_row < 1:
            raise ValueError(f"max_bad_in_a_row={max_bad_in_a_row} must be 1 or more")
        if max_unavailable_in_a_row is not None and max_unavailable_in_a_row < 1:
            raise ValueError(
                f"max_unavailable_in_a_row={max_unavailable_in_a_row} must be 1 or more"
            )
        self.max_bad = max_bad
        self.max_bad_in_a_row = max_bad_in_a_row
        self.max_unavailable_in_a_row = max_unavailable_in_a_row
        self.activity = activity
        self.by_reason: Counter[str] = Counter((known or {}).values())
        self._counted_keys: set[str] = set(known or {})
        self._examples: list[str] = []
        self._num_in_a_row = 0
        self._unavailable_in_a_row: list[str] = []

    def record_bad(self, key: str, reason: str, detail: str) -> None:
        """Counts a bad sample, or a read that failed for the moment.

        Raises:
            TooManyBadSamples: it exceeds a limit.
        """
        if reason in TRANSIENT_REASONS:
            self._unavailable_in_a_row.append(f"{key}: {detail}")
            limit = self.max_unavailable_in_a_row
            if limit is not None and len(self._unavailable_in_a_row) > limit:
                raise self.exhausted_error()
            return
        self._num_in_a_row += 1
        if key not in self._counted_keys:
            self._counted_keys.add(key)
            self.by_reason[reason] += 1
            self._examples = [*self._examples, f"{key}: {reason}: {detail}"][-NUM_EXAMPLES:]
            if self.by_reason.total() > self.max_bad:
                raise self.exhausted_error()
        if self.max_bad_in_a_row is not None and self._num_in_a_row > self.max_bad_in_a_row:
            raise self.exhausted_error()

    def record_good(self) -> None:
        """Resets the consecutive-failure counts."""
        self._num_in_a_row = 0
        self._unavailable_in_a_row.clear()

    def exhausted_error(self) -> TooManyBadSamples:
        """Returns the error with the counts by reason and the last examples."""
        if self._unavailable_in_a_row:
            return self._unavailable_error()
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())
        if self.max_bad_in_a_row is not None and self._num_in_a_row > self.max_bad_in_a_row:
            limit = (
                f"{self._num_in_a_row} in a row, max_bad_in_a_row={self.max_bad_in_a_row} allowed"
            )
        else:
            limit = f"max_bad={self.max_bad} allowed"
        return TooManyBadSamples(
            f"{self.by_reason.total()} bad samples {self.activity}, {limit}"
            f" ({counts or 'none counted'}); last: {' | '.join(self._examples) or 'none'}"
            f"{self._limits_hint()}"
        )

    def _limits_hint(self) -> str:
        """Says that bad samples may be the machine's fault, if some are."""
        by_limit = sum(self.by_reason[reason] for reason in LIMIT_REASONS)
        if not by_limit:
            return ""
        return (
            f"; {by_limit} of them reached a limit of this machine ({', '.join(LIMIT_REASONS)}): if"
            " the clips are good, its memory is short or its storage hangs; pack with fewer"
            " --processes, or larger --clip-memory-gb or --clip-timeout-s"
        )

    def _unavailable_error(self) -> TooManyBadSamples:
        failed = self._unavailable_in_a_row
        limit = self.max_unavailable_in_a_row
        allowed = "" if limit is None else f" (max_unavailable_in_a_row={limit} allowed)"
        return TooManyBadSamples(
            f"{len(failed)} reads in a row failed for the moment {self.activity}{allowed}: the"
            " storage is down, unreachable or throttles; no sample is bad for it, and a restart"
            f" reads them again; last: {' | '.join(failed[-NUM_EXAMPLES:])}"
        )


class BadRows:
    """Collects rows of annotations that are no clips, and raises TooManyBadSamples for too many.

    Args:
        max_bad: Allowed number of rows.
    """

    def __init__(self, max_bad: int) -> None:
        self.max_bad = max_bad
        self._rows: list[tuple[int, int, RefusedRow]] = []
        self._exceeded_at: int | None = None

    def add(self, place: int, row: RefusedRow) -> None:
        """Adds a row that stands before the clip of number `place`."""
        self._rows.append((place, len(self._rows), row))

    def rows(self) -> tuple[RefusedRow, ...]:
        """Returns the rows by their places."""
        return tuple(row for _, _, row in sorted(self._rows, key=lambda entry: entry[:2]))

    def check(self, num_rows: int, *, is_end: bool = False) -> None:
        """Compares the number of rows with the limit.

        Args:
            num_rows: Rows that were read, good and bad.
            is_end: No more rows follow, which could serve as examples.

        Raises:
            TooManyBadSamples: there are too many; the message has the first ones.
        """
        if len(self._rows) <= self.max_bad:
            return
        if self._exceeded_at is None:
            self._exceeded_at = num_rows
        is_further = num_rows - self._exceeded_at >= LOOK_FURTHER
        if is_end or is_further or len(self._rows) >= NUM_EXAMPLES:
            first = " | ".join(row.detail for row in self.rows()[:NUM_EXAMPLES])
            raise TooManyBadSamples(
                f"{len(self._rows)} of the first {num_rows:,} rows of the annotations are bad,"
                f" max_bad={self.max_bad} allowed; nothing was packed; first: {first}"
            )


def set_budgets(
    sets: Sequence[TrainingSet],
    where: str,
    max_bad_in_a_row: int | None = None,
    *,
    max_unavailable_in_a_row: int | None = None,
    known: Mapping[str, str] | None = None,
) -> dict[str, BadSampleBudget]:
    """Returns a budget for each training set, by its name.

    Args:
        sets: Training sets.
        where: Ranks that the error messages name, such as "on rank 3".
        max_bad_in_a_row: As for `BadSampleBudget`, for each set.
        max_unavailable_in_a_row: As for `BadSampleBudget`, for each set.
        known: Reasons by key of known bad samples of all sets; each counts for the set in its key.
    """
    return {
        each.name: BadSampleBudget(
            each.max_bad,
            f"in {f'the set {each.name}, ' if each.name else ''}{each.url} {where}",
            max_bad_in_a_row,
            max_unavailable_in_a_row=max_unavailable_in_a_row,
            known={
                key: reason for key, reason in (known or {}).items() if set_of_key(key) == each.name
            },
        )
        for each in sets
    }


def within_budget(
    batches: Iterable[Batch], budgets: Mapping[str, BadSampleBudget], min_rows: int
) -> Iterator[Batch]:
    """Yields the batches, and counts their samples for the budgets of their sets.

    Args:
        batches: Batches of one rank.
        budgets: Budget of each set by its name, see `set_of_key`.
        min_rows: A batch with fewer rows has a position that could not be filled.

    Raises:
        TooManyBadSamples: a budget is exceeded, or a position could not be filled.
    """
    for batch in batches:
        _spend(budgets, batch)
        if len(batch.keys) < min_rows:
            # The last position is the one that stayed empty.
            raise budgets[set_of_key(batch.replaced[-1].key)].exhausted_error()
        yield batch


def _spend(budgets: Mapping[str, BadSampleBudget], batch: Batch) -> None:
    """Counts bad samples in the order of positions.

    A good substitute does not reset the consecutive-failure count: it comes from anywhere in its
    data set, so it does not show that the shard in use is readable.
    """
    bad: dict[int, list[Replacement]] = {}
    for entry in batch.replaced:
        bad.setdefault(entry.position, []).append(entry)
    keys = dict(zip(batch.positions.tolist(), batch.keys, strict=True))
    for position in sorted({*keys, *bad}):
        for entry in bad.get(position, ()):
            budget = budgets[set_of_key(entry.key)]
            budget.record_bad(entry.key, entry.reason, entry.detail)
        if position not in bad:
            budgets[set_of_key(keys[position])].record_good()
