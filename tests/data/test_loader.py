"""Batches of the loader: the same order for every world size, number of workers and restart; bad
samples are replaced and counted."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.batches import damage_sample, evaluation, rows_of, training
from builders.clip_files import make_dataset, plain_captions, read_number

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.loader import read_sample, read_samples
from tvr.data_prep.reading.order import SampleOrder, caption_choice
from tvr.data_prep.reading.sample_cache import DecodedSampleCache
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import TooManyBadSamples

# torch warns if there are more workers than cores; the order must not depend on the cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_SAMPLES = 13


@pytest.fixture(scope="module")
def frames_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("frames"), NUM_SAMPLES)


def global_sequence(url: str, world_size: int, steps: int, **changes: Any) -> list[tuple]:
    """Rows of the first steps of all ranks together, in the order of positions."""
    micro_batch = 8 // world_size // 2
    ranks = [
        training(url, rank=rank, world_size=world_size, micro_batch=micro_batch, **changes)
        for rank in range(world_size)
    ]
    rows = [sorted(rows_of([next(rank) for rank in ranks])) for _ in range(2 * steps)]
    return [row for micro_step in rows for row in micro_step]


def test_the_order_does_not_depend_on_ranks_or_workers(frames_url: str) -> None:
    expected = global_sequence(frames_url, world_size=1, steps=5)
    order = SampleOrder(read_manifest(frames_url).shard_sizes, seed=7)
    assert [position for position, *_ in expected] == list(range(40))
    assert [key for _, key, *_ in expected] == [
        f"c{order.locate(position).sample:02d}" for position in range(40)
    ]
    for epoch in range(3):
        keys = {row[1] for row in expected[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]}
        assert len(keys) == NUM_SAMPLES
    for world_size in (2, 4):
        assert global_sequence(frames_url, world_size=world_size, steps=5) == expected
    for workers in (1, 2):
        assert rows_of(list(islice(training(frames_url, workers=workers), 20))) == expected
    with_both = global_sequence(frames_url, world_size=2, steps=5, workers=1)
    assert with_both == expected


@pytest.mark.parametrize("start_step", [1, 3, 500])
def test_a_resumed_run_continues_the_sequence(frames_url: str, start_step: int) -> None:
    resumed = rows_of(list(islice(training(frames_url, start_step=start_step, workers=1), 6)))
    assert [row[0] for row in resumed] == list(range(start_step * 8, start_step * 8 + 12))
    if start_step < 10:
        full = rows_of(list(islice(training(frames_url), start_step * 4 + 6)))
        assert resumed == full[start_step * 8 :]


def test_a_late_start_reads_only_its_own_batch(
    frames_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    drawn: list[int] = []
    read_row, draw = SampleReader.read, SampleOrder._draw
    monkeypatch.setattr(
        SampleReader,
        "read",
        lambda self, row, *rest, **options: (
            read.append(row) or read_row(self, row, *rest, **options)
        ),
    )
    monkeypatch.setattr(
        SampleOrder,
        "_draw",
        lambda self, window: drawn.append(window.epoch) or draw(self, window),
    )
    for start_step in (0, 10, 1_000_000):
        read.clear()
        drawn.clear()
        stream = training(frames_url, start_step=start_step)
        assert (read, drawn) == ([], [])
        batch = next(stream)
        assert batch.positions.tolist() == [start_step * 8, start_step * 8 + 1]
        assert [f"c{row:02d}" for row in read] == list(batch.keys)
        assert drawn == [start_step * 8 // NUM_SAMPLES]


def test_captions_are_chosen_as_the_contract_defines(frames_url: str) -> None:
    order = SampleOrder(read_manifest(frames_url).shard_sizes, seed=7)
    rows = rows_of(list(islice(training(frames_url), 40)))
    for position, _, caption, _ in rows:
        location = order.locate(position)
        choice = caption_choice(7, location.epoch, location.sample, location.sample % 3 + 1)
        assert caption == f"caption {choice} of clip {location.sample}"
    assert len({caption for _, _, caption, _ in rows}) > NUM_SAMPLES


def test_batch_shapes_and_masks(frames_url: str) -> None:
    batch = next(training(frames_url, micro_batch=8))
    assert (batch.frames.shape, batch.frames.dtype) == ((8, 4, 3, 16, 16), torch.uint8)
    assert batch.frame_mask.tolist() == [[1, 1, 1, 1]] * 8
    assert (batch.token_ids.shape, batch.word_mask.shape) == ((8, 8), (8, 8))
    assert batch.caption_video.tolist() == list(range(8))
    assert len(set(batch.video_ids.tolist())) == 8
    assert batch.replaced == ()


def test_missing_frames_are_padded_and_surplus_frames_are_sampled(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 3, num_frames=9)  # the videos have 4 frames
    batch = evaluation(url, num_frames=9)[0]
    assert batch.frame_mask.tolist() == [[1] * 4 + [0] * 5] * 3
    assert batch.frames[:, :4].flatten(2).amax(dim=2).any()
    assert not batch.frames[:, 4:].any()
    frames = read_sample(url, "c02", num_frames=2, image_size=32).frames
    whole = read_sample(url, "c02", num_frames=9, image_size=32).frames
    assert np.array_equal(frames, whole[[1, 3]])


def test_the_video_layout_samples_frames_on_reading(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 3, layout="video")
    frames = read_sample(url, "c01", num_frames=2, image_size=32)
    assert frames.frame_times_s == (0.1, 0.3)
    batch = evaluation(url, num_frames=6)[0]
    assert batch.frame_mask.tolist() == [[1] * 4 + [0] * 2] * 3
    assert read_number(np.pad(frames.frames[1], ((0, 0), (16, 16), (0, 0)))) & 0b01100110 == 2


def test_evaluation_reads_each_sample_once_with_all_captions(frames_url: str) -> None:
    for world_size in (1, 2, 3, 14):
        for workers in (0, 2) if world_size == 2 else (0,):
            batches = [
                batch
                for rank in range(world_size)
                for batch in evaluation(
                    frames_url, rank=rank, world_size=world_size, workers=workers
                )
            ]
            keys = [key for batch in batches for key in batch.keys]
            assert keys == [f"c{row:02d}" for row in range(NUM_SAMPLES)]
            pairs = [
                (caption, batch.keys[row])
                for batch in batches
                for caption, row in zip(batch.captions, batch.caption_video.tolist(), strict=True)
            ]
            assert pairs == [
                (f"caption {number} of clip {row}", f"c{row:02d}")
                for row in range(NUM_SAMPLES)
                for number in range(row % 3 + 1)
            ]


def test_the_cache_changes_no_sample_and_respects_its_limit(frames_url: str) -> None:
    plain = rows_of(list(islice(training(frames_url), 20)))
    one_sample = 4 * 16 * 16 * 3
    for cache_bytes in (1, 3 * one_sample, 100 * one_sample):
        batches = list(islice(training(frames_url, cache_bytes=cache_bytes), 20))
        assert rows_of(batches) == plain
    # The largest cache holds all samples, so each is read once.
    keys = [key for batch in batches for key in batch.keys]
    reads = sum((Counter(batch.reads) for batch in batches), Counter())
    assert reads == {"local": len(set(keys)), "memory": len(keys) - len(set(keys))}
    cache = DecodedSampleCache(2 * one_sample)
    samples = read_samples(frames_url, ["c00", "c01", "c02"], num_frames=4, image_size=16)
    for row in (0, 1):
        cache.put(row, samples[row])
    assert cache.get(0) is samples[0]
    cache.put(2, samples[2])
    assert [cache.get(row) for row in range(3)] == [samples[0], None, samples[2]]
    with pytest.raises(ValueError, match="cache_bytes=-1 must be 0"):
        training(frames_url, cache_bytes=-1)


def test_the_number_of_open_files_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr.data_prep.reading.shard_bytes.MAX_OPEN_SHARDS", 2)
    url = make_dataset(tmp_path, NUM_SAMPLES, samples_per_shard=2)
    stream = training(url)
    rows = rows_of(list(islice(stream, 20)))
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    assert len([path for path in opened if url in str(path) and path.suffix == ".tar"]) == 2
    assert len({key for _, key, *_ in rows}) == NUM_SAMPLES


def test_global_random_states_do_not_change(frames_url: str) -> None:
    def states() -> tuple:
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
        )

    before = states()
    for workers in (0, 1):
        list(islice(training(frames_url, workers=workers), 3))
        evaluation(frames_url, workers=workers)
    assert states() == before


@pytest.fixture
def damaged_url(frames_url: str, tmp_path: Path) -> str:
    """A copy in which c02 has a flipped bit, and the last shard ends within c11."""
    url = str(tmp_path / "damaged")
    shutil.copytree(frames_url, url)
    damage_sample(Path(url), 2)
    columns = read_manifest(url).samples
    last = Path(url) / "shard-000002.tar"
    last.write_bytes(last.read_bytes()[: int(columns.offset[11]) + 1000])
    return url


def test_bad_samples_are_replaced_deterministically(frames_url: str, damaged_url: str) -> None:
    sound = rows_of(list(islice(training(frames_url), 20)))
    batches = list(islice(training(damaged_url, max_bad=3), 20))
    order = SampleOrder(read_manifest(damaged_url).shard_sizes, seed=7)
    bad = {"c02", "c11", "c12"}
    replaced = [entry for batch in batches for entry in batch.replaced]
    assert {entry.key for entry in replaced} == bad
    assert {entry.reason for entry in replaced} == {"checksum"}
    assert {entry.position for entry in replaced} == {row[0] for row in sound if row[1] in bad}
    for before, after in zip(sound, rows_of(batches), strict=True):
        if before[1] not in bad:
            assert after == before
            continue
        tries = [f"c{order.substitute(before[0], attempt).sample:02d}" for attempt in range(1, 9)]
        assert after[1] == next(key for key in tries if key not in bad)
    for changes in ({"workers": 2}, {"workers": 1}):
        again = list(islice(training(damaged_url, max_bad=3, **changes), 20))
        assert rows_of(again) == rows_of(batches)
        assert [entry for batch in again for entry in batch.replaced] == replaced
    assert global_sequence(damaged_url, world_size=2, steps=5, max_bad=3) == rows_of(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_budget_stops_training(damaged_url: str, workers: int) -> None:
    message = (
        r"3 bad samples in .* on rank 0, max_bad=2 allowed \(3 checksum\); last: .*c\d\d: check"
    )
    with pytest.raises(TooManyBadSamples, match=message):
        list(islice(training(damaged_url, max_bad=2, workers=workers), 60))


def test_consecutive_failures_have_a_separate_limit() -> None:
    budget = BadSampleBudget(100, "in x", 2)
    for _ in range(3):  # each sample counts once for max_bad, but each failure for max_bad_in_a_row
        budget.record_bad("a", "checksum", "")
        budget.record_bad("b", "checksum", "")
        budget.record_good()
    budget.record_bad("a", "checksum", "")
    budget.record_bad("a", "checksum", "")
    message = r"2 bad samples in x, 3 in a row, max_bad_in_a_row=2 allowed \(2 checksum\); last: a"
    with pytest.raises(TooManyBadSamples, match=message):
        budget.record_bad("a", "checksum", "")
    with pytest.raises(ValueError, match="max_bad_in_a_row=0 must be 1 or more"):
        BadSampleBudget(0, "", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_consecutive_failures_stop_the_stream(
    frames_url: str, tmp_path: Path, workers: int
) -> None:
    url = str(tmp_path / "data")
    shutil.copytree(frames_url, url)
    (tmp_path / "data" / "shard-000001.tar").unlink()  # c05 to c09
    limits: dict[str, Any] = {"max_bad": 100, "workers": workers}
    keys = [key for batch in evaluation(url, max_bad_in_a_row=5, **limits) for key in batch.keys]
    assert len(keys) == NUM_SAMPLES - 5
    with pytest.raises(TooManyBadSamples, match=r"5 bad .* 5 in a row, max_bad_in_a_row=4 allowed"):
        evaluation(url, max_bad_in_a_row=4, **limits)
    # In training, a good substitute does not reset the count; a sample read as planned does.
    batches = list(islice(training(url, **limits), 20))
    bad = {entry.position for batch in batches for entry in batch.replaced}
    longest = run = 0
    for position in range(40):
        tries = [e for batch in batches for e in batch.replaced if e.position == position]
        run = run + len(tries) if position in bad else 0
        longest = max(longest, run)
    assert longest > 2
    list(islice(training(url, max_bad_in_a_row=longest, **limits), 20))
    with pytest.raises(TooManyBadSamples, match=rf"{longest} in a row"):
        list(islice(training(url, max_bad_in_a_row=longest - 1, **limits), 20))


def test_a_bad_sample_is_counted_once_over_many_epochs(damaged_url: str) -> None:
    batches = list(islice(training(damaged_url, max_bad=3), 60))
    assert sum(len(batch.replaced) for batch in batches) > 3


def test_a_missing_shard_has_its_own_reason(frames_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    shutil.copytree(frames_url, url)
    (tmp_path / "data" / "shard-000001.tar").unlink()
    batches = list(islice(training(url, max_bad=5), 8))
    assert {entry.reason for batch in batches for entry in batch.replaced} == {"missing_shard"}
    for shard in (0, 2):
        (tmp_path / "data" / f"shard-00000{shard}.tar").unlink()
    with pytest.raises(TooManyBadSamples, match="13 missing_shard"):
        list(islice(training(url, max_bad=1000), 8))


def test_evaluation_leaves_bad_samples_out(damaged_url: str) -> None:
    for workers in (0, 1):
        batches = evaluation(damaged_url, max_bad=3, workers=workers)
        keys = [key for batch in batches for key in batch.keys]
        assert keys == [f"c{row:02d}" for row in range(NUM_SAMPLES) if row not in (2, 11, 12)]
        replaced = [(e.position, e.key) for batch in batches for e in batch.replaced]
        assert replaced == [(2, "c02"), (11, "c11"), (12, "c12")]
    with pytest.raises(TooManyBadSamples, match="max_bad=2"):
        evaluation(damaged_url, max_bad=2)


def test_evaluation_yields_no_empty_batch_and_reports_every_bad_sample(damaged_url: str) -> None:
    batches = evaluation(damaged_url, max_bad=3, micro_batch=1)
    assert all(len(batch.keys) == 1 for batch in batches)
    assert [(b.keys[0], e.key) for b in batches for e in b.replaced] == [
        ("c01", "c02"),
        ("c10", "c11"),
        ("c10", "c12"),
    ]
    (start,) = evaluation(damaged_url, max_bad=3, micro_batch=1, rank=1, world_size=6)  # rows 2, 3
    assert (start.keys, [entry.key for entry in start.replaced]) == (("c03",), ["c02"])
    with pytest.raises(TooManyBadSamples, match="last: c02"):
        evaluation(damaged_url, max_bad=3, rank=2, world_size=13)  # row 2 alone


def test_samples_are_read_by_key(frames_url: str) -> None:
    samples = read_samples(frames_url, ["c05", "c01"], num_frames=4, image_size=16)
    assert [sample.key for sample in samples] == ["c05", "c01"]
    assert list(samples[0].captions) == plain_captions(
        *(f"caption {number} of clip 5" for number in range(3))
    )
    with pytest.raises(ValueError, match=r"key='x' is not in .* \(it holds 13 samples\)"):
        read_sample(frames_url, "x", num_frames=4, image_size=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 9}, r"global_batch=9 must be a multiple of .* 2 x 1; the nearest is 8"),
        ({"global_batch": 1}, "global_batch=1 must be a multiple"),
        ({"micro_batch": 0}, "micro_batch=0 must be at least 1"),
        ({"rank": 1}, "rank=1 must be from 0 to world_size - 1 = 0"),
        ({"world_size": 0}, "rank=0 must be from 0"),
        ({"start_step": -1}, "start_step=-1 must be 0 or more"),
        ({"workers": -1}, "workers=-1 must be 0"),
        ({"num_frames": 5}, r"num_frames=5 must be from 1 to 4, the frames stored"),
        ({"num_frames": 0}, "num_frames=0 and image_size=16 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"max_bad": -1}, "max_bad=-1 must be 0 or more"),
        ({"max_bad_in_a_row": 0}, "max_bad_in_a_row=0 must be 1 or more"),
        ({"seed": -1}, "seed=-1 must be from 0"),
    ],
)
def test_bad_arguments_raise_at_the_call(
    frames_url: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        training(frames_url, **changes)


def test_a_missing_data_set_raises_at_the_call(tmp_path: Path) -> None:
    for read in (training, evaluation):
        with pytest.raises(FileNotFoundError, match="no data set there"):
            read(str(tmp_path))
