"""The estimate of the similarity's memory meets what is measured, which grows by the promised law.

Memory is measured in processes of its own, see `trainer.measure`: exact enough to be asserted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from builders.spawn import spawn
from tvr_bench.kernels_process import BACKWARD, HEAP_RETURNS_PAGES, Job, peak_bytes
from tvr_bench.kernels_task import Inputs, cpu_growth, make_inputs

from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.objective import objective
from tvr.trainer.memory.memory import ACCURACY, FLOOR, by_way, estimate
from tvr.trainer.memory.sizes import Sizes
from tvr.trainer.model.model import Features

JOB = Job(
    implementation="compiled", texts=256, videos=256, words=32, frames=12, width=512, loss=True
)
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
]
# Next to no features, so that the pairs are what is seen.
PAIRS = replace(JOB, width=16)


def sizes_of(job: Job) -> Sizes:
    return Sizes(
        texts=job.texts,
        videos=job.videos,
        words=job.words,
        frames=job.frames,
        width=job.width,
        interaction=job.interaction,
        neighbour_frames=job.neighbour_frames,
        backend={"torch": "torch", "reference": "naive"}.get(job.implementation, "compiled"),
        streamed=job.implementation == "streamed",
        keep_scores=job.keep_scores,
        chunk=job.chunk,
        bytes_per_number=4 if job.dtype == "float32" else 2,
        word_share=(4 + job.words) / (2 * job.words) if job.lengths == "ragged" else 1.0,
    )


@cache
def measured(job: Job) -> int:
    return peak_bytes(job, (BACKWARD,))[BACKWARD]


@pytest.mark.parametrize("job", CASES, ids=lambda job: f"{job.implementation}-{job.videos}")
def test_the_estimate_is_met(job: Job) -> None:
    peak = measured(job)
    assert peak > FLOOR
    assert estimate(sizes_of(job)).above_inputs == pytest.approx(peak, rel=ACCURACY)


def test_the_estimate_is_met_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HEAP_RETURNS_PAGES.items():
        monkeypatch.setenv(name, value)
    job = replace(JOB, texts=96, videos=96, lengths="ragged")
    # In the order of their peaks, since a process knows only the highest so far.
    ways: list[tuple[Any, Any]] = [("ring", "stream"), ("gather", "keep")]
    # What the C library reads when a process starts.
    for rank in spawn(peaks_of_rank, 3, job, ways, anew=True):
        for way, peak in zip(ways, rank, strict=True):
            sizes = by_way(replace(sizes_of(job), videos=3 * 96), *way)
            assert peak > FLOOR
            assert estimate(sizes).above_inputs == pytest.approx(peak, rel=ACCURACY)


def peaks_of_rank(rank: int, world_size: int, job: Job, ways: list[tuple[Any, Any]]) -> list[int]:
    """Of `objective`, after a small one that loads the libraries."""
    tiny = replace(job, texts=2, videos=2, width=16)
    contrast(make_inputs(tiny), rank, world_size, *ways[0])
    inputs = make_inputs(job)
    peaks = []
    for way in ways:
        contrast(inputs, rank, world_size, *way)
        peaks.append(cpu_growth())
    return peaks


def contrast(x: Inputs, rank: int, world_size: int, exchange: Any, scores: Any) -> None:
    """The loss of these features on all ranks, and its backward."""
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


def bytes_per_pair(job: Job, pairs: tuple[int, int, int]) -> float:
    """The quadratic part of the peak over three equidistant numbers of pairs."""
    first, second, third = (measured(replace(job, texts=n, videos=n)) for n in pairs)
    return (third - 2 * second + first) / (2 * (pairs[1] - pairs[0]) ** 2)


# The loss looks at no more than 2**20 scores at once: up to 1024 pairs its scratch grows with them.
@pytest.mark.parametrize("pairs", [(256, 512, 768), (512, 768, 1024)], ids=str)
def test_a_pair_costs_at_most_96_bytes(pairs: tuple[int, int, int]) -> None:
    assert 50 < bytes_per_pair(PAIRS, pairs) < 96


def test_a_pair_costs_no_more_in_torch_tiles() -> None:
    assert bytes_per_pair(replace(PAIRS, implementation="torch", chunk=32), (128, 224, 320)) < 96


# 4 bytes where the scores are kept, and more than 8 where places are.
@pytest.mark.parametrize(("words", "frames"), [(8, 4), (4, 2)])
def test_a_pair_costs_nothing_where_scores_are_streamed(words: int, frames: int) -> None:
    job = replace(PAIRS, implementation="streamed", chunk=64, words=words, frames=frames)
    assert abs(bytes_per_pair(job, (512, 1280, 2048))) < 2


def test_parts_come_largest_first_and_make_up_the_peak() -> None:
    found = estimate(sizes_of(JOB))
    sizes = list(found.parts.values())
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0
    assert found.above_inputs == sum(sizes)
    # Sentences, words and frames of width 512, a logit for each slot, and their 8-byte masks.
    slots = 256 * (32 + 12)
    assert found.inputs == 4 * 512 * (256 + slots) + 12 * slots
    assert found.total == found.inputs + found.above_inputs


def test_features_of_other_ranks_are_no_inputs() -> None:
    sizes = Sizes(texts=8, videos=32, words=4, frames=2, width=16)
    alone = estimate(replace(sizes, videos=8)).inputs
    for exchange in ("gather", "ring"):
        assert estimate(replace(sizes, exchange=exchange, streamed=True)).inputs == alone
    assert estimate(sizes).inputs > alone


def test_a_ring_does_not_grow_with_the_ranks() -> None:
    sizes = Sizes(texts=256, videos=1024, words=32, frames=12, width=512)
    peaks = [
        estimate(by_way(replace(sizes, videos=256 * ranks), "ring", "stream")).above_inputs
        for ranks in (3, 4, 64)
    ]
    assert peaks == [peaks[0]] * 3
