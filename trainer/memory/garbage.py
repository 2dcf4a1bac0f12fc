"""Python's garbage collector, run on a schedule that all ranks share.

The collector frees objects that refer to each other in a circle; all others are freed at once
without it. It starts after a number of allocations, so each rank of a job pauses at another step,
and every time all other ranks wait. At equal steps the pauses fall together.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GarbageSchedule:
    """The steps after which garbage is collected."""

    every: int
    """Steps between collections; 0: Python decides."""

    def step_finished(self, step: int) -> None:
        """Collects garbage if it is due after `step`."""
        if self.every and step % self.every == 0:
            gc.collect()


@contextmanager
def scheduled_garbage_collection(every: int) -> Iterator[GarbageSchedule]:
    """Turns Python's own schedule off during the block, for `every` > 0.

    Objects that exist at its start are left out of the collections in the block: the libraries hold
    a million of them, and looking at each takes most of the time of a collection.
    """
    if not every:
        yield GarbageSchedule(0)
        return
    was_enabled, may_freeze = gc.isenabled(), gc.get_freeze_count() == 0
    gc.disable()
    gc.collect()
    if may_freeze:
        gc.freeze()
    try:
        yield GarbageSchedule(every)
    finally:
        if may_freeze:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
