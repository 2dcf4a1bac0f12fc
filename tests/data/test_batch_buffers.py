"""Memory shared by loader workers and their parent: reused, but never while it is in use."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.batches import damage_sample, training
from builders.clip_files import number_picture

from tvr.data_prep.demo_clips import write_clip
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.batch_buffers import SLOTS_PER_WORKER, BatchInSlot, BatchSlots
from tvr.data_prep.records import Batch, Clip

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE, BATCH = 16, 3


def make_square_dataset(folder: Path) -> str:
    """Packs 11 clips of 4 square frames; frames of another shape are not decoded into slots."""
    folder.mkdir(exist_ok=True)
    clips = []
    for index in range(11):
        numbers = [number_picture(8 * index + frame) for frame in range(4)]
        path = folder / f"c{index:02d}.mp4"
        write_clip(path, np.concatenate([numbers, numbers], axis=1))
        key = path.stem
        clips.append(Clip(key=key, video=str(path), captions=("a caption",), video_id=key))
    url = str(folder / "data")
    pack_shards(clips, url, layout="frames", num_frames=4, samples_per_shard=5, short_side=SIZE)
    return url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_square_dataset(tmp_path_factory.mktemp("frames"))


def batches(url: str, workers: int, **changes: Any) -> Iterator[Batch]:
    settings = {"seed": 3, "global_batch": BATCH, "micro_batch": BATCH, "max_bad": 3}
    return training(url, workers=workers, **(settings | changes))


def test_batches_in_use_are_never_overwritten(url: str) -> None:
    expected = list(islice(batches(url, 0), 40))
    kept = list(islice(batches(url, 2), 40))  # more batches than slots
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.frames, theirs.frames)
        assert ours.frames.stride() == theirs.frames.stride()


def test_a_view_of_a_batch_keeps_its_slot(url: str) -> None:
    expected = [batch.frames[1, 0].clone() for batch in islice(batches(url, 0), 30)]
    views = [batch.frames[1, 0] for batch in islice(batches(url, 1), 30)]
    gc.collect()
    assert all(map(torch.equal, views, expected))


def test_slots_are_reused(url: str) -> None:
    addresses = []
    for batch in islice(batches(url, 2), 40):
        addresses.append(batch.frames.data_ptr())
        del batch
    assert len(addresses) == 40
    assert len(set(addresses)) <= 2 * SLOTS_PER_WORKER


def test_an_abandoned_stream_frees_no_memory_in_use(url: str) -> None:
    stream = batches(url, 2)
    first = next(stream)
    expected = first.frames.clone()
    del stream
    gc.collect()
    for _ in islice(batches(url, 2), 20):
        pass
    assert torch.equal(first.frames, expected)


def test_samples_of_another_size_and_bad_samples_are_copied(url: str, tmp_path: Path) -> None:
    folder = Path(make_square_dataset(tmp_path / "damaged"))
    for row in (2, 7):
        damage_sample(folder, row)
    for changes in ({}, {"image_size": 8}, {"num_frames": 2}):
        expected = list(islice(batches(str(folder), 0, **changes), 16))
        ours = list(islice(batches(str(folder), 2, **changes), 16))
        assert any(batch.replaced for batch in ours)
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(mine.frames, theirs.frames)
            assert mine.replaced == theirs.replaced


class Pins:
    """Notes what is pinned, as addresses and sizes."""

    def __init__(self) -> None:
        self.now, self.ever = dict[int, int](), list[int]()

    def __call__(self, address: int, num_bytes: int) -> Any:
        assert address not in self.now
        assert address % mmap.PAGESIZE == num_bytes % mmap.PAGESIZE == 0
        assert all(address >= first + size or address < first for first, size in self.now.items())
        self.now[address] = num_bytes
        self.ever.append(address)
        return lambda: self.now.pop(address)


def test_each_slot_is_pinned_once(url: str) -> None:
    pins, addresses = Pins(), set[int]()
    for batch in islice(batches(url, 2, pin=pins), 40):
        addresses.add(batch.frames.data_ptr())
        del batch
    # A slot is pinned when its first batch arrives; one that was never used is not pinned.
    assert set() < set(pins.ever) <= addresses
    assert len(pins.ever) == len(set(pins.ever)) <= 2 * SLOTS_PER_WORKER


def test_slots_are_unpinned_when_nothing_uses_their_memory(url: str) -> None:
    pins = Pins()
    empty = replace(next(batches(url, 0)), frames=torch.empty(0, dtype=torch.uint8))
    slots = BatchSlots(1, (3, 2, 16, 16, 3), pins)
    first, second = (slots.receive(BatchInSlot(empty, number)) for number in (0, 1))
    assert list(pins.now) == [first.frames.data_ptr(), second.frames.data_ptr()]
    view = second.frames[1, 0]
    del slots, first, second
    gc.collect()
    assert len(pins.now) == 2
    del view
    gc.collect()
    assert pins.now == {}
