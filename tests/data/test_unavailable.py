"""Reads that fail for the moment: they cost no sample, and have a limit of their own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from builders import batches as built
from builders.clip_files import make_dataset
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep import limited_process
from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.cli_errors import run_command
from tvr.data_prep.limited_process import NOTHING_YET, ProcessLimits
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.loader import read_sample
from tvr.data_prep.reading.worker import MAX_UNAVAILABLE
from tvr.data_prep.records import BadSample, Clip, Replacement, TooManyBadSamples
from tvr.data_prep.storage.storage import StorageUnavailable
from tvr.trainer.train_step import TrainStep


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HttpStorage]:
    make_dataset(tmp_path, 12)
    with serve_folder(tmp_path) as store:
        yield store


def failing_reads(
    monkeypatch: pytest.MonkeyPatch, number: int, fails: Callable[[int], bool]
) -> list[int]:
    """Lets reads of local shards fail with an errno; the list grows by each failed read."""
    true_read, done, failed = os.pread, [0], list[int]()

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tar"):
            return true_read(descriptor, length, offset)  # of the index
        done[0] += 1
        if fails(done[0]):
            failed.append(done[0])
            raise OSError(number, os.strerror(number))
        return true_read(descriptor, length, offset)

    monkeypatch.setattr("tvr.data_prep.reading.shard_bytes.os.pread", pread)
    return failed


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EIO])
def test_a_failure_of_a_local_file_system_costs_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make_dataset(tmp_path, 2)
    failed = failing_reads(monkeypatch, number, lambda read: read <= 3)
    sample = read_sample(str(tmp_path / "data"), "c01", num_frames=4, image_size=16)
    assert sample.key == "c01"
    assert failed == [1, 2, 3]


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ETIMEDOUT, "unavailable"), (errno.EACCES, "read_error")]
)
def test_the_reason_follows_from_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    make_dataset(tmp_path, 2)
    failing_reads(monkeypatch, number, lambda read: True)
    with pytest.raises(BadSample, match=f"c01: {reason}: "):
        read_sample(str(tmp_path / "data"), "c01", num_frames=4, image_size=16)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(503, "unavailable"), (429, "unavailable"), (403, "read_error"), (404, "missing_shard")],
)
def test_the_reason_of_a_remote_failure(store: HttpStorage, status: int, reason: str) -> None:
    url = f"{store.url}/data"
    store.fails = lambda number: store.requests[number - 1].endswith(".tar")  # the index is read
    store.status = status
    with pytest.raises(BadSample, match=f"c01: {reason}: "):
        read_sample(url, "c01", num_frames=4, image_size=16)


def test_a_damaged_answer_is_read_once_more(
    store: HttpStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, whole = f"{store.url}/data", store.answer

    def answer(name: str, byte_range: str | None) -> tuple[int, bytes]:
        status, content = whole(name, byte_range)
        is_first = name.endswith(".tar") and store.requests.count(name) == 1
        return status, content[:99] + bytes([content[99] ^ 1]) + content[
            100:
        ] if is_first else content

    monkeypatch.setattr(store, "answer", answer)
    assert read_sample(url, "c01", num_frames=4, image_size=16).key == "c01"
    assert store.requests.count("data/shard-000000.tar") == 2


def test_passing_failures_spend_no_budget_of_bad_samples() -> None:
    budget = BadSampleBudget(0, "in x", 1, max_unavailable_in_a_row=3)
    for _ in range(50):
        for key in ("a", "b", "c"):
            budget.record_bad(key, "unavailable", "503")
        budget.record_good()
    assert not budget.by_reason
    for key in ("a", "b", "c"):
        budget.record_bad(key, "unavailable", "503")
    message = r"4 reads in a row failed .* in x \(max_unavailable_in_a_row=3 allowed\).*d: 503"
    with pytest.raises(TooManyBadSamples, match=message):
        budget.record_bad("d", "unavailable", "503")
    with pytest.raises(ValueError, match="max_unavailable_in_a_row=0 must be 1 or more"):
        BadSampleBudget(0, "", max_unavailable_in_a_row=0)
    with pytest.raises(TooManyBadSamples, match="1 bad samples"):
        BadSampleBudget(0, "in x").record_bad("a", "checksum", "")


def test_a_stream_goes_on_after_failures_and_reads_the_samples_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 12)
    url = str(tmp_path / "data")
    monkeypatch.setattr("tvr.data_prep.reading.shard_bytes.LOCAL_ATTEMPTS", 1)
    # A read is tried twice: once directly, once by the retries.
    failing_reads(monkeypatch, errno.ETIMEDOUT, lambda read: read in (5, 6))
    batches = list(islice(built.training(url, max_bad=0), 12))
    (entry,) = [entry for batch in batches for entry in batch.replaced]
    assert entry.reason == "unavailable"
    shown = [key for batch in batches for key in batch.keys]
    assert entry.key in shown  # at its next visit


def test_a_storage_that_is_down_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 12)
    failed = failing_reads(monkeypatch, errno.ETIMEDOUT, lambda read: read > 10)
    message = rf"{MAX_UNAVAILABLE} reads in a row failed .* the storage is down"
    with pytest.raises(TooManyBadSamples, match=message):
        list(islice(built.training(str(tmp_path / "data"), max_bad=0), 60))
    assert failed


def test_the_run_quarantines_only_bad_samples() -> None:
    config: Any = SimpleNamespace(data=SimpleNamespace(max_bad=1, train="x"))
    step = TrainStep(config, *([None] * 4))  # type: ignore[arg-type]

    def entry(key: str, reason: str) -> Replacement:
        return Replacement(position=0, key=key, reason=reason, detail="")

    step._add_to_quarantine([entry(f"k{n}", "unavailable") for n in range(9)])
    assert step.quarantine == {}
    step._add_to_quarantine([entry("bad", "checksum"), entry("k1", "unavailable")])
    assert step.quarantine == {"bad": "checksum"}
    with pytest.raises(TooManyBadSamples, match="2 bad samples"):
        step._add_to_quarantine([entry("worse", "unreadable")])


def test_packing_stops_instead_of_leaving_clips_out(
    store: HttpStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.fails = lambda number: True
    clips = [
        Clip(key=f"k{n}", video=f"{store.url}/none-{n}.mp4", captions=("x",), video_id=f"k{n}")
        for n in range(3)
    ]
    out = tmp_path / "out"

    def pack() -> int:
        pack_shards(
            clips,
            str(out),
            layout="frames",
            num_frames=4,
            short_side=None,
            max_bad=3,
            processes=0,  # the waits of this process are short
        )
        return 0

    with pytest.raises(StorageUnavailable, match=r"storage of k0's video .* repeat the command"):
        pack()
    assert not (out / "manifest.json").exists()
    # A restart may succeed: not the code of bad usage.
    assert run_command("tvr pack", pack) == 3
    assert "tvr pack: error: the storage of k0's video" in capsys.readouterr().err


def test_a_packing_process_passes_the_failure_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(task: object, alive: object) -> None:
        raise StorageUnavailable("503")

    monkeypatch.setattr(limited_process, "_end_with_parent", lambda: None)
    monkeypatch.setattr(limited_process, "_limit_memory", lambda memory_bytes: None)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    ours, theirs = Pipe()
    clip = Clip(key="k", video="x", captions=("x",), video_id="k")
    ours.send(clip)
    arguments = (theirs, lambda: work, (), ProcessLimits(), 1 << 30)
    thread = Thread(target=limited_process.work_in_process, args=arguments)
    thread.start()
    process = SimpleNamespace(connection=ours)
    receive = limited_process.LimitedProcess.receive
    assert receive(process) is NOTHING_YET  # type: ignore[arg-type]
    with pytest.raises(StorageUnavailable, match="503"):
        receive(process)  # type: ignore[arg-type]
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
