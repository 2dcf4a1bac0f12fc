"""Progress of the encoding of a data set, as lines on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tvr.trainer.frozen.encoding import Report

LINE_EVERY_S = 10.0


def encoding_report(*, prints: bool, progress: Callable[[], object] | None = None) -> Report:
    """Returns a report that writes a line now and then, and one at the last block.

    Args:
        prints: False on all ranks but the first.
        progress: Also called after each block, for example by the watchdog of a run.
    """
    last = time.monotonic()

    def report(url: str, done: int, total: int, left_out: int) -> None:
        nonlocal last
        if progress is not None:
            progress()
        now = time.monotonic()
        if prints and (done == total or now - last >= LINE_EVERY_S):
            last = now
            bad = f", {left_out} videos cannot be read" if left_out else ""
            line = f"features: {url}: {done:,} of {total:,} blocks encoded{bad}"
            print(line, file=sys.stderr, flush=True)

    return report
