"""The similarity's estimated memory equals the measured one, which grows as promised.

Each peak is measured in a process of its own (`tvr_bench.kernels_process`): exact enough to assert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from builders.exhaustive import further, principal_and_further
from builders.spawn import spawn
from tvr_bench.kernels_process import BACKWARD, HEAP_RETURNS_PAGES, Job, forked_peaks, peak_bytes
from tvr_bench.kernels_task import Inputs, cpu_growth, make_inputs

from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.objective import objective
from tvr.trainer.memory.similarity_memory import ACCURACY, FLOOR_BYTES, estimate_similarity
from tvr.trainer.memory.similarity_sizes import SimilaritySizes, with_exchange
from tvr.trainer.model.model import Features

JOB = Job(
    implementation="compiled", texts=256, videos=256, words=32, frames=12, width=512, loss=True
)
ONE_WAY = replace(JOB, matching="words_to_frames")
CASES = [
    JOB,
    replace(JOB, lengths="ragged", dtype="bfloat16", texts=128, videos=512),
    replace(JOB, interaction="wti", texts=1024, videos=1024, width=64),
    replace(JOB, words=64, frames=4, width=768, neighbour_frames=False),
    replace(JOB, lengths="ragged", texts=512, videos=512, width=200),
    replace(JOB, implementation="streamed", words=8, frames=32, interaction="att_ti"),
    replace(JOB, implementation="streamed", lengths="ragged", dtype="bfloat16", chunk=60),
    replace(JOB, implementation="streamed", keep_scores=True, texts=128, videos=1024, chunk=64),
    replace(JOB, implementation="reference", texts=64),
    replace(JOB, implementation="reference", texts=64, words=64, frames=4, dtype="bfloat16"),
    replace(JOB, implementation="torch", texts=128),
    replace(JOB, implementation="torch", chunk=32, lengths="ragged"),
    replace(JOB, implementation="torch", words=8, frames=32, texts=512, videos=512, width=128),
    replace(JOB, implementation="dense", texts=128),
    replace(JOB, implementation="dense", chunk=48, lengths="ragged"),
    replace(JOB, implementation="streamed", backend="dense", chunk=64, words=16),
    replace(ONE_WAY, neighbour_frames=False),
    replace(ONE_WAY, implementation="torch", lengths="ragged", chunk=32),
    replace(ONE_WAY, implementation="reference", neighbour_frames=False, texts=64),
]
# One of each implementation; JOB is also measured by other tests.
PRINCIPAL = [CASES[place] for place in (0, 6, 8, 10, 13)]
BACKEND_OF = {"torch": "torch", "dense": "dense", "reference": "naive"}
# Narrow features, so that the pairs dominate the memory.
PAIRS = replace(JOB, width=16)


def sizes_of(job: Job) -> SimilaritySizes:
    return SimilaritySizes(
        texts=job.texts,
        videos=job.videos,
        words=job.words,
        frames=job.frames,
        width=job.width,
        interaction=job.interaction,
        matching=job.matching,
        neighbour_frames=job.neighbour_frames,
        backend=BACKEND_OF.get(job.implementation, job.backend or "compiled"),
        streamed=job.implementation == "streamed",
        keep_scores=job.keep_scores,
        chunk=job.chunk,
        bytes_per_number=4 if job.dtype == "float32" else 2,
        word_share=(4 + job.words) / (2 * job.words) if job.lengths == "ragged" else 1.0,
    )


@pytest.fixture(scope="module")
def measured() -> Iterator[Callable[[Job], int]]:
    """The peak of a job's forward and backward."""
    with forked_peaks() as peaks:
        yield cache(lambda job: peaks(job, (BACKWARD,))[BACKWARD])


def test_a_forked_process_measures_as_one_of_its_own(measured: Callable[[Job], int]) -> None:
    alone = peak_bytes(JOB, (BACKWARD,))[BACKWARD]
    assert measured(JOB) == pytest.approx(alone, rel=ACCURACY / 10)


@pytest.mark.parametrize(
    "job",
    principal_and_further(CASES, PRINCIPAL),
    ids=lambda job: f"{job.implementation}-{job.videos}",
)
def test_the_estimate_equals_the_measured_peak(measured: Callable[[Job], int], job: Job) -> None:
    peak = measured(job)
    assert peak > FLOOR_BYTES
    assert estimate_similarity(sizes_of(job)).above_inputs == pytest.approx(peak, rel=ACCURACY)


@pytest.mark.exhaustive
def test_the_estimate_equals_the_measured_peak_on_three_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in HEAP_RETURNS_PAGES.items():
        monkeypatch.setenv(name, value)
    job = replace(JOB, texts=96, videos=96, lengths="ragged")
    # In the order of their peaks, since a process reports only the highest so far.
    settings: list[tuple[Any, Any]] = [("ring", "stream"), ("gather", "keep")]
    # New processes, since the C library reads the heap's settings at the start.
    for peaks in spawn(peaks_of_rank, 3, job, settings, anew=True):
        for (exchange, scores), peak in zip(settings, peaks, strict=True):
            sizes = with_exchange(replace(sizes_of(job), videos=3 * 96), exchange, scores)
            assert peak > FLOOR_BYTES
            assert estimate_similarity(sizes).above_inputs == pytest.approx(peak, rel=ACCURACY)


def peaks_of_rank(
    rank: int, world_size: int, job: Job, settings: list[tuple[Any, Any]]
) -> list[int]:
    """Peaks of `objective` under each setting, after a small run that loads the libraries."""
    tiny = replace(job, texts=2, videos=2, width=16)
    contrast(make_inputs(tiny), rank, world_size, *settings[0])
    inputs = make_inputs(job)
    peaks = []
    for exchange, scores in settings:
        contrast(inputs, rank, world_size, exchange, scores)
        peaks.append(cpu_growth())
    return peaks


def contrast(x: Inputs, rank: int, world_size: int, exchange: Any, scores: Any) -> None:
    """Runs forward and backward of the loss of these features on all ranks."""
    world = World(rank=rank, world_size=world_size, device=torch.device("cpu"))
    mine = Features(
        x.sentence, x.words, x.word_mask, x.frames, x.frame_mask, *x[5:7], margin_hinge=None
    )
    ids = rank * len(x.words) + torch.arange(len(x.words))
    found = objective(
        mine, ids, ModelConfig(), LossConfig(), world, exchange=exchange, scores=scores
    )
    found.for_backward.backward()
    for tensor in (x.sentence, x.words, x.frames, x.word_logits, x.frame_logits):
        tensor.grad = None


def bytes_per_pair(measured: Callable[[Job], int], job: Job, pairs: tuple[int, int, int]) -> float:
    """The quadratic part of the peak over three equidistant numbers of pairs."""
    first, second, third = (measured(replace(job, texts=n, videos=n)) for n in pairs)
    return (third - 2 * second + first) / (2 * (pairs[1] - pairs[0]) ** 2)


# The loss processes at most 2**20 scores at a time: up to 1024 pairs its scratch still grows.
@pytest.mark.parametrize("pairs", [(256, 512, 768), *further(((512, 768, 1024),))], ids=str)
def test_a_pair_costs_at_most_96_bytes(
    measured: Callable[[Job], int], pairs: tuple[int, int, int]
) -> None:
    assert 50 < bytes_per_pair(measured, PAIRS, pairs) < 96


# The tables of a tile must be smaller than the loss, which otherwise is not the peak at each size.
@pytest.mark.parametrize(("implementation", "chunk"), [("torch", 32), *further(("dense", 8))])
def test_a_pair_costs_no_more_in_torch_tiles(
    measured: Callable[[Job], int], implementation: str, chunk: int
) -> None:
    job = replace(PAIRS, implementation=implementation, chunk=chunk)
    assert bytes_per_pair(measured, job, (128, 224, 320)) < 96


# Kept scores would cost 4 bytes, and kept indices more than 8.
@pytest.mark.parametrize("backend", [None, *further("dense")])
def test_a_pair_costs_no_memory_with_streamed_scores(
    measured: Callable[[Job], int], backend: str | None
) -> None:
    job = replace(PAIRS, implementation="streamed", chunk=64, words=4, frames=2, backend=backend)
    assert abs(bytes_per_pair(measured, job, (512, 1280, 2048))) < 2


def test_buffers_are_sorted_and_add_up_to_the_peak() -> None:
    found = estimate_similarity(sizes_of(JOB))
    sizes = list(found.buffers.values())
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0
    assert found.above_inputs == sum(sizes)
    # Sentences, words and frames of width 512, a logit for each slot, and 8-byte masks.
    slots = 256 * (32 + 12)
    assert found.inputs == 4 * 512 * (256 + slots) + 12 * slots
    assert found.total == found.inputs + found.above_inputs


def test_inputs_exclude_features_of_other_ranks() -> None:
    sizes = SimilaritySizes(texts=8, videos=32, words=4, frames=2, width=16)
    alone = estimate_similarity(replace(sizes, videos=8)).inputs
    for exchange in ("gather", "ring"):
        assert estimate_similarity(replace(sizes, exchange=exchange, streamed=True)).inputs == alone
    assert estimate_similarity(sizes).inputs > alone


def test_a_ring_does_not_grow_with_the_ranks() -> None:
    sizes = SimilaritySizes(texts=256, videos=1024, words=32, frames=12, width=512)
    peaks = [
        estimate_similarity(
            with_exchange(replace(sizes, videos=256 * ranks), "ring", "stream")
        ).above_inputs
        for ranks in (3, 4, 64)
    ]
    assert peaks == [peaks[0]] * 3
