"""Memory that loader workers and their parent share: used again, and never while it is in use."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import make_dataset, tokenize

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.batch_buffers import SLOTS_PER_WORKER
from tvr.data_prep.reading.loader import train_batches
from tvr.data_prep.records import Batch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE, BATCH = 16, 3


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("frames"), 11, short_side=SIZE)


def batches(url: str, workers: int, **changes: Any) -> Iterator[Batch]:
    settings: dict[str, Any] = {
        "seed": 3,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "rank": 0,
        "world_size": 1,
        "start_step": 0,
        "num_frames": 4,
        "image_size": SIZE,
        "tokenize": tokenize,
        "max_bad": 3,
    }
    return train_batches(url, workers=workers, **(settings | changes))


def test_batches_that_are_held_are_never_written_to(url: str) -> None:
    expected = list(islice(batches(url, 0), 40))
    held = list(islice(batches(url, 2), 40))  # more than there are rooms
    for ours, theirs in zip(held, expected, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.frames, theirs.frames)
        assert ours.frames.stride() == theirs.frames.stride()


def test_a_view_of_a_batch_keeps_its_room(url: str) -> None:
    expected = [batch.frames[1, 0].clone() for batch in islice(batches(url, 0), 30)]
    views = [batch.frames[1, 0] for batch in islice(batches(url, 1), 30)]
    gc.collect()
    assert all(map(torch.equal, views, expected))


def test_rooms_are_used_again(url: str) -> None:
    places = []
    for batch in islice(batches(url, 2), 40):
        places.append(batch.frames.data_ptr())
        del batch
    assert len(places) == 40
    assert len(set(places)) <= 2 * SLOTS_PER_WORKER


def test_a_stream_that_is_left_alone_frees_nothing_too_early(url: str) -> None:
    stream = batches(url, 2)
    first = next(stream)
    expected = first.frames.clone()
    del stream
    gc.collect()
    for _ in islice(batches(url, 2), 20):
        pass
    assert torch.equal(first.frames, expected)


def test_samples_of_another_size_and_bad_ones_come_the_usual_way(url: str, tmp_path: Path) -> None:
    folder = Path(make_dataset(tmp_path / "damaged", 11, short_side=SIZE))
    samples = read_manifest(str(folder)).samples
    for row in (2, 7):
        shard = folder / read_manifest(str(folder)).shards[int(samples.shard[row])].name
        content = bytearray(shard.read_bytes())
        content[int(samples.offset[row]) + 600] ^= 1
        shard.write_bytes(content)
    for changes in ({}, {"image_size": 8}, {"num_frames": 2}):
        expected = list(islice(batches(str(folder), 0, **changes), 16))
        ours = list(islice(batches(str(folder), 2, **changes), 16))
        assert any(batch.replaced for batch in ours)
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(mine.frames, theirs.frames)
            assert mine.replaced == theirs.replaced
