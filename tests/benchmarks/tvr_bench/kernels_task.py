"""The measuring process of `kernels_process`.

python -m tvr_bench.kernels_task TASK
python -m tvr_bench.kernels_task --forked < TASKS    # one on each line
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tvr_bench.kernels_process import BACKWARD, Job

from tvr.kernels import reference, similarity
from tvr.kernels.backends.tile_compiler import compile_failure
from tvr.kernels.losses import row_neg_nce
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK
from tvr.kernels.row_loss.row_loss import LossRule
from tvr.kernels.row_loss.streamed_loss import streamed_loss

SHORTEST_CAPTION = 4
# The bound computes its scores in pieces of at most 512 MiB; pieces of that size cost no time.
BOUND_SCORES = 2**27


class Inputs(NamedTuple):
    """Features of random direction, with masks, logits and video ids; shapes as in `reference`."""

    sentence: Tensor
    words: Tensor
    frames: Tensor
    word_mask: Tensor
    frame_mask: Tensor
    word_logits: Tensor
    frame_logits: Tensor
    video_ids: Tensor
    gradient: Tensor | None
    """(A, C) gradient of the scores; none with a loss."""


def main(argv: list[str]) -> None:
    if argv == ["--forked"]:
        answer_each_in_a_fork()
    else:
        answer_task(argv[0])


def answer_each_in_a_fork() -> None:
    """Runs each line's task in a copy of this process, which has loaded the libraries."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                answer_task(line)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            print(json.dumps({"ended": status}), flush=True)


def answer_task(line: str) -> None:
    """Prints the answer to a task."""
    task = json.loads(line)
    job = Job(**task["job"])
    torch.set_num_threads(job.threads)
    passes = tuple(task["passes"])
    try:
        if task["what"] == "peak_bytes":
            answer = peak_bytes(job, passes)
        else:
            answer = seconds(job, passes, task["repeats"])
    except (ValueError, torch.OutOfMemoryError) as error:
        answer = {"unsupported": str(error).splitlines()[0]}
    print(json.dumps(answer))


def peak_bytes(job: Job, passes: tuple[str, ...]) -> dict[str, int]:
    """Peak of each pass above the memory that is left after it.

    A later pass must need at least as much as an earlier one. The memory is compared with the
    state after the pass, not before it: a library may allocate buffers at its first use and keep
    them (MKL some MB for large products), and these are not memory of the pass.
    """
    for name in passes:
        run(job.warm_up, make_inputs(job.warm_up), backward=name == BACKWARD)
    inputs = make_inputs(job)
    peaks = {}
    for name in passes:
        if job.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        run(job, inputs, backward=name == BACKWARD)
        peaks[name] = cpu_growth() if job.device == "cpu" else _cuda_growth()
    return peaks


def seconds(job: Job, passes: tuple[str, ...], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, without the first run of each pass, which fills heap and caches."""
    inputs = make_inputs(job)
    clock = cpu_seconds if job.device == "cpu" else cuda_seconds
    times = {}
    for name in passes:
        action = partial(run, job, inputs, backward=name == BACKWARD)
        times[name] = [clock(action) for _ in range(repeats + 1)][1:]
    return times


def make_inputs(job: Job, seed: int = 0) -> Inputs:
    """The same numbers for every implementation."""
    torch.manual_seed(seed)
    placement = {"dtype": getattr(torch, job.dtype), "device": job.device}

    def unit(*shape: int) -> Tensor:
        # In place: a temporary as large as the features would raise the peak.
        x = torch.empty(*shape, job.width, **placement).normal_()
        x /= torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.requires_grad_()

    lengths = torch.full((job.texts, 1), job.words)
    if job.lengths == "ragged":
        lengths = torch.randint(min(SHORTEST_CAPTION, job.words), job.words + 1, (job.texts, 1))
    return Inputs(
        sentence=unit(job.texts),
        words=unit(job.texts, job.words),
        frames=unit(job.videos, job.frames),
        word_mask=(torch.arange(job.words) < lengths).long().to(job.device),
        frame_mask=torch.ones(job.videos, job.frames, dtype=torch.long, device=job.device),
        word_logits=torch.randn(job.texts, job.words, **placement).requires_grad_(),
        frame_logits=torch.randn(job.videos, job.frames, **placement).requires_grad_(),
        video_ids=torch.arange(job.videos, device=job.device),
        gradient=None if job.loss else torch.randn(job.texts, job.videos, device=job.device),
    )


def run(job: Job, inputs: Inputs, *, backward: bool) -> None:
    """Runs one pass, and frees its graph and gradients."""
    with torch.set_grad_enabled(backward):
        IMPLEMENTATIONS[job.implementation](job, inputs, backward)
    for tensor in inputs:
        if tensor is not None:
            tensor.grad = None


def _similarity(function: Callable[..., Tensor], job: Job, inputs: Inputs, backward: bool) -> None:
    scores = function(
        *inputs[:5],
        interaction=job.interaction,
        matching=job.matching,
        neighbour_frames=job.neighbour_frames,
        word_logits=inputs.word_logits,
        frame_logits=inputs.frame_logits,
    )
    if job.loss:
        # No other reference keeps the scores, so the loss decides when they are freed.
        scores = row_neg_nce(
            scores, row_offset=0, collectives=SINGLE_RANK, mode="log", video_ids=inputs.video_ids
        ).loss
    if backward:
        scores.backward(inputs.gradient)


def _reference(job: Job, inputs: Inputs, backward: bool) -> None:
    _similarity(reference.dmae_similarity, job, inputs, backward)


def _compiled(job: Job, inputs: Inputs, backward: bool) -> None:
    _similarity(partial(similarity.dmae_similarity, backend="compiled"), job, inputs, backward)


def _torch(job: Job, inputs: Inputs, backward: bool) -> None:
    tiles = partial(similarity.dmae_similarity, backend="torch", chunk=job.chunk)
    _similarity(tiles, job, inputs, backward)


def _dense(job: Job, inputs: Inputs, backward: bool, *, compile_tiles: bool = False) -> None:
    dense = partial(similarity.dmae_similarity, backend="dense", chunk=job.chunk)
    _similarity(partial(dense, compile_tiles=compile_tiles), job, inputs, backward)


def _dense_compiled(job: Job, inputs: Inputs, backward: bool) -> None:
    """Dense tiles with torch.compile.

    Raises:
        ValueError: torch.compile does not work on this machine.
    """
    if failure := compile_failure(job.device):
        raise ValueError(failure)
    _dense(job, inputs, backward, compile_tiles=True)


def _fast(job: Job, inputs: Inputs, backward: bool) -> None:
    """The default backend, with products in bfloat16."""
    _similarity(partial(similarity.dmae_similarity, fast=True), job, inputs, backward)


def _streamed(job: Job, inputs: Inputs, backward: bool) -> None:
    """Similarity and loss fused; without `keep_scores` the loss recomputes the scores."""
    loss = streamed_loss(
        *inputs[:5],
        interaction=job.interaction,
        matching=job.matching,
        neighbour_frames=job.neighbour_frames,
        word_logits=inputs.word_logits,
        frame_logits=inputs.frame_logits,
        rule=LossRule("log"),
        num_pairs=job.videos,
        video_ids=inputs.video_ids,
        keep_scores=job.keep_scores,
        chunk=job.chunk,
        backend=job.backend,
    ).loss
    if backward:
        loss.backward()


def _bound(job: Job, inputs: Inputs, backward: bool) -> None:
    """Only S = X V^T over all padded slots and, for the backward, S V and S^T X."""
    tokens = inputs.words if job.interaction.startswith("att_") else inputs.sentence
    texts = tokens.detach().float().view(-1, job.width)
    videos = inputs.frames.detach().float().view(-1, job.width)
    step = max(1, BOUND_SCORES // len(videos))
    of_videos = torch.zeros_like(videos)
    for rows in texts.split(step):
        scores = rows @ videos.T
        if backward:
            _ = scores @ videos
            of_videos.addmm_(scores.T, rows)


IMPLEMENTATIONS: dict[str, Callable[[Job, Inputs, bool], None]] = {
    "reference": _reference,
    "compiled": _compiled,
    "torch": _torch,
    "dense": _dense,
    "dense_compiled": _dense_compiled,
    "streamed": _streamed,
    "fast": _fast,
    "bound": _bound,
}


def cpu_growth() -> int:
    """Bytes by which this process's peak so far exceeds its present memory."""
    peak = process_bytes("VmHWM")
    # Otherwise pages that glibc keeps inside its heap would count as present memory.
    ctypes.CDLL(None).malloc_trim(0)
    return peak - process_bytes("VmRSS")


def _cuda_growth() -> int:
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def process_bytes(field: str) -> int:
    """Bytes of VmRSS (in memory now) or VmHWM (its peak) of this process.

    getrusage's maximum is not used: a process inherits it from its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def cpu_seconds(action: Callable[[], object]) -> float:
    """Seconds of an action on the CPU."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def cuda_seconds(action: Callable[[], object]) -> float:
    """Seconds of an action on the GPU, between two events in its stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main(sys.argv[1:])
