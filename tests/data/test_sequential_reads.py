"""Sequential reads of shards: order, request sizes, failing stores, and parallel reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from builders.clip_files import make_dataset
from builders.http_store import HttpStorage, serve_folder
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.check.sequential_reads import ReadMeter, SequentialShard, map_shards
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import Shard, read_manifest
from tvr.data_prep.storage.storage import Storage

CONTENT = bytes(range(200))


class RecordingStorage(Storage):
    """A store of one file that records the requested ranges."""

    def __init__(self, content: bytes = CONTENT) -> None:
        super().__init__("/")
        self.content = content
        self.requested: list[tuple[int, int]] = []

    def read_range(self, name: str, start: int, end: int, attempts: int | None = None) -> bytes:
        self.requested.append((start, end))
        return self.content[start:end]


def shard(num_bytes: int = len(CONTENT)) -> Shard:
    return Shard(name="s.tar", num_samples=1, shard_bytes=num_bytes, sha256="")


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), min_size=1, max_size=20),
    st.integers(0, 80),
    st.integers(0, 200),
)
def test_ranges_are_correct_and_each_byte_is_read_once(
    steps: list[tuple[int, int]], ahead: int, num_available: int
) -> None:
    store = RecordingStorage(CONTENT[:num_available])
    read: list[int] = []
    file = SequentialShard(
        store, shard(), ReadMeter(0, lambda done, _: read.append(done)), read_ahead=ahead
    )
    at = 0
    for gap, length in steps:
        at += gap
        assert file.read(at, length) == CONTENT[:num_available][at : at + length]
        at += length
    longest = max(length for _, length in steps)
    assert all(end - start <= max(ahead, longest) for start, end in store.requested)
    for (_, end), (start, _) in zip(store.requested, store.requested[1:], strict=False):
        assert end <= start
    # After the end of the file is reached, nothing more is requested.
    assert sum(end > num_available for _, end in store.requested) <= 1
    assert read[-1:] == [
        sum(len(CONTENT[:num_available][start:end]) for start, end in store.requested)
    ]


def test_a_read_to_the_end_requests_one_byte_more() -> None:
    store = RecordingStorage(CONTENT + b"?")
    file = SequentialShard(store, shard(), ReadMeter(0, None), read_ahead=150)
    assert file.read(0, 10) == CONTENT[:10]
    assert file.read(10, 191) == CONTENT[10:] + b"?"
    assert store.requested == [(0, 150), (150, 201)]


def test_results_are_in_order_and_threads_are_limited() -> None:
    barrier = threading.Barrier(3, timeout=20)

    def act(number: int) -> int:
        barrier.wait()
        return number * number

    meter = ReadMeter(0, None)
    assert map_shards(3, act, range(6), meter) == [0, 1, 4, 9, 16, 25]
    with pytest.raises(ValueError, match="jobs=0 must be 1 or more"):
        map_shards(0, act, range(6), meter)


def test_no_shard_is_started_after_an_error() -> None:
    started: list[int] = []

    def act(number: int) -> None:
        started.append(number)
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        map_shards(1, act, range(1000), ReadMeter(0, None))
    assert len(started) < 1000


def test_an_error_cancels_the_other_threads_within_a_shard() -> None:
    meter, barrier = ReadMeter(0, None), threading.Barrier(2, timeout=20)
    cancelled = threading.Event()

    def act(number: int) -> None:
        barrier.wait()
        if number == 0:
            raise KeyboardInterrupt
        try:
            while True:
                meter.add(1)
        except CancelledError:
            cancelled.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        map_shards(2, act, range(2), meter)
    assert cancelled.is_set()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    monkeypatch.setattr("tvr.data_prep.check.check_shard.CHUNK_BYTES", 4096)
    make_dataset(tmp_path, 12)
    with serve_folder(tmp_path / "data") as store:
        yield store


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_store_that_fails_every_third_read_is_verified(store: HttpStorage, jobs: int) -> None:
    store.fail_every_third_of_a_file()
    reported: list[tuple[int, int]] = []
    report = verify_dataset(store.url, jobs=jobs, on_bytes=lambda *each: reported.append(each))
    assert (report.problems, report.num_samples) == ((), 12)
    shard_bytes = sum(shard.shard_bytes for shard in read_manifest(store.url).shards)
    assert report.num_bytes == shard_bytes
    assert reported == sorted(reported)
    assert reported[-1] == (shard_bytes, shard_bytes)
    failed = sum(store.requests.count(name) // 3 for name in set(store.requests))
    assert failed >= 5


def test_truncated_and_grown_shards_are_reported_over_http(store: HttpStorage) -> None:
    first, second = (store.folder / f"shard-00000{number}.tar" for number in (0, 1))
    first.write_bytes(first.read_bytes()[:9000])
    second.write_bytes(second.read_bytes() + bytes(5000))
    problems = verify_dataset(store.url).problems
    where = [problem.where for problem in problems]
    assert where[-4:] == ["shard-000000.tar"] * 2 + ["shard-000001.tar"] * 2
    assert "9000 bytes, expected" in problems[-4].what
    assert problems[-2].what.startswith("more than the expected")
    assert "the file is truncated" in problems[0].what


def test_a_store_that_is_down_is_a_problem_of_each_shard(store: HttpStorage) -> None:
    answer = store.answer
    store.answer = lambda name, byte_range: (  # type: ignore[method-assign]
        (503, b"") if name.endswith(".tar") else answer(name, byte_range)
    )
    problems = verify_dataset(store.url).problems
    assert [problem.where for problem in problems] == [f"shard-00000{i}.tar" for i in range(3)]
    assert all("503" in problem.what for problem in problems)
