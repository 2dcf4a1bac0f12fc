"""Pins of the node's shard cache: what a live process reads or will read next is not evicted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from builders.batches import rows_of, training
from builders.clip_files import make_dataset
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep.dataset.manifest import Manifest, read_manifest
from tvr.data_prep.reading.locality import RankShare, training_need
from tvr.data_prep.reading.node_cache import CacheFolder, ShardCache
from tvr.data_prep.reading.order import SampleOrder
from tvr.data_prep.storage.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TIMEOUT_S = 60


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    """Two data sets of 8 shards with 2 samples each, served over HTTP."""
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    for name, quality in (("first", 90), ("second", 80)):
        make_dataset(tmp_path / name, 16, samples_per_shard=2, jpeg_quality=quality)
    with serve_folder(tmp_path) as store:
        yield store


def opened(url: str, folder: Path, max_bytes: int) -> tuple[ShardCache, Manifest]:
    manifest = read_manifest(url)
    limit = CacheFolder(path=str(folder), max_bytes=max_bytes)
    return ShardCache(limit, Storage(url), manifest.shards), manifest


def cached(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def pins(folder: Path) -> list[Path]:
    return list(folder.glob("*.pins"))


def test_pinned_shards_stay_and_the_least_recently_used_others_go(
    store: HttpStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    first, manifest = opened(f"{store.url}/first/data", folder, 1 << 30)
    size = max(shard.shard_bytes for shard in manifest.shards)
    first, _ = opened(f"{store.url}/first/data", folder, 4 * size)
    second, other = opened(f"{store.url}/second/data", folder, 4 * size)
    names = [shard.sha256 for shard in manifest.shards]
    for shard in range(4):
        assert first.fetch(shard)
        os.utime(folder / f"{names[shard]}.tar", (shard, shard))
    first.pin([0, 2])
    assert second.fetch(0)
    assert cached(folder) == {names[0], names[2], names[3], other.shards[0].sha256}
    second.pin([0, 1])
    assert second.fetch(1)
    assert cached(folder) == {names[0], names[2], *(other.shards[n].sha256 for n in (0, 1))}
    # All that is cached is in use: nothing is evicted, and the samples come from the store.
    with caplog.at_level(logging.WARNING):
        assert not second.fetch(2)
        assert second.read(2, 0, 512) is None
    (message,) = caplog.messages
    assert "shards in use, of other runs too, fill all" in message
    assert len(cached(folder)) == 4
    first.pin([2])
    assert second.fetch(2)
    assert names[0] not in cached(folder)
    first.unpin()
    second.unpin()
    assert second.fetch(3)
    assert pins(folder) == []


def pin_and_wait(url: str, folder: Path, max_bytes: int, connection: Connection) -> None:
    cache, _ = opened(url, folder, max_bytes)
    cache.pin([0, 1])
    assert cache.fetch(0)
    connection.send("pinned")
    connection.recv()


def test_the_pins_of_a_killed_process_end_with_it(store: HttpStorage, tmp_path: Path) -> None:
    url, folder = f"{store.url}/first/data", tmp_path / "cache"
    manifest = read_manifest(url)
    max_bytes = max(shard.shard_bytes for shard in manifest.shards)
    cache, _ = opened(url, folder, max_bytes)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=pin_and_wait, args=(url, folder, max_bytes, there))
    process.start()
    assert here.poll(TIMEOUT_S)
    assert here.recv() == "pinned"
    assert not cache.fetch(3)
    assert cached(folder) == {manifest.shards[0].sha256}
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(TIMEOUT_S)
    assert cache.fetch(3)
    assert cached(folder) == {manifest.shards[3].sha256}
    assert pins(folder) == []


def use_as_child(cache: ShardCache, connection: Connection) -> None:
    cache.pin([5])
    cache.unpin()
    connection.send("done")


def test_a_forked_process_does_not_end_its_parents_pins(store: HttpStorage, tmp_path: Path) -> None:
    url, folder = f"{store.url}/first/data", tmp_path / "cache"
    max_bytes = max(shard.shard_bytes for shard in read_manifest(url).shards)
    cache, manifest = opened(url, folder, max_bytes)
    assert cache.fetch(0)
    cache.pin([0])
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=use_as_child, args=(cache, there))
    process.start()
    assert here.poll(TIMEOUT_S)
    process.join(TIMEOUT_S)
    other, _ = opened(url, folder, max_bytes)
    assert not other.fetch(1)
    assert cached(folder) == {manifest.shards[0].sha256}


def test_a_user_file_is_no_list_of_pins(store: HttpStorage, tmp_path: Path) -> None:
    url, folder = f"{store.url}/first/data", tmp_path / "cache"
    cache, _ = opened(url, folder, 1 << 30)
    (folder / "notes.pins").write_text("mine")
    (folder / f"{'0' * 64}.pins").symlink_to(folder / "notes.pins")
    assert cache.fetch(0)
    assert (folder / "notes.pins").read_text() == "mine"


@pytest.mark.parametrize("workers", [0, 3])
def test_two_streams_with_just_the_room_they_need_download_nothing_twice(
    store: HttpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Windows of 2 of the 8 shards, several workers, two data sets in one folder of the least size:
    in an epoch each shard is downloaded once, and no sample needs a request of its own."""
    monkeypatch.setattr("tvr.data_prep.reading.order.MIN_WINDOW_SHARDS", 2)
    share = RankShare(rank=0, world_size=1, micro_batch=1, node=range(1))
    urls = [f"{store.url}/{name}/data" for name in ("first", "second")]
    order = SampleOrder([2] * 8, 3, 2)
    needs = [training_need(read_manifest(url).shards, order, share, workers) for url in urls]
    assert (needs[0].least < needs[0].full) or workers
    path = str(tmp_path / "cache")
    streams = [
        training(
            url,
            seed=3,
            global_batch=1,
            micro_batch=1,
            workers=workers,
            shard_cache=CacheFolder(
                path=path, max_bytes=needs[0].least + needs[1].least, others=needs[1 - number]
            ),
        )
        for number, url in enumerate(urls)
    ]
    reads, found = Counter[str](), [[], []]
    for batches in islice(zip(*streams, strict=True), 16):
        for number, batch in enumerate(batches):
            reads.update(batch.reads)
            found[number].append(batch)
    del streams
    assert reads["store"] == 0
    assert reads.total() == 32
    for name, batches in zip(("first", "second"), found, strict=True):
        plain = training(str(tmp_path / name / "data"), seed=3, global_batch=1, micro_batch=1)
        assert rows_of(batches) == rows_of(list(islice(plain, 16)))
    requested = Counter(name for name in store.requests if name.endswith(".tar"))
    # A worker that reads ahead may begin the second epoch.
    assert len(requested) == 16
    assert requested.total() <= 16 + (8 if workers else 0)
