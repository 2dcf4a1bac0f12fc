"""Packing to an object store: few requests, no renames, retried faults, late listings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import file_contents, write_clips
from builders.s3_server import (
    BUCKET,
    FaultProxy,
    S3Server,
    every,
    fault_proxy,
    serve_s3,
    throttled,
    unavailable,
)

from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.storage import retries

FRAMES: dict[str, Any] = {"layout": "frames", "num_frames": 2, "samples_per_shard": 1}
# Reads of the plan, of `manifest.json` and of the index; listings; and, of each shard, a PUT of the
# file, a PUT of the record, and a read of the plan. It was 94 with copies and renames.
MAX_REQUESTS = 40


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3() as running:
        yield running


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    server.clear()
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    with fault_proxy(server) as running, running.environment(monkeypatch):
        yield running


def stored(server: S3Server, prefix: str) -> dict[str, bytes]:
    """Returns the objects below a prefix by relative name."""
    return {key.removeprefix(prefix): server.read(key) for key in server.keys(prefix)}


def test_three_shards_take_few_requests_and_no_copy(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    clips = write_clips(tmp_path, 3)
    pack_shards(clips, str(tmp_path / "local"), **FRAMES)
    proxy.reset()
    manifest = pack_shards(clips, f"s3://{BUCKET}/data", **FRAMES)
    requests = list(proxy.requests)
    assert manifest is not None
    assert stored(server, "data/") == file_contents(tmp_path / "local")
    kinds = Counter(request.method for request in requests)
    print(f"{len(requests)} requests: {dict(kinds)}")
    assert len(requests) <= MAX_REQUESTS
    # Every object is written once, under its final name.
    puts = Counter(request.path for request in requests if request.method == "PUT")
    assert set(puts.values()) == {1}
    assert {path.rsplit("/", 1)[-1] for path in puts if ".packing" not in path} == set(
        file_contents(tmp_path / "local")
    )
    assert not [request for request in requests if "uploads" in request.query]
    # The manifest is written after all else.
    written = [request.path for request in requests if request.method == "PUT"]
    assert written[-1] == f"/{BUCKET}/data/manifest.json"


def test_faults_are_retried_and_change_no_byte(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    clips = write_clips(tmp_path, 5)
    Path(clips[3].video).write_bytes(b"garbage")
    share: dict[str, Any] = {"max_bad": 1, **FRAMES | {"samples_per_shard": 2}}
    pack_shards(clips, str(tmp_path / "local"), **share)
    proxy.fail = every(3, unavailable(), throttled())
    url = f"s3://{BUCKET}/data"
    assert pack_shards(clips, url, task=1, num_tasks=2, **share) is None
    assert pack_shards(clips, url, task=0, num_tasks=2, **share) is not None
    assert proxy.num_faults > 5
    proxy.fail = lambda request: None
    assert stored(server, "data/") == file_contents(tmp_path / "local")
    assert verify_dataset(url).problems == ()


def test_late_listings_lose_nothing(server: S3Server, proxy: FaultProxy, tmp_path: Path) -> None:
    """A task whose listings show nothing new knows its own shards, and deletes nothing."""
    clips = write_clips(tmp_path, 4)
    url = f"s3://{BUCKET}/data"
    pack_shards(clips, str(tmp_path / "local"), **FRAMES)
    with proxy.stale_listings():
        for task in (0, 1):
            pack_shards(clips, url, task=task, num_tasks=2, **FRAMES)
    assert {name for name in stored(server, "data/") if name.endswith(".tar")} == {
        f"shard-{number:06d}.tar" for number in range(4)
    }
    assert pack_shards(clips, url, **FRAMES) is not None  # the last call of an array
    assert stored(server, "data/") == file_contents(tmp_path / "local")


def test_a_data_set_on_a_store_is_replaced(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    clips = write_clips(tmp_path, 3)
    url = f"s3://{BUCKET}/data"
    pack_shards(clips, url, **FRAMES)
    pack_shards(clips[:2], url, overwrite=True, **FRAMES)
    assert sorted(stored(server, "data/")) == [
        *("bad.jsonl", "manifest.json", "samples-1.rows"),
        *("shard-1-000000.tar", "shard-1-000001.tar"),
    ]
    assert verify_dataset(url).problems == ()
