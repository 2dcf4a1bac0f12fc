"""Part "kernels": similarity and loss of B texts and G videos, as one rank of a job computes them.

Every implementation of `tvr bench kernels` is timed, the naive definition also through
torch.compile. All include NegNCE but the bounds: the bare products of all words with all frames,
one for the forward and three with the backward, in float32 and in bfloat16. TFLOP/s count these
products only, for every implementation alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from gpu_kit.child import Recorder
from gpu_kit.clock import COMPILERS, Wrong, check_finite, measure
from gpu_kit.sizes import Sizes, sizes_of
from torch import Tensor
from tvr_bench import kernels_task
from tvr_bench.kernels_process import Job
from tvr_bench.kernels_task import IMPLEMENTATIONS, Inputs, make_inputs

from tvr.kernels import reference
from tvr.kernels.similarity import BACKENDS, dmae_similarity

COMPILED_NAIVE = "torch.compile of naive"
LOW_BOUND = "bare products in bfloat16"
NAMES = {"reference": "naive", "bound": "bare products"}
# Relative difference, in the Euclidean norm, of an implementation's gradients from the first one's.
# Pairs whose maxima nearly tie differ by rounding alone; with `fast` there are many of them.
AGREEMENT, FAST_AGREEMENT = 0.02, 1.0
Implementation = Callable[[Job, Inputs, bool], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One implementation with one number of videos and one direction."""

    implementation: str
    pairs: int
    backward: bool

    @property
    def name(self) -> str:
        """Name among the results."""
        passes = "forward + backward" if self.backward else "forward"
        return f"{NAMES.get(self.implementation, self.implementation)}, G {self.pairs}, {passes}"


def kernel_blocks(settings: dict[str, Any], recorder: Recorder) -> None:
    """Records one case for each implementation, G and direction."""
    sizes, device = sizes_of(settings), settings["device"]
    cases = list(_cases(sizes))
    recorder.plan(case.name for case in cases)
    functions, took_s, gradients = _implementations(), {}, {}
    for case in cases:
        if device == "cpu" and case.implementation.endswith("_compiled"):
            recorder.not_run(case.name, "a CPU compiles it for longer than all of this takes")
            continue
        expected_s = took_s.get((case.implementation, case.backward), 0.0)
        if recorder.left_s < expected_s:
            continue
        started = time.monotonic()
        try:
            values = _measure(case, functions[case.implementation], sizes, device, gradients)
        except Wrong as wrong:
            recorder.failed(case.name, str(wrong))
        except torch.OutOfMemoryError:
            recorder.not_run(case.name, "does not fit")
        except ValueError as error:
            recorder.not_run(case.name, str(error))
        else:
            recorder.case(case.name, implementation=case.implementation, **values)
        if device == "cuda":
            torch.cuda.empty_cache()
        # The next G is four times as large, but compiling takes as long for each.
        grows = 1 if case.implementation == COMPILED_NAIVE else 4
        took_s[case.implementation, case.backward] = grows * (time.monotonic() - started)


def _cases(sizes: Sizes) -> Iterator[Case]:
    names = list(_implementations())
    names.remove(COMPILED_NAIVE)
    for pairs in sizes.pairs:
        for name in names:
            for backward in (False, True):
                yield Case(name, pairs, backward)
        if pairs in sizes.compiled_pairs:
            for backward in (False, True):
                yield Case(COMPILED_NAIVE, pairs, backward)


def _implementations() -> dict[str, Implementation]:
    """Those of `tvr bench kernels`, backends that it does not name, and torch.compile."""
    others = {name: partial(_backend, name) for name in BACKENDS if name not in IMPLEMENTATIONS}
    first = {"bound": IMPLEMENTATIONS["bound"], LOW_BOUND: _low_bound}
    first |= {"reference": IMPLEMENTATIONS["reference"]}
    return first | {**others, **IMPLEMENTATIONS} | {COMPILED_NAIVE: _compiled_naive}


def _low_bound(job: Job, inputs: Inputs, backward: bool) -> None:
    """The products of `kernels_task`'s bound, from and to bfloat16: tensor cores' own pace."""
    texts, videos = (
        x.detach().bfloat16().view(-1, job.width) for x in (inputs.words, inputs.frames)
    )
    of_videos = torch.zeros_like(videos)
    for rows in texts.split(max(1, kernels_task.BOUND_SCORES // len(videos))):
        scores = rows @ videos.T
        if backward:
            _ = scores @ videos
            of_videos.addmm_(scores.T, rows)


def _backend(name: str, job: Job, inputs: Inputs, backward: bool) -> None:
    kernels_task._similarity(partial(dmae_similarity, backend=name), job, inputs, backward)


@cache
def _compiled(device: str) -> Callable[..., Tensor]:
    return torch.compile(reference.dmae_similarity, dynamic=False, backend=COMPILERS[device])


def _compiled_naive(job: Job, inputs: Inputs, backward: bool) -> None:
    """The loss is not compiled: it is the same in every implementation."""
    kernels_task._similarity(_compiled(job.device), job, inputs, backward)


@contextmanager
def _unchecked_reference() -> Iterator[None]:
    """The reference without its checks: Python loops over all masks, which are not the maths."""
    check = reference._check_arguments
    reference._check_arguments = lambda *_: None
    try:
        yield
    finally:
        reference._check_arguments = check


def _measure(
    case: Case,
    function: Implementation,
    sizes: Sizes,
    device: str,
    gradients: dict[int, tuple[str, dict[str, Tensor]]],
) -> dict[str, Any]:
    words, frames, width = sizes.tokens
    job = Job(
        implementation=case.implementation,
        texts=sizes.rows,
        videos=case.pairs,
        words=words,
        frames=frames,
        width=width,
        device=device,
        loss=True,
        threads=torch.get_num_threads(),
    )
    agreement: dict[str, Any] = {}

    def call(inputs: Inputs) -> None:
        with torch.set_grad_enabled(case.backward):
            function(job, inputs, case.backward)

    def check(inputs: Inputs, _: object) -> None:
        if case.implementation in ("bound", LOW_BOUND) or not case.backward:
            return
        named = zip(Inputs._fields, inputs, strict=True)
        found = {n: x.grad for n, x in named if x is not None and x.grad is not None}
        check_finite(found)
        small = {n: found[n].clone() for n in ("sentence", "words", "word_logits")}
        first, expected = gradients.setdefault(case.pairs, (case.implementation, small))
        bound = FAST_AGREEMENT if case.implementation == "fast" else AGREEMENT
        difference = max(
            float((small[n] - expected[n]).norm() / expected[n].norm()) for n in expected
        )
        if not difference <= bound:
            raise Wrong(f"gradients differ from those of {first} by {difference:.2g}")
        agreement.update(compared_with=first, gradient_difference=difference)

    with _unchecked_reference():
        timed = measure(
            partial(make_inputs, job),
            call,
            check,
            device,
            repeats=sizes.repeats,
            limit_s=sizes.case_s,
        )
    num_pairs = sizes.rows * case.pairs
    operations = (3 if case.backward else 1) * 2 * num_pairs * words * frames * width
    peak = timed["peak_bytes"]
    return {
        "B": sizes.rows,
        "G": case.pairs,
        "words": words,
        "frames": frames,
        "width": width,
        "backward": case.backward,
        **timed,
        "tflops_per_s": operations / timed["ms"] / 1e9,
        "bytes_per_pair": None if peak is None else peak / num_pairs,
        **agreement,
    }
