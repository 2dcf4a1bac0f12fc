"""Which node downloads which shards, counted over whole epochs of the real order, and the global
batches that do not depend on it."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.reading.locality import (
    CacheNeed,
    RankShare,
    assigned,
    evaluation_need,
    owned,
    training_need,
)
from tvr.data_prep.reading.order import SampleOrder, window_shards

RANKS_PER_NODE = 8
MICRO_BATCH = 32
WORKERS = 4


def random_shards(num_shards: int, seed: int) -> list[Shard]:
    """Shards of 200 to 1,000 samples of 100 to 300 KB."""
    random = np.random.default_rng(seed)
    sizes = random.integers(200, 1000, num_shards).tolist()
    sample_bytes = random.integers(100_000, 300_000, num_shards).tolist()
    return [
        Shard(name=f"{n}", num_samples=size, shard_bytes=size * each, sha256="")
        for n, (size, each) in enumerate(zip(sizes, sample_bytes, strict=True))
    ]


class CountedNode:
    """A node's cache without bytes: counts what the store delivers."""

    def __init__(self, shards: list[Shard], max_bytes: int) -> None:
        self._shards = shards
        self._max_bytes = max_bytes
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._used = 0
        self.received = 0
        self.requests = 0

    def read(self, shard: int, samples: int, pinned: set[int], is_owned: bool) -> None:
        if shard in self._cached:
            self._cached.move_to_end(shard)
            return
        num_bytes = self._shards[shard].shard_bytes
        if is_owned:
            self._evict(num_bytes, pinned)
            self._cached[shard] = num_bytes
            self._used += num_bytes
            self.received += num_bytes
        else:
            self.requests += samples
            self.received += samples * (num_bytes // self._shards[shard].num_samples)

    def _evict(self, num_bytes: int, pinned: set[int]) -> None:
        for shard in [shard for shard in self._cached if shard not in pinned]:
            if self._used + num_bytes <= self._max_bytes:
                return
            self._used -= self._cached.pop(shard)
        assert self._used + num_bytes <= self._max_bytes, "shards in use exceed the need"


@pytest.mark.parametrize(("num_nodes", "num_shards"), [(1, 500), (8, 2000), (16, 2000), (50, 3000)])
def test_an_epoch_costs_about_the_size_of_the_data_set(num_nodes: int, num_shards: int) -> None:
    """Bytes from the store to all nodes in two epochs, by the real order, assignment, ownership and
    the need of a cache. Without locality they were 8 to 44 times the data set's size."""
    shards = random_shards(num_shards, num_nodes)
    world_size = num_nodes * RANKS_PER_NODE
    pairs = world_size * MICRO_BATCH
    order = SampleOrder(
        [shard.num_samples for shard in shards], 1, window_shards(pairs, num_shards)
    )
    shares = [
        RankShare(
            rank=first,
            world_size=world_size,
            micro_batch=MICRO_BATCH,
            node=range(first, first + RANKS_PER_NODE),
        )
        for first in range(0, world_size, RANKS_PER_NODE)
    ]
    needs = [training_need(shards, order, share, WORKERS) for share in shares]
    nodes = [CountedNode(shards, need.full) for need in needs]
    in_use, pinned, windows = list[set[int]](), list[set[int]](), None
    num_steps = order.num_samples // pairs
    for step in range(num_steps):
        start, stop = shares[0].span(step)
        found = order.locate_range(start, stop)
        # The shards in use change with the windows only.
        touched = order.window_at(start).first, order.window_at(stop - 1).first
        if touched != windows:
            windows = touched
            both = [share.shards(order, step) for share in shares]
            in_use = [set(current) for current, _ in both]
            pinned = [{*current, *upcoming} for current, upcoming in both]
        # Node after node, and within a node shard after shard.
        by_place = np.argsort(found.place, kind="stable")
        readers = np.repeat(np.arange(num_nodes), pairs // num_nodes) * num_shards
        read, counts = np.unique(readers + found.shard[by_place], return_counts=True)
        for number, count in zip(read.tolist(), counts.tolist(), strict=True):
            number, shard = divmod(number, num_shards)
            nodes[number].read(shard, count, pinned[number], shard in in_use[number])
    size = sum(shard.shard_bytes for shard in shards)
    ratio = sum(node.received for node in nodes) / size
    requests = sum(node.requests for node in nodes) / (num_steps * pairs)
    print(f"{num_nodes} nodes: {ratio:.3f} times the data set; {requests:.3f} requests a sample")
    assert 0.97 < ratio < 1.1
    assert requests < 0.12
    # A node needs a small part of the data set.
    assert num_nodes == 1 or max(need.full for need in needs) < 4 * size / order.num_windows


sizes_of_shards = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum)


@st.composite
def nodes_of(pick: st.DrawFn) -> tuple[int, list[range]]:
    """Ranks, and their division into nodes of any sizes."""
    world_size = pick(st.integers(1, 12))
    cuts = sorted(pick(st.sets(st.integers(1, world_size - 1)))) if world_size > 1 else []
    return world_size, [range(a, b) for a, b in pairwise([0, *cuts, world_size])]


@given(sizes_of_shards, nodes_of())
@example([1, 1], (2, [range(1), range(1, 2)]))
@example([4], (2, [range(1), range(1, 2)]))
def test_a_shard_has_at_most_one_owner_and_that_holds_half(
    sizes: list[int], division: tuple[int, list[range]]
) -> None:
    world_size, nodes = division
    starts = np.cumsum([0, *sizes])
    owners = np.array([owned(starts, node, world_size) for node in nodes])
    assert (owners.sum(axis=0) <= 1).all()
    for shard, size in enumerate(sizes):
        first, end = starts[shard] * world_size, starts[shard + 1] * world_size
        inside = [
            min(end, starts[-1] * node.stop) - max(first, starts[-1] * node.start) for node in nodes
        ]
        for held, owns in zip(inside, owners[:, shard], strict=True):
            assert not owns or 2 * held >= size * world_size
            assert owns or 2 * held <= size * world_size
    if len(nodes) == 1:
        assert owners[0, np.array(sizes) > 0].all()


@settings(max_examples=60)
@given(
    sizes_of_shards,
    st.integers(0, 2**63 - 1),
    st.sampled_from([(1, 24), (2, 12), (3, 8), (4, 3), (6, 4), (8, 1), (12, 2)]),
    st.integers(0, 10**6),
)
def test_global_batches_do_not_depend_on_ranks_or_restarts(
    sizes: list[int], seed: int, shape: tuple[int, int], step: int
) -> None:
    world_size, micro_batch = shape
    global_batch = 24
    order = SampleOrder(sizes, seed, window_shards(global_batch, len(sizes)))
    alone = RankShare(rank=0, world_size=1, micro_batch=global_batch, node=range(1))
    expected = alone.samples(order, step)
    assert [position for position, _ in expected] == list(range(24 * step, 24 * step + 24))
    fresh = SampleOrder(sizes, seed, window_shards(global_batch, len(sizes)))
    found = []
    for rank in range(world_size):
        share = RankShare(
            rank=rank, world_size=world_size, micro_batch=micro_batch, node=range(world_size)
        )
        micro_steps = share.micro_steps(global_batch)
        for number in range(step * micro_steps, (step + 1) * micro_steps):
            found += share.samples(fresh, number)
    assert sorted(found, key=lambda sample: sample[0]) == expected


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9]), min_size=12, max_size=12))
def test_ranks_share_a_micro_step_by_place_and_position(places: list[float]) -> None:
    by_place = sorted(range(12), key=lambda position: (places[position], position))
    for rank in range(4):
        expected = sorted(by_place[3 * rank : 3 * rank + 3])
        assert assigned(np.array(places), rank, 4).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": range(1, 3)}, r"node=range\(1, 3\) must be consecutive ranks of 4, rank=0"),
        ({"node": range(5)}, r"node=range\(0, 5\) must be"),
        ({"node": range(0, 4, 2)}, "must be consecutive ranks"),
    ],
)
def test_a_node_has_consecutive_ranks(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankShare(**({"rank": 0, "world_size": 4, "micro_batch": 1, "node": range(4)} | changes))


def test_the_need_of_an_evaluation_is_that_of_owned_shards() -> None:
    shards = [Shard(name="", num_samples=10, shard_bytes=100 + n, sha256="") for n in range(40)]
    share = RankShare(rank=0, world_size=4, micro_batch=8, node=range(2))
    # Each of the 2 ranks reads 8 rows, of 2 shards at most, and 2 shards ahead.
    assert evaluation_need(shards, share, 0) == CacheNeed(
        sum(range(116, 120)), sum(range(112, 120))
    )
    # Never more than the 20 shards of the node.
    assert evaluation_need(shards, share, 64).full == sum(range(100, 120))


def test_the_need_of_a_training_set_counts_the_windows_in_flight() -> None:
    shards = [Shard(name="", num_samples=100, shard_bytes=1000, sha256="")] * 320
    order = SampleOrder([100] * 320, 1, 16)  # 20 windows
    share = RankShare(rank=0, world_size=8, micro_batch=4, node=range(4))
    # Half of a window and one shard more; a batch may lie in two windows.
    assert training_need(shards, order, share, 0) == CacheNeed(17_000, 25_000)
    # 8 workers: 20 micro-steps of 32 positions are in flight, fewer than a window's 1,600.
    assert training_need(shards, order, share, 8).least == 17_000
    # Micro-batches of 128: 20 x 1,024 positions touch 14 windows, and half as many of a set that
    # half of the positions read.
    large = RankShare(rank=0, world_size=8, micro_batch=128, node=range(4))
    assert training_need(shards, order, large, 8).least == 14 * 8_000 + 1_000
    assert training_need(shards, order, large, 8, part=0.5).least == 8 * 8_000 + 1_000
    # Never more than the data set.
    small = SampleOrder([100] * 40, 1, 16)
    assert training_need(shards[:40], small, large, 8).full == 40_000
