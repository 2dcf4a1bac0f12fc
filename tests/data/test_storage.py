"""Reads from a failing storage: which errors are retried, how often, and what callers see."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.clip_files import make_dataset
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.loader import read_sample
from tvr.data_prep.records import BadSample
from tvr.data_prep.storage.retries import ATTEMPTS
from tvr.data_prep.storage.storage import Storage


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with serve_folder(tmp_path) as store:
        yield store


def test_ranges_end_where_the_file_does(store: HttpStorage) -> None:
    storage = Storage(store.url)
    assert storage.read("file") == bytes(range(100))
    assert storage.read_range("file", 10, 20) == bytes(range(10, 20))
    assert storage.read_range("file", 90, 120) == bytes(range(90, 100))
    assert storage.read_range("file", 100, 120) == b""


@pytest.mark.parametrize(
    ("status", "num_requests"),
    [(503, ATTEMPTS), (500, ATTEMPTS), (429, ATTEMPTS), (403, 1), (404, 1)],
)
def test_only_transient_errors_are_retried(
    store: HttpStorage, status: int, num_requests: int
) -> None:
    store.fails, store.status = lambda number: True, status
    with pytest.raises(OSError, match=r"http://.*/file"):
        Storage(store.url).read("file")
    assert len(store.requests) == num_requests


def test_the_last_attempt_may_succeed(store: HttpStorage) -> None:
    store.fails = lambda number: number < ATTEMPTS
    assert Storage(store.url).read_range("file", 0, 3) == bytes(range(3))
    assert len(store.requests) == ATTEMPTS


def test_a_missing_file_differs_from_a_failing_storage(store: HttpStorage) -> None:
    with pytest.raises(FileNotFoundError):
        Storage(store.url).read("none")
    with pytest.raises(FileNotFoundError, match="no data set there"):
        read_manifest(store.url)
    store.fails = lambda number: True
    with pytest.raises(OSError, match="503") as caught:
        read_manifest(store.url)
    assert not isinstance(caught.value, FileNotFoundError)


def test_an_unreachable_server_is_an_os_error(store: HttpStorage) -> None:
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/file: .*"):
        Storage("http://127.0.0.1:1").read("file")


def test_a_storage_that_ignores_ranges_is_refused(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.answer
    monkeypatch.setattr(store, "answer", lambda name, byte_range: whole(name, None))
    with pytest.raises(OSError, match=r"asked for 10 bytes, got 100: .* ignores byte ranges"):
        Storage(store.url).read_range("file", 0, 10)


def test_retries_are_logged_at_powers_of_two(
    store: HttpStorage, caplog: pytest.LogCaptureFixture
) -> None:
    store.fails = lambda number: number % 2 == 1
    storage = Storage(store.url)
    with caplog.at_level(logging.WARNING, logger="tvr.data_prep.storage.retries"):
        for _ in range(20):
            storage.read("file")
    assert storage.num_retries == 20
    retries = [line.split("retry ")[1].split(" ")[0] for line in caplog.messages]
    assert retries == ["1", "2", "4", "8", "16"]
    assert "/file: attempt 1 failed, trying again" in caplog.messages[0]
    assert "503" in caplog.messages[0]


def test_a_retried_read_keeps_no_reference_to_its_caller(store: HttpStorage) -> None:
    """Otherwise abandoned loaders and their workers would live until a garbage collection."""

    def read() -> weakref.ref[HttpStorage]:
        local = HttpStorage(Path())
        Storage(store.url).read("file")
        return weakref.ref(local)

    store.fails = lambda number: number < ATTEMPTS
    gc.collect()
    gc.disable()
    try:
        assert read()() is None
    finally:
        gc.enable()


def test_refused_local_reads_are_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda wait_s: pytest.fail("waited"))
    with pytest.raises(OSError, match="IsADirectoryError"):
        Storage(str(tmp_path)).read("")


def test_a_sample_is_bad_only_after_the_last_attempt(store: HttpStorage, tmp_path: Path) -> None:
    make_dataset(tmp_path, 3)
    url = f"{store.url}/data"
    store.fails = lambda number: number % 3 == 0
    for key in ("c00", "c01", "c02"):
        assert read_sample(url, key, num_frames=4, image_size=16).key == key
    before = len(store.requests)
    store.fails = lambda number: number > before + 1  # the manifest succeeds, the shard fails
    with pytest.raises(BadSample, match=r"c01: unavailable: http://.*shard-000000.tar: .*503"):
        read_sample(url, "c01", num_frames=4, image_size=16)
    assert len(store.requests) == before + 1 + ATTEMPTS
    store.fails = lambda number: False
    (tmp_path / "data" / "shard-000000.tar").unlink()
    with pytest.raises(BadSample, match="c01: missing_shard"):
        read_sample(url, "c01", num_frames=4, image_size=16)
