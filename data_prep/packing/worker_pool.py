"""Packs clips in several processes and returns them in order.

A clip cannot end the packing: the processes have limits of memory and time, see `limited_process`,
and a clip that exceeds them, or whose process dies, is refused after a second try.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.connection import wait

from tvr.data_prep.dataset.shard_writer import TarSample
from tvr.data_prep.limited_process import (
    NOTHING_YET,
    Alive,
    LimitedProcess,
    ProcessLimits,
    TaskFailure,
    Work,
)
from tvr.data_prep.packing.pack_clip import (
    OUT_OF_MEMORY,
    LastSource,
    RefusedClip,
    pack_clip,
    refuse_clip,
)
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.packing.words import WordTagger
from tvr.data_prep.records import Clip
from tvr.launchers.host_limits import host_cpus

# Videos per process that may be in work, or done ahead of an earlier clip, so that a long video
# does not stall the other processes.
WINDOW_PER_PROCESS = 4
# Bytes of clips that may be done ahead.
HELD_BYTES = 1 << 29
TRIES = 2

PackedClip = TarSample | RefusedClip

log = logging.getLogger(__name__)


def available_processes() -> int:
    """Returns the number of CPUs that this process may use."""
    return host_cpus().usable


def pack_clips(
    clips: Iterable[Clip],
    settings: PackSettings,
    processes: int,
    tagger: WordTagger | None = None,
    limits: ProcessLimits | None = None,
) -> Generator[PackedClip, None, None]:
    """Yields `pack_clip` of every clip, in order.

    Clips of one video that follow each other go to one process, which reads the video once. A clip
    whose process dies, or exceeds its limits, is packed once more by a new process, and refused if
    that fails, too.

    Args:
        processes: 0 means the calling process, which has no limits.

    Raises:
        StorageUnavailable: the storage of a clip's video fails for the moment.
        RuntimeError: `pack_clip` raised another exception; the message holds its traceback.
        ChildProcessError: the processes end before they begin.
    """
    if processes == 0:
        with closing(LastSource()) as last_source:
            yield from (pack_clip(clip, settings, tagger, last_source) for clip in clips)
        return
    limits = limits or ProcessLimits()
    memory_bytes = limits.memory_of(processes)
    groups = (list(group) for _, group in groupby(clips, key=lambda clip: clip.video))
    window: deque[_Job] = deque()
    num_groups = num_held = 0
    workers = [_Worker(settings, tagger, limits, memory_bytes) for _ in range(processes)]
    try:
        while True:
            for worker in workers:
                if worker.job is not None:
                    continue
                if not worker.queue and num_groups < WINDOW_PER_PROCESS * processes:
                    for group in groups:
                        worker.queue.extend(_Job(clip) for clip in group)
                        worker.queue[-1].ends_group = True
                        window.extend(worker.queue)
                        num_groups += 1
                        break
                # The first clip of all is never held up: the others wait for it.
                if worker.queue and (num_held < HELD_BYTES or worker.queue[0] is window[0]):
                    worker.submit(worker.queue.popleft())
            if not window:
                return
            num_held += _receive_from(workers, must_wait=window[0].outcome is None)
            if window[0].outcome is not None:
                job = window.popleft()
                num_held -= job.num_bytes
                num_groups -= job.ends_group
                yield job.outcome  # type: ignore[misc]
    finally:
        for worker in workers:
            worker.process.stop()


@dataclass(slots=True)
class _Job:
    clip: Clip
    outcome: PackedClip | None = None
    ends_group: bool = False
    """True for the last of the clips of one video."""
    failures: list[TaskFailure] = field(default_factory=list)
    """Ends of the processes that packed the clip."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed clip."""
        return len(self.outcome.stored) if isinstance(self.outcome, TarSample) else 0


def _receive_from(workers: list[_Worker], *, must_wait: bool) -> int:
    """Receives what the processes have sent, and ends those that exceed their time.

    Returns the bytes of the clips that were packed.
    """
    busy = {worker.process.connection: worker for worker in workers if worker.job is not None}
    timeout_s = 0.0
    if must_wait:
        first_s = min(worker.process.deadline_s for worker in busy.values())
        timeout_s = max(0.0, first_s - time.monotonic())
    num_bytes = 0
    for connection in wait(list(busy), timeout=timeout_s):
        num_bytes += busy.pop(connection).receive()  # type: ignore[arg-type]
    now_s = time.monotonic()
    for worker in busy.values():
        worker.expire(now_s)
    return num_bytes


class _Worker:
    """A process that packs one clip at a time."""

    def __init__(
        self,
        settings: PackSettings,
        tagger: WordTagger | None,
        limits: ProcessLimits,
        memory_bytes: int,
    ) -> None:
        self.process = LimitedProcess(_clip_packer, (settings, tagger), limits, memory_bytes)
        self.job: _Job | None = None
        self.queue: deque[_Job] = deque()
        """Clips of the same video that come next."""

    def submit(self, job: _Job) -> None:
        """Sends a clip to the process."""
        self.job = job
        self.process.submit(job.clip)

    def receive(self) -> int:
        """Receives the packed clip, a sign of progress, or the death of the process.

        Returns the bytes of the clip.
        """
        job = self.job
        assert job is not None
        try:
            outcome = self.process.receive()
        except RuntimeError as error:
            text = f"packing {job.clip.key} ({job.clip.video}) raised:\n{error}"
            raise RuntimeError(text) from error
        if outcome is NOTHING_YET:
            return 0
        if isinstance(outcome, TaskFailure):
            self._fail(job, outcome)
            return 0
        job.outcome, self.job = outcome, None
        return job.num_bytes

    def expire(self, now_s: float) -> None:
        """Ends a process that exceeds its time."""
        failure = self.process.expire(now_s)
        if failure is not None and self.job is not None:
            self._fail(self.job, failure)

    def _fail(self, job: _Job, failure: TaskFailure) -> None:
        """Tries the clip again, or refuses it."""
        job.failures.append(failure)
        if len(job.failures) < TRIES:
            log.warning(
                "a packing process %s while it packed %s (%s); a new process packs the clip again",
                *(failure.how, job.clip.key, job.clip.video),
            )
            self.submit(job)
            return
        reason, detail = failure.reason, f"twice, its process {failure.how}"
        if reason == "unreadable":
            if any(each.reason != reason for each in job.failures):
                reason = "killed"
            else:
                detail = f"the decoder crashed twice with {failure.how.rpartition(' ')[2]}"
        job.outcome, self.job = refuse_clip(job.clip, reason, detail), None


def _clip_packer(settings: PackSettings, tagger: WordTagger | None) -> Work:
    """Returns the work of a process: `pack_clip` with the source of its last clip."""
    last_source = LastSource()
    if tagger is not None:
        tagger.tag(("a man plays",))  # loads the model, which the first clip must not pay for

    def pack(clip: Clip, alive: Alive) -> PackedClip:
        outcome = pack_clip(clip, settings, tagger, last_source, alive)
        if isinstance(outcome, RefusedClip) and outcome.reason == OUT_OF_MEMORY:
            # A new process, without what earlier clips have left in memory, tries again.
            raise MemoryError(outcome.detail)
        return outcome

    return pack
