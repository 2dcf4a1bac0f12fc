"""Every kind of damage on real files: what is readable comes once, the rest is named, on any ranks
and workers and after any restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from builders.clip_files import numbered_video, sound_only, tokenize
from builders.http_store import HttpStorage, serve_folder
from fsspec.core import url_to_fs

from tvr.data_prep.dataset.manifest import (
    Manifest,
    concat_samples,
    read_manifest,
    shard_name,
    write_manifest,
)
from tvr.data_prep.dataset.shard_writer import ShardWriter, TarSample, tar_bytes
from tvr.data_prep.reading.loader import evaluation_batches, train_batches
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.records import Batch, Replacement, TooManyBadSamples

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_SAMPLES, GLOBAL_BATCH = 20, 4
STEPS = NUM_SAMPLES // GLOBAL_BATCH  # of one epoch
KEYS = [f"c{row:02d}" for row in range(NUM_SAMPLES)]
SETTINGS: dict[str, Any] = {"num_frames": 4, "image_size": 16, "tokenize": tokenize}


def write_data(folder: Path, members: dict[str, bytes | None], samples_per_shard: int = 5) -> str:
    """A data set of MP4s; `members` replaces those of some keys, None leaves them out. Unlike
    `pack_shards` this refuses nothing."""
    folder.mkdir()
    url = str(folder)
    shards, parts = [], []
    for first in range(0, NUM_SAMPLES, samples_per_shard):
        name = shard_name(first // samples_per_shard, 0)
        writer = ShardWriter(url_to_fs(url)[0], f"{url}/{name}")
        for row, key in list(enumerate(KEYS))[first : first + samples_per_shard]:
            video = members.get(key, numbered_video(4, first=8 * row % 256, bframes=0))
            text = f'{{"captions":["clip {row}"],"video_id":"{key}","frame_times_s":[]}}'
            files = {"json": text.encode()} | ({} if video is None else {"mp4": video})
            stored = tar_bytes(key, files)
            sample = TarSample(key=key, video_id=key, stored=stored, num_captions=1, content=row)
            writer.append(sample)
        shard, samples = writer.finish(name)
        shards.append(shard)
        parts.append(samples)
    manifest = Manifest(
        layout="video",
        num_frames=0,
        short_side=None,
        num_captions=NUM_SAMPLES,
        num_empty_captions=0,
        bad={},
        shards=tuple(shards),
        samples=concat_samples(parts),
    )
    write_manifest(url, manifest)
    return url


def overwrite(folder: Path, key: str, at: int, content: bytes) -> None:
    """Replaces bytes of one sample, counted from its first."""
    manifest = read_manifest(str(folder))
    row = KEYS.index(key)
    with (folder / manifest.shards[int(manifest.samples.shard[row])].name).open("r+b") as file:
        file.seek(int(manifest.samples.offset[row]) + at)
        file.write(content)


def flip_a_byte(folder: Path) -> None:
    manifest = read_manifest(str(folder))
    shard = (folder / "shard-000001.tar").read_bytes()
    at = 1600  # in the MP4, after two headers and the JSON
    overwrite(folder, "c07", at, bytes([shard[int(manifest.samples.offset[7]) + at] ^ 1]))


def cut_inside_c07(folder: Path) -> None:
    shard = folder / "shard-000001.tar"
    end = int(read_manifest(str(folder)).samples.offset[7]) + 1000
    shard.write_bytes(shard.read_bytes()[:end])


@dataclass(frozen=True)
class Fault:
    """A damage and what the stream should say of it."""

    bad: dict[str, str]
    """Reason by key."""
    members: dict[str, bytes | None] = field(default_factory=dict)
    harm: Callable[[Path], object] = lambda folder: None


SHARD_1 = KEYS[5:10]
FAULTS = {
    "truncated tar": Fault(dict.fromkeys(KEYS[7:10], "checksum"), harm=cut_inside_c07),
    "corrupt header in mid-tar": Fault(
        {"c07": "checksum"}, harm=lambda folder: overwrite(folder, "c07", 0, b"\xff" * 512)
    ),
    "flipped byte": Fault({"c07": "checksum"}, harm=flip_a_byte),
    "missing member": Fault({"c07": "missing_member"}, {"c07": None}),
    "unreadable mp4": Fault({"c07": "unreadable"}, {"c07": b"no video" * 100}),
    "audio-only mp4": Fault({"c07": "no_frames"}, {"c07": sound_only()}),
    "one-frame mp4": Fault({}, {"c07": numbered_video(1, first=99)}),
    "zero-byte shard": Fault(
        dict.fromkeys(SHARD_1, "checksum"),
        harm=lambda folder: (folder / "shard-000001.tar").write_bytes(b""),
    ),
    "missing shard": Fault(
        dict.fromkeys(SHARD_1, "missing_shard"),
        harm=lambda folder: (folder / "shard-000001.tar").unlink(),
    ),
}


@pytest.fixture(params=FAULTS, ids=lambda name: name.replace(" ", "-"))
def faulty(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """URL of a damaged data set and the reasons by key."""
    fault = FAULTS[request.param]
    url = write_data(tmp_path / "data", fault.members)
    fault.harm(tmp_path / "data")
    return url, fault.bad


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    """A data set behind HTTP whose every third request is answered by 503."""
    monkeypatch.setattr("tvr.data_prep.storage.storage.FIRST_WAIT_S", 0)
    write_data(tmp_path / "data", {})
    with serve_folder(tmp_path) as store:
        store.fails = lambda number: number % 3 == 0
        yield store


Row = tuple[int, str, str, int]


def streamed(
    url: str, *, world_size: int, workers: int, steps: int = STEPS, **changes: Any
) -> tuple[list[Row], list[Replacement]]:
    """(position, key, caption, sum of the frames) of some steps of all ranks, and what was
    replaced, in the order of positions."""
    settings: dict[str, Any] = {"seed": 3, "start_step": 0, "max_bad": 10, **SETTINGS, **changes}
    batches: list[Batch] = []
    for rank in range(world_size):
        stream = train_batches(
            url,
            global_batch=GLOBAL_BATCH,
            micro_batch=GLOBAL_BATCH // world_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
            **settings,
        )
        batches += islice(stream, steps)
    rows = [
        (position, key, caption, int(frames.sum()))
        for batch in batches
        for position, key, caption, frames in zip(
            batch.positions.tolist(), batch.keys, batch.captions, batch.frames, strict=True
        )
    ]
    replaced = [entry for batch in batches for entry in batch.replaced]
    return sorted(rows), sorted(replaced, key=lambda entry: entry.position)


def check_one_epoch(rows: list[Row], replaced: list[Replacement], bad: dict[str, str]) -> None:
    """Every readable sample once where it was planned, every bad one named and replaced."""
    assert [position for position, *_ in rows] == list(range(NUM_SAMPLES))
    assert {entry.key: entry.reason for entry in replaced} == bad
    positions = {entry.position for entry in replaced}
    assert len(positions) == len(bad)
    as_planned = [key for position, key, *_ in rows if position not in positions]
    assert sorted(as_planned) == [key for key in KEYS if key not in bad]
    assert not {key for _, key, *_ in rows} & set(bad)


def test_each_fault_costs_what_it_damaged_and_nothing_else(
    faulty: tuple[str, dict[str, str]],
) -> None:
    url, bad = faulty
    rows, replaced = streamed(url, world_size=1, workers=0)
    check_one_epoch(rows, replaced, bad)
    for world_size, workers in ((1, 2), (2, 0), (2, 2)):
        assert streamed(url, world_size=world_size, workers=workers) == (rows, replaced)
        tail = streamed(url, world_size=world_size, workers=workers, start_step=2, steps=3)
        first = 2 * GLOBAL_BATCH
        assert tail == (rows[first:], [entry for entry in replaced if entry.position >= first])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_budget_of_each_fault_is_exact(
    faulty: tuple[str, dict[str, str]], workers: int
) -> None:
    url, bad = faulty
    streamed(url, world_size=1, workers=workers, max_bad=len(bad))
    if not bad:
        return
    (reason,) = set(bad.values())
    message = rf"{len(bad)} bad samples .* max_bad={len(bad) - 1} allowed \({len(bad)} {reason}\)"
    with pytest.raises(TooManyBadSamples, match=message):
        streamed(url, world_size=1, workers=workers, max_bad=len(bad) - 1)


def test_evaluation_leaves_out_what_is_damaged(faulty: tuple[str, dict[str, str]]) -> None:
    url, bad = faulty
    for workers in (0, 2):
        batches = [
            batch
            for rank in range(2)
            for batch in evaluation_batches(
                url,
                micro_batch=3,
                rank=rank,
                world_size=2,
                workers=workers,
                max_bad=len(bad),
                **SETTINGS,
            )
        ]
        keys = [key for batch in batches for key in batch.keys]
        assert keys == [key for key in KEYS if key not in bad]
        assert {e.key: e.reason for batch in batches for e in batch.replaced} == bad


def test_the_same_faults_behind_http_with_shards_kept(
    faulty: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    url, _ = faulty
    rows, replaced = streamed(url, world_size=1, workers=0)
    named = [(entry.position, entry.key, entry.reason) for entry in replaced]
    with serve_folder(tmp_path) as store:
        for workers in (0, 2):
            folder = CacheFolder(path=str(tmp_path / f"cache{workers}"), max_bytes=1 << 30)
            again, others = streamed(
                f"{store.url}/data", world_size=2, workers=workers, shard_cache=folder
            )
            assert again == rows
            assert [(entry.position, entry.key, entry.reason) for entry in others] == named


def test_a_single_frame_is_a_sample(tmp_path: Path) -> None:
    url = write_data(tmp_path / "data", FAULTS["one-frame mp4"].members)
    (batch,) = evaluation_batches(
        url, micro_batch=NUM_SAMPLES, rank=0, world_size=1, workers=0, max_bad=0, **SETTINGS
    )
    assert batch.frame_mask.tolist()[7] == [1, 0, 0, 0]
    assert batch.frame_mask.tolist()[8] == [1, 1, 1, 1]


# It leaves the file open, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_loses_what_follows_a_corrupt_header(tmp_path: Path) -> None:
    """The reason for reading by byte range: in one shard of 20 it loses 15 without a word."""
    url = write_data(tmp_path / "data", {}, samples_per_shard=NUM_SAMPLES)
    shard = tmp_path / "data" / "shard-000000.tar"
    overwrite(tmp_path / "data", "c05", 0, b"\xff" * 512)
    plain = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert [sample["__key__"] for sample in plain] == KEYS[:5]
    rows, replaced = streamed(url, world_size=1, workers=0)
    check_one_epoch(rows, replaced, {"c05": "checksum"})


def test_a_store_that_fails_every_third_read_costs_nothing(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{store.url}/data"
    rows, replaced = streamed(url, world_size=1, workers=0, max_bad=0)
    check_one_epoch(rows, replaced, {})
    assert rows == streamed(str(store.folder / "data"), world_size=1, workers=0)[0]
    # Two clients share the server's count, so that each may meet a 503 at every attempt.
    monkeypatch.setattr("tvr.data_prep.storage.storage.ATTEMPTS", 50)
    for world_size, workers in ((1, 2), (2, 0), (2, 2)):
        again = streamed(url, world_size=world_size, workers=workers, max_bad=0)
        assert again == (rows, replaced)
        tail = streamed(
            url, world_size=world_size, workers=workers, max_bad=0, start_step=2, steps=3
        )
        assert tail == (rows[2 * GLOBAL_BATCH :], [])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_never_asked_again_costs_samples(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    url = f"{store.url}/data"
    store.fails = lambda number: number > 2 and number % 3 == 0  # the manifest comes
    monkeypatch.setattr("tvr.data_prep.storage.storage.ATTEMPTS", 1)
    rows, replaced = streamed(url, world_size=1, workers=workers, max_bad=NUM_SAMPLES)
    assert [position for position, *_ in rows] == list(range(NUM_SAMPLES))
    assert Counter(entry.reason for entry in replaced) == {"read_error": len(replaced)}
    assert len(replaced) >= NUM_SAMPLES // 3
    assert all("503" in entry.detail for entry in replaced)
    store.requests.clear()
    with pytest.raises(TooManyBadSamples, match=r"max_bad=3 allowed \(4 read_error\)"):
        streamed(url, world_size=1, workers=workers, max_bad=3, steps=50)
    store.requests.clear()
    store.fails = lambda number: number > 4
    with pytest.raises(TooManyBadSamples, match=r"max_bad_in_a_row=6 allowed \(\d read_error\)"):
        streamed(url, world_size=1, workers=workers, max_bad=NUM_SAMPLES, max_bad_in_a_row=6)


def test_a_truncated_shard_behind_http_is_a_checksum(store: HttpStorage) -> None:
    cut_inside_c07(store.folder / "data")
    rows, replaced = streamed(f"{store.url}/data", world_size=1, workers=0)
    check_one_epoch(rows, replaced, dict.fromkeys(KEYS[7:10], "checksum"))
    assert np.all(["the file is truncated" in entry.detail for entry in replaced])
