"""Reads from a store that fails: what is asked again, how often, and what comes of it."""

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
from tvr.data_prep.storage.storage import ATTEMPTS, Storage


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStorage]:
    monkeypatch.setattr("tvr.data_prep.storage.storage.FIRST_WAIT_S", 0)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with serve_folder(tmp_path) as store:
        yield store


def test_ranges_end_where_the_file_does(store: HttpStorage) -> None:
    files = Storage(store.url)
    assert files.read("file") == bytes(range(100))
    assert files.read_range("file", 10, 20) == bytes(range(10, 20))
    assert files.read_range("file", 90, 120) == bytes(range(90, 100))
    assert files.read_range("file", 100, 120) == b""


@pytest.mark.parametrize(
    ("status", "asked"), [(503, ATTEMPTS), (500, ATTEMPTS), (429, ATTEMPTS), (403, 1), (404, 1)]
)
def test_what_may_pass_is_asked_again(store: HttpStorage, status: int, asked: int) -> None:
    store.fails, store.status = lambda number: True, status
    with pytest.raises(OSError, match=r"http://.*/file"):
        Storage(store.url).read("file")
    assert len(store.requests) == asked


def test_the_last_attempt_may_succeed(store: HttpStorage) -> None:
    store.fails = lambda number: number < ATTEMPTS
    assert Storage(store.url).read_range("file", 0, 3) == bytes(range(3))
    assert len(store.requests) == ATTEMPTS


def test_a_missing_file_is_told_from_a_failing_store(store: HttpStorage) -> None:
    with pytest.raises(FileNotFoundError):
        Storage(store.url).read("none")
    with pytest.raises(FileNotFoundError, match="no data set there"):
        read_manifest(store.url)
    store.fails = lambda number: True
    with pytest.raises(OSError, match="503") as caught:
        read_manifest(store.url)
    assert not isinstance(caught.value, FileNotFoundError)


def test_a_server_that_is_gone(store: HttpStorage) -> None:
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/file: .*"):
        Storage("http://127.0.0.1:1").read("file")


def test_a_store_that_ignores_ranges_is_named(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.answer
    monkeypatch.setattr(store, "answer", lambda name, byte_range: whole(name, None))
    with pytest.raises(OSError, match=r"asked for 10 bytes, got 100: .* ignores byte ranges"):
        Storage(store.url).read_range("file", 0, 10)


def test_waits_double_up_to_a_bound(store: HttpStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tvr.data_prep.storage.storage.FIRST_WAIT_S", 0.5)
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    store.fails = lambda number: True
    with pytest.raises(OSError, match="503"):
        Storage(store.url).read_range("file", 0, 1, attempts=7)
    assert waits == [0.5, 1, 2, 4, 8, 8]


def test_retries_are_logged_now_and_then(
    store: HttpStorage, caplog: pytest.LogCaptureFixture
) -> None:
    store.fails = lambda number: number % 2 == 1
    files = Storage(store.url)
    with caplog.at_level(logging.WARNING, logger="tvr.data_prep.storage.storage"):
        for _ in range(20):
            files.read("file")
    assert files.num_retries == 20
    retries = [line.split("retry ")[1].split(" ")[0] for line in caplog.messages]
    assert retries == ["1", "2", "4", "8", "16"]
    assert "/file: attempt 1 failed, trying again" in caplog.messages[0]
    assert "503" in caplog.messages[0]


def test_a_retried_read_keeps_nothing_of_its_caller_alive(store: HttpStorage) -> None:
    """Else abandoned streams and their workers end when, and in whatever thread, garbage is
    collected."""

    def read() -> weakref.ref[HttpStorage]:
        held = HttpStorage(Path())
        Storage(store.url).read("file")
        return weakref.ref(held)

    store.fails = lambda number: number < ATTEMPTS
    gc.collect()
    gc.disable()
    try:
        assert read()() is None
    finally:
        gc.enable()


def test_local_files_are_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda wait_s: pytest.fail("waited"))
    with pytest.raises(OSError, match="IsADirectoryError"):
        Storage(str(tmp_path)).read("")


def test_a_sample_is_bad_only_after_the_last_attempt(store: HttpStorage, tmp_path: Path) -> None:
    make_dataset(tmp_path, 3)
    url = f"{store.url}/data"
    store.fails = lambda number: number % 3 == 0
    for key in ("c00", "c01", "c02"):
        assert read_sample(url, key, num_frames=4, image_size=16).key == key
    sound = len(store.requests)
    store.fails = lambda number: number > sound + 2  # the manifest comes, the shard does not
    with pytest.raises(BadSample, match=r"c01: read_error: http://.*shard-000000.tar: .*503"):
        read_sample(url, "c01", num_frames=4, image_size=16)
    assert len(store.requests) == sound + 2 + ATTEMPTS
    store.fails = lambda number: False
    (tmp_path / "data" / "shard-000000.tar").unlink()
    with pytest.raises(BadSample, match="c01: missing_shard"):
        read_sample(url, "c01", num_frames=4, image_size=16)
