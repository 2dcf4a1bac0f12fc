"""The shard cache of a node: one download per shard, verified, bounded, and robust to kills."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.batches import evaluation, rows_of, training
from builders.clip_files import make_dataset
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep.dataset.manifest import Manifest, read_manifest
from tvr.data_prep.reading.locality import NOTHING_NEEDED, PREFETCHED_SHARDS, CacheNeed
from tvr.data_prep.reading.node_cache import CacheFolder, ShardCache
from tvr.data_prep.reading.prefetch import THREAD_NAME
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.reading.worker import EvaluationDataset
from tvr.data_prep.records import Batch
from tvr.data_prep.storage.storage import Storage
from tvr.trainer.config import DataConfig, TrainConfig
from tvr.trainer.data import validate_data_sets
from tvr.trainer.distributed.world import World

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_SAMPLES = 12


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    """A data set of 6 shards with 2 samples each, served over HTTP."""
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    make_dataset(tmp_path, NUM_SAMPLES, samples_per_shard=2)
    with serve_folder(tmp_path) as store:
        yield store


def opened(
    store: HttpStorage, folder: Path, max_bytes: int = 1 << 30
) -> tuple[ShardCache, Manifest]:
    url = f"{store.url}/data"
    manifest = read_manifest(url)
    limit = CacheFolder(path=str(folder), max_bytes=max_bytes)
    return ShardCache(limit, Storage(url), manifest.shards), manifest


def requested_shards(store: HttpStorage) -> Counter[str]:
    return Counter(name.removeprefix("data/") for name in store.requests if name.endswith(".tar"))


def cached(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def train(url: str, steps: int, workers: int = 0, **changes: Any) -> list[Batch]:
    """The first batches of a stream, which is closed afterwards."""
    settings: dict[str, Any] = {"seed": 1, "global_batch": 4, "micro_batch": 4, "workers": workers}
    return list(islice(training(url, **(settings | changes)), steps))


def join_prefetch_thread() -> None:
    for thread in prefetch_threads():
        thread.join()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_is_fetched_once_and_batches_are_the_same(
    store: HttpStorage, tmp_path: Path, workers: int
) -> None:
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    plain = rows_of(train(str(tmp_path / "data"), 6))
    url = f"{store.url}/data"
    batches = train(url, 6, workers, shard_cache=folder)
    assert rows_of(batches) == plain
    reads = Counter[str]()
    for batch in batches:
        reads.update(batch.reads)
    assert reads.total() == 6 * 4
    assert 0 < reads["shard_cache"] == reads.total() - reads["fetched"]
    for rank in range(2):
        batches = evaluation(url, rank=rank, world_size=2, workers=workers, shard_cache=folder)
        assert sum(len(batch.keys) for batch in batches) == NUM_SAMPLES // 2
    names = [shard.name for shard in read_manifest(url).shards]
    assert requested_shards(store) == dict.fromkeys(names, 1)
    assert list((tmp_path / "cache").glob("*.partial")) == []


def fetch_all(url: str, folder: CacheFolder) -> None:
    manifest = read_manifest(url)
    cache = ShardCache(folder, Storage(url), manifest.shards)
    for shard in range(len(manifest.shards)):
        assert cache.fetch(shard)


def test_processes_share_downloaded_shards(store: HttpStorage, tmp_path: Path) -> None:
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=fetch_all, args=(f"{store.url}/data", folder)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert set(requested_shards(store).values()) == {1}
    assert len(requested_shards(store)) == 6


def test_the_limit_holds_and_the_least_recently_used_shard_is_evicted(
    store: HttpStorage, tmp_path: Path
) -> None:
    sizes = [shard.shard_bytes for shard in read_manifest(str(tmp_path / "data")).shards]
    max_bytes = 3 * max(sizes)
    folder = tmp_path / "cache"
    cache, manifest = opened(store, folder, max_bytes)
    name = [f"{shard.sha256}.tar" for shard in manifest.shards]
    for shard in (0, 1, 2):
        assert cache.fetch(shard)
        os.utime(folder / name[shard], (shard, shard))
    assert cache.read(0, 0, 512)  # shard 1 is now the least recently used
    assert cache.fetch(3)
    assert cached(folder) == {name[0], name[2], name[3]}
    for shard in (4, 5, 0, 1, 2, 3):
        assert cache.read(shard, 0, 512)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= max_bytes


def test_a_damaged_shard_is_not_cached_but_its_samples_are_read(
    store: HttpStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = f"{store.url}/data", tmp_path / "cache"
    manifest = read_manifest(url)
    damaged = tmp_path / "data" / "shard-000002.tar"
    content = bytearray(damaged.read_bytes())
    content[int(manifest.samples.offset[5]) + 700] ^= 1  # in c05; c04 is intact
    damaged.write_bytes(content)
    limit = CacheFolder(path=str(folder), max_bytes=1 << 30)
    logger = "tvr.data_prep.reading.node_cache"
    with caplog.at_level(logging.WARNING, logger=logger):
        batches = train(url, 3, shard_cache=limit, max_bad=1)
        train(url, 3, shard_cache=limit, max_bad=1)
    assert {(e.key, e.reason) for batch in batches for e in batch.replaced} == {("c05", "checksum")}
    assert "c04" in {key for batch in batches for key in batch.keys}
    assert f"{manifest.shards[2].sha256}.tar" not in cached(folder)
    assert len(cached(folder)) == 5
    (message,) = [each.getMessage() for each in caplog.records if each.name == logger]
    assert (
        "data/shard-000002.tar: the downloaded shard's sha256 differs from the manifest's"
        in message
    )


def test_a_damaged_copy_is_replaced_from_the_store(store: HttpStorage, tmp_path: Path) -> None:
    url, folder = f"{store.url}/data", tmp_path / "cache"
    limit = CacheFolder(path=str(folder), max_bytes=1 << 30)
    plain = rows_of(train(url, 3, shard_cache=limit))
    for path in folder.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert rows_of(train(url, 3, shard_cache=limit)) == plain
    for path in folder.glob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def die_while_fetching(url: str, folder: CacheFolder) -> None:
    manifest = read_manifest(url)
    cache = ShardCache(folder, Storage(url), manifest.shards)
    cache.fetch(0, stopped=lambda: os.kill(os.getpid(), signal.SIGKILL) is None)


def test_a_killed_process_blocks_no_other(store: HttpStorage, tmp_path: Path) -> None:
    url, folder = f"{store.url}/data", tmp_path / "cache"
    limit = CacheFolder(path=str(folder), max_bytes=1 << 30)
    process = multiprocessing.get_context("fork").Process(
        target=die_while_fetching, args=(url, limit)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(folder.glob("*.partial"))) == 1
    cache, _ = opened(store, folder)
    assert cache.fetch(1)  # reserving space for another shard deletes the stale file
    assert list(folder.glob("*.partial")) == []
    assert cache.fetch(0)


def test_prefetch_does_not_wait_for_a_download_of_another_process(
    store: HttpStorage, tmp_path: Path
) -> None:
    cache, _ = opened(store, tmp_path / "cache")
    results: list[bool] = []

    def fetch_meanwhile() -> bool:
        results.append(opened(store, tmp_path / "cache")[0].fetch(0, wait=False))
        return False

    assert cache.fetch(0, stopped=fetch_meanwhile)
    assert results == [False]
    assert cache.fetch(0, wait=False)


def test_on_a_full_disk_samples_are_read_from_the_store(
    store: HttpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: bytes, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvr.data_prep.reading.node_cache.os.pwrite", full)
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    batches = train(f"{store.url}/data", 3, shard_cache=folder)
    assert sum(len(batch.keys) for batch in batches) == NUM_SAMPLES
    assert cached(tmp_path / "cache") == set()


def test_the_next_window_is_prefetched(
    store: HttpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr.data_prep.reading.order.MIN_WINDOW_SHARDS", 2)
    url, folder = f"{store.url}/data", tmp_path / "cache"
    limit = CacheFolder(path=str(folder), max_bytes=1 << 30)
    (batch,) = train(url, 1, shard_cache=limit)  # closing the stream ends the thread
    assert prefetch_threads() == []
    stream = training(url, seed=1, global_batch=4, micro_batch=4, shard_cache=limit)
    assert next(stream).keys == batch.keys
    join_prefetch_thread()
    assert len(cached(folder)) == 4  # the window of the first batch and the next one
    before = requested_shards(store)
    next(stream)
    join_prefetch_thread()
    assert len(cached(folder)) == 6
    assert set((requested_shards(store) - before).values()) == {1}


def test_evaluation_prefetches_the_following_shards(store: HttpStorage, tmp_path: Path) -> None:
    url, limit = f"{store.url}/data", CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    reader = SampleReader(url, num_frames=4, image_size=16, shard_cache=limit)
    shards = reader.manifest.samples.shard.tolist()
    end = shards.index(5)  # a rank that reads all shards but the last
    assert reader.reserve_cache(NOTHING_NEEDED)
    dataset = EvaluationDataset(reader, end, range(1), 1)
    num_cached = []
    for row in range(end):
        assert dataset.draw(row).sample is not None
        join_prefetch_thread()
        num_cached.append(len(cached(tmp_path / "cache")))
    assert num_cached == [min(shards[row] + 1 + PREFETCHED_SHARDS, 5) for row in range(end)]


def test_prefetch_stops_with_the_reader(
    store: HttpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    fetched: list[int] = []

    def until_stopped(self: ShardCache, shard: int, **settings: Any) -> bool:
        fetched.append(shard)
        started.set()
        while not settings["stopped"]():
            time.sleep(0.001)
        return False

    monkeypatch.setattr(ShardCache, "fetch", until_stopped)
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    reader = SampleReader(f"{store.url}/data", num_frames=4, image_size=16, shard_cache=folder)
    reader.reserve_cache(NOTHING_NEEDED)
    reader.use_shards([], [3, 1])
    reader.use_shards([], [4])
    started.wait()
    del reader
    assert prefetch_threads() == []
    assert fetched == [3]


def test_a_local_data_set_is_not_cached(store: HttpStorage, tmp_path: Path) -> None:
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1)
    assert len(train(str(tmp_path / "data"), 3, shard_cache=folder)) == 3
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("max_gib", [0, 2, 3])
def test_a_cache_that_is_too_small_is_refused_with_the_size_needed(
    store: HttpStorage, tmp_path: Path, max_gib: int
) -> None:
    folder = CacheFolder(path=str(tmp_path), max_bytes=max_gib << 30, others=CacheNeed(1 << 30, 0))
    need = CacheNeed(1 << 30, 5 << 29)
    if max_gib:
        assert folder.check(need) == (max_gib == 3)
    else:
        with pytest.raises(
            ValueError,
            match=r"of 0 bytes must hold at least 2147483648 bytes.*\(2684354560 with those that"
            r" are downloaded ahead\); raise the limit \(data.shard_cache_gib\) to 2 or better 3",
        ):
            folder.check(need)


def test_training_refuses_a_cache_below_its_windows(store: HttpStorage, tmp_path: Path) -> None:
    sizes = [shard.shard_bytes for shard in read_manifest(str(tmp_path / "data")).shards]
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=sum(sizes) - 1)
    with pytest.raises(ValueError, match=rf"must hold at least {sum(sizes)} bytes"):
        train(f"{store.url}/data", 1, shard_cache=folder)
    enough = CacheFolder(path=str(tmp_path / "cache"), max_bytes=sum(sizes))
    assert train(f"{store.url}/data", 1, shard_cache=enough)


def test_a_run_refuses_a_cache_without_room_for_all_its_sets(
    store: HttpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and test sets share the folder; each alone would fit."""
    url = f"{store.url}/data"
    sizes = [shard.shard_bytes for shard in read_manifest(url).shards]
    data = DataConfig(train=url, test=url, workers=2, shard_cache=str(tmp_path / "cache"))
    settings = TrainConfig(steps=1, global_batch=4, micro_batch=4)
    cpu = World(rank=0, world_size=1, device=torch.device("cpu"))

    def limit_to(max_bytes: int) -> None:
        folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=max_bytes)
        monkeypatch.setattr("tvr.trainer.data._shard_cache", lambda data: folder)

    limit_to(2 * sum(sizes) - 1)
    with pytest.raises(ValueError, match=rf"hold at least {2 * sum(sizes)} bytes.*shard_cache_gib"):
        validate_data_sets(data, settings, cpu)
    limit_to(2 * sum(sizes))
    assert validate_data_sets(data, settings, cpu).num_samples == {"": NUM_SAMPLES}


def test_only_owned_shards_are_downloaded_whole(store: HttpStorage, tmp_path: Path) -> None:
    """Two nodes of one rank: each downloads its half, and reads the rest by ranges or from the
    cache if it happens to be there."""
    url = f"{store.url}/data"
    plain = rows_of(train(str(tmp_path / "data"), 6))
    found, reads, downloaded = [], Counter[str](), []
    for rank in range(2):
        folder = CacheFolder(path=str(tmp_path / f"cache{rank}"), max_bytes=1 << 30)
        batches = train(
            url,
            6,
            rank=rank,
            world_size=2,
            micro_batch=2,
            node=range(rank, rank + 1),
            shard_cache=folder,
        )
        found += rows_of(batches)
        for batch in batches:
            reads.update(batch.reads)
        downloaded.append(cached(tmp_path / f"cache{rank}"))
    assert sorted(found) == plain
    assert all(downloaded)
    assert reads["store"] > 0
    # One request for each download, and one for each other sample that no download had brought.
    downloads = sum(len(names) for names in downloaded)
    assert requested_shards(store).total() == downloads + reads["store"]
    # A shard that a rank does not own is read from its cache if it is there.
    whole = CacheFolder(path=str(tmp_path / "whole"), max_bytes=1 << 30)
    fetch_all(url, whole)
    before = len(store.requests)
    batches = train(url, 6, rank=0, world_size=2, micro_batch=2, node=range(1), shard_cache=whole)
    assert {source for batch in batches for source in batch.reads} == {"shard_cache"}
    assert not [name for name in store.requests[before:] if name.endswith(".tar")]


def test_evaluation_downloads_a_border_shard_once(store: HttpStorage, tmp_path: Path) -> None:
    """12 rows on 8 nodes: a node reads 1.5 of the 2 rows of a shard, and of others one."""
    url, keys, owners = f"{store.url}/data", [], Counter[str]()
    for rank in range(8):
        folder = CacheFolder(path=str(tmp_path / f"cache{rank}"), max_bytes=1 << 30)
        batches = evaluation(
            url, rank=rank, world_size=8, node=range(rank, rank + 1), shard_cache=folder
        )
        keys += [key for batch in batches for key in batch.keys]
        owners.update(cached(tmp_path / f"cache{rank}"))
    assert keys == [f"c{row:02d}" for row in range(NUM_SAMPLES)]
    assert set(owners.values()) == {1}
