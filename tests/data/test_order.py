"""The sample order: properties of the contract, and golden positions that must not change."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tvr.data_prep.reading import order as order_module
from tvr.data_prep.reading.locality import RankShare
from tvr.data_prep.reading.order import SampleOrder, caption_choice, uniforms, window_shards
from tvr.data_prep.reading.worker import MicroSteps, RowBatches
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


def epoch_by_contract(sizes: list[int], seed: int, window_shards: int, epoch: int) -> list[int]:
    """The manifest rows of an epoch, written as the contract is."""

    def words(stream: int, number: int) -> list[int]:
        key = np.array([seed, epoch], np.uint64)
        counter = np.array([0, 0, stream, 0], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(number).tolist()

    by_word = dict(enumerate(words(0, len(sizes))))
    shards = sorted(by_word, key=by_word.__getitem__)
    num_windows = max(1, round(len(sizes) / window_shards))
    rows = []
    for window in range(num_windows):
        first, end = (len(sizes) * w // num_windows for w in (window, window + 1))
        keyed = []
        for shard in shards[first:end]:
            size = sizes[shard]
            drawn = words(1 + shard, 2 * size)
            samples = sorted(range(size), key=drawn.__getitem__)
            for j, (sample, word) in enumerate(zip(samples, drawn[size:], strict=True)):
                keyed.append(((j + (word >> 11) / 2**53) / size, sum(sizes[:shard]) + sample))
        rows += [row for _, row in sorted(keyed, key=lambda entry: entry[0])]
    return rows


@given(shard_sizes, seeds, st.integers(1, 5), st.integers(0, 10**9))
def test_the_order_is_the_contracts(
    sizes: list[int], seed: int, window_shards: int, epoch: int
) -> None:
    order = SampleOrder(sizes, seed, window_shards)
    found = order.locate_range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
    assert found.sample.tolist() == epoch_by_contract(sizes, seed, window_shards, epoch)


@given(shard_sizes, seeds, st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_a_position_gives_the_same_sample_after_any_history(
    sizes: list[int], seed: int, positions: list[int]
) -> None:
    walked = SampleOrder(sizes, seed)
    found = [walked.locate(position) for position in positions]
    assert found == [SampleOrder(sizes, seed).locate(position) for position in positions]


@given(shard_sizes, seeds, st.integers(1, 5), st.integers(0, 100), st.integers(0, 100))
def test_a_range_has_the_samples_of_its_positions(
    sizes: list[int], seed: int, window_shards: int, start: int, length: int
) -> None:
    order = SampleOrder(sizes, seed, window_shards)
    found = order.locate_range(start, start + length)
    assert len(found) == length
    assert list(found) == [order.locate(start + step) for step in range(length)]


@given(shard_sizes, seeds, st.integers(1, 5), st.integers(0, 100))
def test_an_epoch_is_read_window_by_window(
    sizes: list[int], seed: int, window_shards: int, epoch: int
) -> None:
    order = SampleOrder(sizes, seed, window_shards)
    at, seen, num_shards = epoch * sum(sizes), [], []
    while at < (epoch + 1) * sum(sizes):
        window = order.window_at(at)
        assert (window.epoch, window.first) == (epoch, at)
        found = order.locate_range(at, window.end)
        assert set(found.shard.tolist()) == {s for s in window.shards.tolist() if sizes[s]}
        rows = window.starts[[window.shards.tolist().index(s) for s in found.shard]] + found.index
        assert (found.place * window.num_samples).round().astype(int).tolist() == rows.tolist()
        assert found.place.min() == 0
        assert found.place.max() < 1
        seen += window.shards.tolist()
        num_shards.append(len(window.shards))
        following = order.next_window(window)
        at = window.end
        assert (following.first, following.epoch) == (at, at // sum(sizes))
    if all(sizes):
        assert sorted(seen) == list(range(len(sizes)))
        assert max(num_shards) - min(num_shards) <= 1
        assert len(num_shards) == max(1, round(len(sizes) / window_shards))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    seeds,
    st.floats(0, 1),
    st.floats(0, 1),
)
@example([500] * 30, 3, 0.2, 0.3)
@example([1000, 3, 1, 1, 50, 2], 3, 0.2, 0.3)
def test_a_run_of_positions_holds_each_shard_in_proportion(
    sizes: list[int], seed: int, start: float, stop: float
) -> None:
    order = SampleOrder(sizes, seed, len(sizes))  # one window
    start, stop = sorted((start, stop))
    found = order.locate_range(int(start * sum(sizes)), int(stop * sum(sizes)))
    counts = np.bincount(found.shard, minlength=len(sizes))
    # For one share, each shard's count is within 2 samples of that share of its size.
    least, most = (counts - 2) / sizes, (counts + 2) / sizes
    assert least.max() < most.min()


def test_a_batch_takes_about_as_many_samples_of_each_shard() -> None:
    order = SampleOrder([800] * 200, 5, window_shards(12_800, 200))
    counts = np.bincount(order.locate_range(6 * 12_800, 7 * 12_800).shard, minlength=200)
    assert order.num_windows == 1
    assert abs(counts - 64).max() <= 2


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50), st.integers(1, 4)
)
def test_all_ranks_together_consume_consecutive_positions(
    world_size: int, micro_batch: int, micro_steps: int, start_step: int, steps: int
) -> None:
    pairs = world_size * micro_batch
    order = SampleOrder([7, 1, 12, 3], seed=2, window_shards=2)
    numbers = list(islice(iter(MicroSteps(start_step * micro_steps)), steps * micro_steps))
    for done, number in enumerate(numbers):
        consumed, places = [], []
        for rank in range(world_size):
            share = RankShare(
                rank=rank, world_size=world_size, micro_batch=micro_batch, node=range(world_size)
            )
            samples = share.samples(order, number)
            positions = [position for position, _ in samples]
            assert positions == sorted(positions)
            assert [location for _, location in samples] == [order.locate(p) for p in positions]
            consumed += positions
            places.append([location.place for _, location in samples])
        first = (start_step * micro_steps + done) * pairs
        assert sorted(consumed) == list(range(first, first + pairs))
        for lower, higher in pairwise(places):
            assert max(lower) <= min(higher)


def test_only_the_window_of_a_position_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = order_module._random_words

    def counted(*arguments: Any) -> np.ndarray:
        words = draw(*arguments)
        drawn.append(len(words))
        return words

    monkeypatch.setattr(order_module, "_random_words", counted)
    num_shards, size = 10_000, 1_000
    order = SampleOrder([size] * num_shards, 1, window_shards(2_048, num_shards))
    for position in (10**9, 10**9 + 77):
        order.locate_range(position, position + 2_048)
    # The shuffle of the shards, and two words for each sample of one window of 32 shards.
    assert sum(drawn) <= num_shards + 2 * size * 33
    for window in range(20):
        order.locate(window * 33 * size)
    held = [len(rows) for rows in order._drawn.values()]
    assert len(held) == 2
    assert max(held) <= 33 * size
    assert len(order._epochs) <= order_module.HELD_EPOCHS


@pytest.mark.parametrize(
    ("global_batch", "num_shards", "expected"),
    [(1, 5, 5), (1, 100, 16), (1024, 100, 16), (1025, 100, 17), (12_800, 9_999, 200)],
)
def test_window_shards(global_batch: int, num_shards: int, expected: int) -> None:
    assert window_shards(global_batch, num_shards) == expected


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 7))
def test_evaluation_batches_cover_each_row_once(
    total: int, world_size: int, micro_batch: int
) -> None:
    rows = [
        row
        for rank in range(world_size)
        for batch in RowBatches(
            total * rank // world_size, total * (rank + 1) // world_size, micro_batch
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
        *((0, 0, 2), (0, 3, 2), (0, 0, 3), (0, 3, 1), (0, 0, 0), (0, 3, 3), (0, 0, 4)),
        *((0, 0, 1), (0, 3, 0), (0, 2, 5), (0, 2, 4), (0, 1, 1), (0, 2, 3), (0, 2, 6)),
        *((0, 2, 1), (0, 1, 0), (0, 1, 2), (0, 2, 0), (0, 2, 2), (1, 0, 2)),
    ]
    assert [order.locate(position).place * 9 for position in range(4)] == [6, 2, 7, 1]
    assert [order.locate(19_000 + step).sample for step in range(6)] == [4, 18, 0, 1, 15, 16]
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
