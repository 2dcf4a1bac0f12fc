"""Time and peak memory of one way to compute the similarity, each in a process of its own.

In one process the peak of one implementation would hide that of the next, and memory that the
allocator keeps would hide what is needed. So the peak is read in a process whose heap gives every
freed page back, and times in another one whose heap keeps them: a page fault for every fresh page
would otherwise be timed as well. What both run is `measured`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

FORWARD, BACKWARD = "forward", "forward + backward"
# glibc reads these once, at the start. Blocks of 64 KiB and more are mapped one by one, and
# unmapped when freed.
GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
    "MALLOC_TOP_PAD_": "0",
}
# No block is mapped by itself and the heap never shrinks. (glibc ignores a mapping threshold
# above 32 MiB; it does obey "no mappings".)
KEEPS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a process is to compute: a block of `texts` x `videos` pairs in one of the ways.

    `implementation` is a key of `measured.IMPLEMENTATIONS`. With `loss`, `row_neg_nce` in log mode
    stands behind the similarity; "streamed" always has it. `lengths` is "full", or "ragged": 4 to
    `words` words, uniformly. `chunk` is for "torch" and "streamed", `keep_scores` for the latter.
    """

    implementation: str
    texts: int
    videos: int
    words: int
    frames: int
    width: int
    dtype: str = "float32"
    device: str = "cpu"
    interaction: str = "att_wti"
    neighbour_frames: bool = True
    lengths: str = "full"
    loss: bool = False
    chunk: int | None = None
    keep_scores: bool = False
    threads: int = 1

    @property
    def tiny(self) -> Job:
        """The same way with next to nothing to do, in several tiles: it loads the libraries."""
        return replace(self, texts=2, videos=8, words=4, frames=2, width=16, chunk=1)


class Refused(Exception):
    """An implementation that cannot serve this job; the message says why."""


class MeasurementFailed(Exception):
    """A measured process that ended without a result; the message says how."""


def peak_bytes(job: Job, passes: tuple[str, ...] = (FORWARD, BACKWARD)) -> dict[str, int]:
    """Bytes at the peak of each pass, above the inputs and the loaded libraries.

    Gradients of the inputs count, as the pass makes them; without "backward" no graph is kept.

    Raises:
        Refused, MeasurementFailed: see there.
    """
    return _measured("peak_bytes", job, passes, 0, GIVES_BACK)


def seconds(
    job: Job, passes: tuple[str, ...] = (FORWARD, BACKWARD), *, repeats: int = 5
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` runs of each pass, after one that is not counted.

    Raises:
        Refused, MeasurementFailed: see there.
    """
    return _measured("seconds", job, passes, repeats, KEEPS)


def _measured(
    what: str, job: Job, passes: tuple[str, ...], repeats: int, heap: dict[str, str]
) -> Any:
    task = json.dumps({"what": what, "job": asdict(job), "passes": passes, "repeats": repeats})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | heap
    ended = subprocess.run(
        [sys.executable, "-m", "tvr_bench.kernels_task", task],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode < 0:
        raise MeasurementFailed(
            f"the process was killed by signal {-ended.returncode}"
            + (", as for too much memory" if ended.returncode == -9 else "")
        )
    if ended.returncode:
        raise MeasurementFailed((ended.stderr.strip().splitlines() or ["no message"])[-1])
    answer = json.loads(ended.stdout.splitlines()[-1])
    if "refused" in answer:
        raise Refused(answer["refused"])
    return answer
