"""The sample sequence over real shards: for any number of shards, samples, ranks (1 to 5), workers
(0 to 3) and restarts, an epoch yields each sample exactly once and the global batches are the same;
a start at a late step costs no more than a start at an early one."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.clip_files import tokenize
from builders.exhaustive import examples, further
from builders.raw_shards import write_raw_shards
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tvr.data_prep.dataset.shard_writer import TarSample, tar_bytes
from tvr.data_prep.reading import worker
from tvr.data_prep.reading.loader import train_batches
from tvr.data_prep.reading.order import SampleOrder, caption_choice
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.reading.shard_bytes import ShardReader
from tvr.data_prep.records import Batch
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.images import encode_jpeg

# torch warns if there are more workers than cores; the order must not depend on the cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

GLOBAL_BATCH = 60  # a multiple of every number of ranks
SEED = 11
SIDE = 8


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start or restart of a run: its ranks, workers and micro-batch, and the steps it runs."""

    world_size: int
    micro_batch: int
    workers: int
    steps: int


@st.composite
def starts(pick: st.DrawFn) -> Start:
    world_size = pick(st.integers(1, 5))
    pairs_per_rank = GLOBAL_BATCH // world_size
    return Start(
        world_size=world_size,
        micro_batch=pick(
            st.sampled_from([b for b in range(1, pairs_per_rank + 1) if pairs_per_rank % b == 0])
        ),
        workers=pick(st.integers(0, 3)),
        steps=pick(st.integers(1, 2)),
    )


def write_shards(folder: Path, sizes: list[int]) -> str:
    """Writes shards of these sizes; sample i shows grey level i and has i % 3 + 1 captions."""
    numbers = count()
    shards = [[tar_sample(next(numbers)) for _ in range(size)] for size in sizes]
    return write_raw_shards(folder, shards, layout="frames", num_frames=1)


def tar_sample(number: int) -> TarSample:
    key, video_id, captions = f"c{number}", f"v{number}", captions_of(number)
    meta = {"captions": captions, "video_id": video_id, "frame_times_s": [0.0]}
    picture = np.full((SIDE, SIDE, 3), number, dtype=np.uint8)
    members = {"json": json.dumps(meta).encode(), "0.jpg": encode_jpeg(picture, 95)}
    return TarSample(
        key=key,
        video_id=video_id,
        stored=tar_bytes(key, members),
        num_captions=len(captions),
        content=number,
    )


def captions_of(number: int) -> list[str]:
    return [f"caption {choice} of {number}" for choice in range(number % 3 + 1)]


def stream(url: str, start: Start, rank: int, start_step: int) -> Any:
    return train_batches(
        url,
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=start.micro_batch,
        rank=rank,
        world_size=start.world_size,
        start_step=start_step,
        workers=start.workers,
        num_frames=1,
        image_size=SIDE,
        tokenize=tokenize,
        max_bad=0,
    )


def rows(batch: Batch) -> list[tuple[int, str, str, int]]:
    pictures = [round(float(frames.float().mean())) for frames in batch.frames]
    return list(zip(batch.positions.tolist(), batch.keys, batch.captions, pictures, strict=True))


def global_batches(url: str, start: Start, start_step: int) -> list[list[tuple]]:
    """The rows of each step, by micro-step and then by position."""
    micro_steps_per_step = GLOBAL_BATCH // (start.world_size * start.micro_batch)
    ranks = [
        [
            rows(b)
            for b in islice(
                stream(url, start, rank, start_step), start.steps * micro_steps_per_step
            )
        ]
        for rank in range(start.world_size)
    ]
    micro_steps = [
        sorted(row for batch in batches for row in batch) for batches in zip(*ranks, strict=True)
    ]
    return [
        [row for micro_step in micro_steps[at : at + micro_steps_per_step] for row in micro_step]
        for at in range(0, len(micro_steps), micro_steps_per_step)
    ]


def expected(order: SampleOrder, step: int) -> list[tuple[int, str, str, int]]:
    """The rows of a step according to the contract."""
    found = []
    for position in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH):
        location = order.locate(position)
        captions = captions_of(location.sample)
        choice = caption_choice(SEED, location.epoch, location.sample, len(captions))
        found.append((position, f"c{location.sample}", captions[choice], location.sample))
    return found


MOST = Start(world_size=5, micro_batch=4, workers=3, steps=2)
LEAST = Start(world_size=1, micro_batch=60, workers=0, steps=1)
EACH = [Start(world_size=ranks, micro_batch=1, workers=ranks % 4, steps=1) for ranks in range(1, 6)]


@settings(max_examples=examples(25))
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    first_step=st.sampled_from([0, 1, 10, 1_000_000]),
    restarts=st.lists(starts(), min_size=1, max_size=3),
)
@example(sizes=[6] * 20, first_step=0, restarts=[MOST, LEAST, MOST])
@example(sizes=[1], first_step=1_000_000, restarts=[MOST, LEAST])
@example(sizes=[3, 1, 5], first_step=10, restarts=EACH)
def test_each_sample_is_read_once_per_epoch_in_the_same_global_batches(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    first_step: int,
    restarts: list[Start],
) -> None:
    url = write_shards(tmp_path_factory.mktemp("shards") / "data", sizes)
    order = SampleOrder(sizes, SEED)
    total = sum(sizes)
    run: list[list[tuple]] = []
    for start in restarts:
        run += global_batches(url, start, first_step + len(run))
    while len(run) * GLOBAL_BATCH < 2 * total:  # at least one whole epoch
        run += global_batches(url, restarts[-1], first_step + len(run))
    for done, batch in enumerate(run):
        assert batch == expected(order, first_step + done)
    seen = [row for batch in run for row in batch]
    for epoch in range(-(-seen[0][0] // total), (seen[-1][0] + 1) // total):
        first = epoch * total - seen[0][0]
        keys = [key for _, key, *_ in seen[first : first + total]]
        assert Counter(keys) == Counter(f"c{number}" for number in range(total))


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("many") / "data", [5] * 40)


@pytest.mark.parametrize("world_size", [5, *further(1)])
def test_a_start_at_any_step_costs_the_same(
    many_shards: str, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    calls: Counter[str] = Counter()

    def count_calls(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return original(*args, **keywords)

        monkeypatch.setattr(owner, name, wrapped)

    count_calls(SampleReader, "read")
    count_calls(SampleOrder, "locate_range")
    count_calls(SampleOrder, "substitute")
    count_calls(SampleOrder, "_draw")
    count_calls(worker, "caption_choice")
    count_calls(ShardReader, "_read_local")
    count_calls(Storage, "_read")
    start = Start(world_size=world_size, micro_batch=6, workers=0, steps=1)
    costs = []
    for start_step in (10, 10**6, 10**9):
        calls.clear()
        for rank in range(world_size):
            next(stream(many_shards, start, rank, start_step))
        costs.append(dict(calls))
    assert costs[0] == costs[1] == costs[2]
    pairs = 6 * world_size
    assert costs[0] == {
        "read": pairs,
        "locate_range": world_size,
        "caption_choice": pairs,
        "_read_local": pairs,
        "_draw": world_size,
        "_read": world_size,  # the manifest; its rows are mapped
    }


@pytest.mark.parametrize("start_step", [1_000_000, *further(10)])
def test_workers_read_only_from_the_first_batch(
    many_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_step: int
) -> None:
    """Workers read ahead by a bounded number of batches, whatever the first step."""
    log_file = tmp_path / "starts"
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    locate = SampleOrder.locate_range
    monkeypatch.setattr(
        SampleOrder,
        "locate_range",
        lambda self, start, stop: (
            os.write(descriptor, b"%d\n" % start) and locate(self, start, stop)
        ),
    )
    start = Start(world_size=2, micro_batch=6, workers=3, steps=1)
    batches = stream(many_shards, start, 1, start_step)
    received = [position for b in islice(batches, 4) for position in b.positions.tolist()]
    del batches
    os.close(descriptor)
    starts = list(
        range(start_step * GLOBAL_BATCH, start_step * GLOBAL_BATCH + 12 * (4 + 2 * 3), 12)
    )
    assert [position - position % 12 for position in received] == sorted(starts[:4] * 6)
    read = sorted(int(line) for line in log_file.read_text().split())
    # No order among the batches ahead: on a busy machine one worker may be behind the others.
    assert len(set(read)) == len(read)
    assert set(starts[:4]) <= set(read) <= set(starts)
