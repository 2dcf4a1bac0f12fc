"""The sample order: properties of the contract, and golden positions that must not change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.reading.order import SampleOrder, caption_choice, uniforms
from tvr.data_prep.reading.worker import PositionBatches
from tvr.data_prep.records import hash_video_id

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)
seeds = st.integers(0, 2**63 - 1)


@given(shard_sizes, seeds, st.integers(1, 5), st.integers(0, 10**9))
def test_an_epoch_is_a_permutation(
    sizes: list[int], seed: int, window_shards: int, epoch: int
) -> None:
    order = SampleOrder(sizes, seed, window_shards)
    total = sum(sizes)
    locations = [order.locate(epoch * total + step) for step in range(total)]
    assert sorted(location.sample for location in locations) == list(range(total))
    assert {location.epoch for location in locations} == {epoch}
    for location in locations:
        assert 0 <= location.index < sizes[location.shard]
        assert location.sample == sum(sizes[: location.shard]) + location.index


@given(shard_sizes, seeds, st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_a_position_gives_the_same_sample_after_any_history(
    sizes: list[int], seed: int, positions: list[int]
) -> None:
    walked = SampleOrder(sizes, seed)
    found = [walked.locate(position) for position in positions]
    assert found == [SampleOrder(sizes, seed).locate(position) for position in positions]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_a_window_is_read_completely_before_the_next(
    window_shards: int, size: int, epoch: int
) -> None:
    order = SampleOrder([size] * 8, seed=3, window_shards=window_shards)
    shards = [order.locate(epoch * 8 * size + step).shard for step in range(8 * size)]
    for start in range(0, 8 * size, window_shards * size):
        assert len(set(shards[start : start + window_shards * size])) <= window_shards


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50), st.integers(1, 4)
)
def test_all_ranks_together_consume_consecutive_positions(
    world_size: int, micro_batch: int, micro_steps: int, start_step: int, steps: int
) -> None:
    pairs = world_size * micro_batch
    first = start_step * pairs * micro_steps
    streams = [
        iter(PositionBatches(first + rank * micro_batch, pairs, micro_batch, None))
        for rank in range(world_size)
    ]
    consumed = [
        position
        for _ in range(steps * micro_steps)
        for stream in streams
        for position in next(stream)
    ]
    assert consumed == list(range(first, first + steps * micro_steps * pairs))


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 7))
def test_evaluation_batches_cover_each_row_once(
    total: int, world_size: int, micro_batch: int
) -> None:
    rows = [
        row
        for rank in range(world_size)
        for batch in PositionBatches(
            total * rank // world_size,
            micro_batch,
            micro_batch,
            total * (rank + 1) // world_size,
        )
        for row in batch
    ]
    assert rows == list(range(total))


def test_order_and_captions_depend_on_epoch_and_seed() -> None:
    order = SampleOrder([50, 50], seed=0)
    first, second = ([order.locate(e * 100 + i).sample for i in range(100)] for e in (0, 1))
    other_seed = [SampleOrder([50, 50], seed=1).locate(i).sample for i in range(100)]
    assert first != second
    assert first != other_seed
    # Each caption is expected 100 times; the bounds are 3 standard deviations away.
    choices = [caption_choice(0, epoch, 7, 5) for epoch in range(500)]
    assert all(70 < choices.count(caption) < 130 for caption in range(5))
    assert caption_choice(0, 3, 7, 1) == 0


def test_substitutes_keep_the_epoch_and_cover_the_data_set() -> None:
    order = SampleOrder([4, 6], seed=5)
    locations = [order.substitute(23, attempt) for attempt in range(1, 60)]
    assert {location.epoch for location in locations} == {2}
    assert {location.sample for location in locations} == set(range(10))


def test_golden_positions() -> None:
    """Golden values: changing them changes the data of every resumed run (an order break)."""
    order = SampleOrder([5, 3, 7, 4], seed=1234, window_shards=2)
    locations = [order.locate(position) for position in range(20)]
    assert [(location.epoch, location.shard, location.index) for location in locations] == [
        *((0, 0, 4), (0, 3, 1), (0, 0, 3), (0, 3, 2), (0, 0, 0), (0, 3, 0), (0, 3, 3)),
        *((0, 0, 1), (0, 0, 2), (0, 2, 2), (0, 2, 1), (0, 1, 0), (0, 1, 2), (0, 2, 0)),
        *((0, 2, 5), (0, 2, 3), (0, 2, 4), (0, 1, 1), (0, 2, 6), (1, 2, 4)),
    ]
    assert [order.locate(19_000 + step).sample for step in range(6)] == [15, 1, 4, 18, 3, 17]
    substitutes = [order.substitute(position, n).sample for position in (0, 19, 40) for n in (1, 2)]
    assert substitutes == [6, 16, 10, 12, 9, 18]
    choices = [caption_choice(1234, epoch, sample, 20) for epoch in (0, 1) for sample in range(6)]
    assert choices == [16, 2, 11, 0, 16, 17, 6, 9, 12, 16, 19, 5]
    assert hash_video_id("video9770") == 6563069979140668436


@pytest.mark.parametrize(
    ("sizes", "seed", "window_shards", "message"),
    [
        ([], 0, 1, "hold no samples"),
        ([0, 0], 0, 1, "hold no samples"),
        ([3, -1], 0, 1, "hold no samples"),
        ([3], -1, 1, "seed=-1 must be from 0"),
        ([3], 2**63, 1, "must be from 0 to"),
        ([3], 0, 0, "window_shards=0 must be at least 1"),
    ],
)
def test_bad_arguments(sizes: list[int], seed: int, window_shards: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(sizes, seed, window_shards)


def test_golden_uniforms() -> None:
    assert uniforms("crop", 3, 10**6, 3).tolist() == [
        0.4586799048841659,
        0.3506211843683208,
        0.2236574136032018,
    ]
    assert uniforms("crop", 3, 10**6, 1).tolist() == [0.4586799048841659]


@given(st.sampled_from(["crop", "frames", "words"]), seeds, st.integers(0, 10**12))
def test_uniforms_are_below_one_and_differ_by_purpose(purpose: str, seed: int, at: int) -> None:
    drawn = uniforms(purpose, seed, at, 64)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert drawn.tolist() != uniforms(purpose + "2", seed, at, 64).tolist()
    assert drawn.tolist() != uniforms(purpose, seed, at + 1, 64).tolist()
