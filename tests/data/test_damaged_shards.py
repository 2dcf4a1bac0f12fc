"""Every kind of damage on real files: each readable sample is read once and each bad one reported,
for any number of ranks and workers and after any restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from builders.batches import Row, damage_sample, evaluation, rows_of, training
from builders.clip_files import numbered_video, sound_only
from builders.exhaustive import further, principal_and_further
from builders.http_store import HttpStorage, serve_folder
from builders.raw_shards import write_raw_shards

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.shard_writer import TarSample, tar_bytes
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.records import Batch, Replacement, TooManyBadSamples

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_SAMPLES, GLOBAL_BATCH = 20, 4
STEPS = NUM_SAMPLES // GLOBAL_BATCH  # of one epoch
KEYS = [f"c{row:02d}" for row in range(NUM_SAMPLES)]


@cache
def numbered_clip(row: int) -> bytes:
    return numbered_video(4, first=8 * row % 256, bframes=0)


def write_data(folder: Path, videos: dict[str, bytes | None], samples_per_shard: int = 5) -> str:
    """Writes a data set of MP4s; `videos` replaces the video of some keys, or omits it (None)."""
    samples = []
    for row, key in enumerate(KEYS):
        video = videos[key] if key in videos else numbered_clip(row)
        text = f'{{"captions":["clip {row}"],"video_id":"{key}","frame_times_s":[]}}'
        files = {"json": text.encode()} | ({} if video is None else {"mp4": video})
        stored = tar_bytes(key, files)
        samples.append(TarSample(key=key, video_id=key, stored=stored, num_captions=1, content=row))
    starts = range(0, NUM_SAMPLES, samples_per_shard)
    shards = [samples[start : start + samples_per_shard] for start in starts]
    return write_raw_shards(folder, shards, layout="video", num_frames=0)


def overwrite(folder: Path, key: str, at: int, content: bytes) -> None:
    """Overwrites bytes of one sample; `at` counts from its first byte."""
    manifest = read_manifest(str(folder))
    row = KEYS.index(key)
    with (folder / manifest.shards[int(manifest.samples.shard[row])].name).open("r+b") as file:
        file.seek(int(manifest.samples.offset[row]) + at)
        file.write(content)


def flip_bit_in_mp4(folder: Path) -> None:
    damage_sample(folder, KEYS.index("c07"), 1600)  # after two tar headers and the JSON


def cut_inside_c07(folder: Path) -> None:
    shard = folder / "shard-000001.tar"
    end = int(read_manifest(str(folder)).samples.offset[7]) + 1000
    shard.write_bytes(shard.read_bytes()[:end])


@dataclass(frozen=True)
class Fault:
    """Damage to a data set, and the bad samples that it causes."""

    bad: dict[str, str]
    """Reason by key."""
    videos: dict[str, bytes | None] = field(default_factory=dict)
    """Replaced videos by key; None = the sample has no video."""
    damage: Callable[[Path], object] = lambda folder: None


SHARD_1 = KEYS[5:10]
FAULTS = {
    "truncated tar": Fault(dict.fromkeys(KEYS[7:10], "checksum"), damage=cut_inside_c07),
    "corrupt header in mid-tar": Fault(
        {"c07": "checksum"}, damage=lambda folder: overwrite(folder, "c07", 0, b"\xff" * 512)
    ),
    "flipped bit": Fault({"c07": "checksum"}, damage=flip_bit_in_mp4),
    "missing member": Fault({"c07": "missing_member"}, {"c07": None}),
    "unreadable mp4": Fault({"c07": "unreadable"}, {"c07": b"no video" * 100}),
    "audio-only mp4": Fault({"c07": "no_frames"}, {"c07": sound_only()}),
    "one-frame mp4": Fault({}, {"c07": numbered_video(1, first=99)}),
    "zero-byte shard": Fault(
        dict.fromkeys(SHARD_1, "checksum"),
        damage=lambda folder: (folder / "shard-000001.tar").write_bytes(b""),
    ),
    "missing shard": Fault(
        dict.fromkeys(SHARD_1, "missing_shard"),
        damage=lambda folder: (folder / "shard-000001.tar").unlink(),
    ),
}


@pytest.fixture(
    scope="module",
    params=principal_and_further(
        FAULTS, ["corrupt header in mid-tar", "unreadable mp4", "missing shard"]
    ),
    ids=lambda name: name.replace(" ", "-"),
)
def faulty(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """URL of a damaged data set and the reasons by key."""
    fault = FAULTS[request.param]
    folder = tmp_path_factory.mktemp("faulty") / "data"
    url = write_data(folder, fault.videos)
    fault.damage(folder)
    return url, fault.bad


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    """A data set behind an HTTP server that fails every third request with status 503."""
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    write_data(tmp_path / "data", {})
    with serve_folder(tmp_path) as store:
        store.fails = lambda number: number % 3 == 0
        yield store


def streamed(
    url: str, *, world_size: int, workers: int, steps: int = STEPS, **changes: Any
) -> tuple[list[Row], list[Replacement]]:
    """The rows of some steps of all ranks and the replacements, in the order of positions."""
    settings = {"seed": 3, "max_bad": 10, **changes}
    batches: list[Batch] = []
    for rank in range(world_size):
        stream = training(
            url,
            global_batch=GLOBAL_BATCH,
            micro_batch=GLOBAL_BATCH // world_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
            **settings,
        )
        batches += islice(stream, steps)
    replaced = [entry for batch in batches for entry in batch.replaced]
    return sorted(rows_of(batches)), sorted(replaced, key=lambda entry: entry.position)


def check_one_epoch(rows: list[Row], replaced: list[Replacement], bad: dict[str, str]) -> None:
    """Checks that each readable sample is read once and each bad sample reported and replaced."""
    assert [position for position, *_ in rows] == list(range(NUM_SAMPLES))
    assert {entry.key: entry.reason for entry in replaced} == bad
    positions = {entry.position for entry in replaced}
    assert len(positions) == len(bad)
    as_planned = [key for position, key, *_ in rows if position not in positions]
    assert sorted(as_planned) == [key for key in KEYS if key not in bad]
    assert not {key for _, key, *_ in rows} & set(bad)


def test_each_fault_costs_only_the_damaged_samples(
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


@pytest.mark.parametrize("workers", [2, *further(0)])
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


def test_evaluation_leaves_out_damaged_samples(faulty: tuple[str, dict[str, str]]) -> None:
    url, bad = faulty
    for workers in (0, 2):
        batches = [
            batch
            for rank in range(2)
            for batch in evaluation(
                url, micro_batch=3, rank=rank, world_size=2, workers=workers, max_bad=len(bad)
            )
        ]
        keys = [key for batch in batches for key in batch.keys]
        assert keys == [key for key in KEYS if key not in bad]
        assert {e.key: e.reason for batch in batches for e in batch.replaced} == bad


def test_the_same_faults_over_http_with_a_shard_cache(
    faulty: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    url, _ = faulty
    rows, replaced = streamed(url, world_size=1, workers=0)
    expected = [(entry.position, entry.key, entry.reason) for entry in replaced]
    with serve_folder(Path(url).parent) as store:
        for workers in (0, 2):
            folder = CacheFolder(path=str(tmp_path / f"cache{workers}"), max_bytes=1 << 30)
            actual, others = streamed(
                f"{store.url}/data", world_size=2, workers=workers, shard_cache=folder
            )
            assert actual == rows
            assert [(entry.position, entry.key, entry.reason) for entry in others] == expected


def test_a_single_frame_is_a_sample(tmp_path: Path) -> None:
    url = write_data(tmp_path / "data", FAULTS["one-frame mp4"].videos)
    (batch,) = evaluation(url, micro_batch=NUM_SAMPLES)
    assert batch.frame_mask.tolist()[7] == [1, 0, 0, 0]
    assert batch.frame_mask.tolist()[8] == [1, 1, 1, 1]


# webdataset also leaves the file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_loses_the_samples_after_a_corrupt_header(tmp_path: Path) -> None:
    """The reason to read by byte range: webdataset silently loses 15 samples of a shard of 20."""
    url = write_data(tmp_path / "data", {}, samples_per_shard=NUM_SAMPLES)
    shard = tmp_path / "data" / "shard-000000.tar"
    overwrite(tmp_path / "data", "c05", 0, b"\xff" * 512)
    plain = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert [sample["__key__"] for sample in plain] == KEYS[:5]
    rows, replaced = streamed(url, world_size=1, workers=0)
    check_one_epoch(rows, replaced, {"c05": "checksum"})


def test_a_store_that_fails_every_third_read_costs_no_sample(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{store.url}/data"
    rows, replaced = streamed(url, world_size=1, workers=0, max_bad=0)
    check_one_epoch(rows, replaced, {})
    assert rows == streamed(str(store.folder / "data"), world_size=1, workers=0)[0]
    # Two clients share the server's count, so every attempt of one client may fail.
    monkeypatch.setattr("tvr.data_prep.storage.retries.ATTEMPTS", 50)
    for world_size, workers in ((1, 2), (2, 0), (2, 2)):
        again = streamed(url, world_size=world_size, workers=workers, max_bad=0)
        assert again == (rows, replaced)
        tail = streamed(
            url, world_size=world_size, workers=workers, max_bad=0, start_step=2, steps=3
        )
        assert tail == (rows[2 * GLOBAL_BATCH :], [])


@pytest.mark.parametrize("workers", [1, *further(0)])
def test_without_retries_a_failing_store_costs_no_budget(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    url = f"{store.url}/data"
    store.fails = lambda number: number > 2 and number % 3 == 0  # the manifest is read
    monkeypatch.setattr("tvr.data_prep.storage.retries.ATTEMPTS", 1)
    rows, replaced = streamed(url, world_size=1, workers=workers, max_bad=0)
    assert [position for position, *_ in rows] == list(range(NUM_SAMPLES))
    assert Counter(entry.reason for entry in replaced) == {"unavailable": len(replaced)}
    assert len(replaced) >= NUM_SAMPLES // 3
    assert all("503" in entry.detail for entry in replaced)
    store.requests.clear()
    store.fails = lambda number: number > 4
    with pytest.raises(TooManyBadSamples, match=r"3 reads in a row .*max_unavailable_in_a_row=2"):
        streamed(url, world_size=1, workers=workers, max_bad=0, max_unavailable_in_a_row=2)


def test_a_truncated_shard_over_http_is_a_checksum_error(store: HttpStorage) -> None:
    cut_inside_c07(store.folder / "data")
    rows, replaced = streamed(f"{store.url}/data", world_size=1, workers=0)
    check_one_epoch(rows, replaced, dict.fromkeys(KEYS[7:10], "checksum"))
    assert np.all(["the file is truncated" in entry.detail for entry in replaced])
