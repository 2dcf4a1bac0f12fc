"""Runs one implementation of the similarity in a process of its own, for its time or its memory.

In one process, the peak of one implementation would hide the next one's, and memory that the
allocator keeps would hide the memory in use. So the peak is read in a process whose heap returns
every freed page. Times come from another process whose heap keeps its pages, since page faults
would otherwise be timed as well. Both processes run `kernels_task`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from tvr_bench.harness import MeasurementFailed, child_environment

FORWARD, BACKWARD = "forward", "forward + backward"
# glibc reads these once, at the start of a process. Blocks of 64 KiB and more are mapped one by
# one, and unmapped when freed.
HEAP_RETURNS_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
    "MALLOC_TOP_PAD_": "0",
}
# No block is mapped by itself and the heap never shrinks. (glibc ignores a mapping threshold
# above 32 MiB; it does obey "no mappings".)
HEAP_KEEPS_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One implementation in one case: a block of `texts` x `videos` pairs."""

    implementation: str
    """A key of `kernels_task.IMPLEMENTATIONS`."""
    texts: int
    videos: int
    words: int
    frames: int
    width: int
    dtype: str = "float32"
    device: str = "cpu"
    interaction: str = "att_wti"
    matching: str = "two_way"
    neighbour_frames: bool = True
    lengths: str = "full"
    """ "full", or "ragged": 4 to `words` words, uniformly."""
    loss: bool = False
    """Adds `row_neg_nce` in log mode; "streamed" always has it."""
    chunk: int | None = None
    """Texts in a tile of "torch", "dense", "dense_compiled" and "streamed"."""
    backend: str | None = None
    """For "streamed"; None: the default."""
    keep_scores: bool = False
    """Keeps the scores for the backward; read by "streamed" only."""
    threads: int = 1

    @property
    def warm_up(self) -> Job:
        """The same implementation on very small inputs in several tiles: it loads the libraries."""
        return replace(self, texts=2, videos=8, words=4, frames=2, width=16, chunk=1)


class Unsupported(Exception):
    """An implementation cannot run this job; the message gives the reason."""


def peak_bytes(job: Job, passes: tuple[str, ...] = (FORWARD, BACKWARD)) -> dict[str, int]:
    """Bytes at the peak of each pass, above the inputs and the loaded libraries.

    Gradients of the inputs count, since the backward allocates them. FORWARD keeps no graph.

    Raises:
        Unsupported: The implementation cannot run the job.
        MeasurementFailed: The process ended without a result.
    """
    return _run_process("peak_bytes", job, passes, 0, HEAP_RETURNS_PAGES)


def seconds(
    job: Job, passes: tuple[str, ...] = (FORWARD, BACKWARD), *, repeats: int = 5
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` runs of each pass, after a warm-up run.

    Raises:
        Unsupported: The implementation cannot run the job.
        MeasurementFailed: The process ended without a result.
    """
    return _run_process("seconds", job, passes, repeats, HEAP_KEEPS_PAGES)


@contextmanager
def forked_peaks() -> Iterator[Callable[[Job, tuple[str, ...]], dict[str, int]]]:
    """Yields a function like `peak_bytes` whose processes are forked from one.

    The libraries are loaded once, which takes longer than a small job. The copies share their
    pages, and the peak is compared with the memory after the pass, in which those are as well.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tvr_bench.kernels_task", "--forked"],
        env=child_environment(inherited, **HEAP_RETURNS_PAGES),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    to_process, answers = process.stdin, process.stdout

    def peaks(job: Job, passes: tuple[str, ...]) -> dict[str, int]:
        task = {"what": "peak_bytes", "job": asdict(job), "passes": passes, "repeats": 0}
        to_process.write(json.dumps(task) + "\n")
        to_process.flush()
        answer = json.loads(answers.readline() or '{"ended": "the first process"}')
        if "ended" in answer:
            raise MeasurementFailed(f"a process ended with {answer['ended']}; see its output")
        if "unsupported" in answer:
            raise Unsupported(answer["unsupported"])
        return answer

    try:
        yield peaks
    finally:
        to_process.close()
        process.wait()
        answers.close()


def _run_process(
    what: str, job: Job, passes: tuple[str, ...], repeats: int, heap: dict[str, str]
) -> Any:
    task = json.dumps({"what": what, "job": asdict(job), "passes": passes, "repeats": repeats})
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    ended = subprocess.run(
        [sys.executable, "-m", "tvr_bench.kernels_task", task],
        env=child_environment(inherited, **heap),
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
    if "unsupported" in answer:
        raise Unsupported(answer["unsupported"])
    return answer
