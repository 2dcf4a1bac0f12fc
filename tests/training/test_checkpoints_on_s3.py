"""Checkpoints on object stores: a real S3 server, faults by a proxy, and Google's API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.exhaustive import principal_and_further
from builders.gcs_server import serve_gcs
from builders.s3_server import (
    BUCKET,
    Fault,
    FaultProxy,
    Request,
    Rule,
    S3Server,
    burst,
    every,
    fault_proxy,
    serve_s3,
    throttled,
    unavailable,
)
from builders.savers import ALONE, save, saver, stage, state, wait_until_ready
from builders.tiny import tiny_config
from fsspec.core import url_to_fs

from tvr.data_prep.storage.storage import StorageUnavailable, write_file
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import (
    Retention,
    best_step,
    newest_checkpoint,
    published_steps,
    record_evaluation,
)
from tvr.trainer.checkpoint.manifest import create_manifest
from tvr.trainer.checkpoint.restore import local_files
from tvr.trainer.checkpoint.verification import find_newest_intact
from tvr.trainer.errors import CheckpointDamaged, Fenced, PreflightFailed
from tvr.trainer.resilience.preflight import preflight

URL = f"s3://{BUCKET}/run/checkpoints"
FILES = ("random-rank-00000.pt", "shards/model.pt", "shards/optimiser.pt")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@contextmanager
def only_our_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short waits, and no retries by the client, so that those of `retries` are tested."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0.001)
        yield


@pytest.fixture
def s3(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    running.clear()
    with only_our_retries(monkeypatch), running.environment(monkeypatch):
        yield running


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(s3) as proxy, proxy.environment(monkeypatch):
        yield proxy


def names(server: S3Server) -> list[str]:
    """The keys of the checkpoints, without the attempts' random letters."""
    keys = server.keys("run/checkpoints/")
    return [re.sub(r"-[0-9a-f]{8}-", "-", key.removeprefix("run/checkpoints/")) for key in keys]


def of_step(step: int, attempt: int, number: int) -> list[str]:
    """The keys of one published checkpoint."""
    folder = f"step-{step:08d}/attempt-{attempt:06d}-{number}"
    return [*(f"{folder}/{name}" for name in FILES), f"step-{step:08d}/manifest.json"]


def weight(url: str, folder: Path) -> float:
    """The value in the newest intact checkpoint, read as a resumed run reads it."""
    storage = StorageFolder(url)
    found = find_newest_intact(storage, ALONE, copies=folder)
    assert found.newest is not None
    assert found.damaged == {}
    files = local_files(storage, found.newest, folder / found.newest.name)
    copied = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    assert copied == set(FILES)
    return torch.load(files / "shards" / "model.pt")["weight"].unique().item()


def test_checkpoints_are_saved_read_and_pruned(s3: S3Server, tmp_path: Path) -> None:
    writer = saver(URL, tmp_path, retention=Retention(last=2, best=True))
    for step in (3, 6, 9, 12):
        assert save(writer, step).error is None
        if step == 3:
            record_evaluation(writer.storage, 3, 1.0)
    kept = [*of_step(3, 1, 1), *of_step(9, 1, 3), *of_step(12, 1, 4)]
    assert names(s3) == ["best.json", "latest", *kept]
    assert s3.read("run/checkpoints/latest") == b"step-00000012\n"
    assert best_step(StorageFolder(URL)) == 3
    assert weight(URL, tmp_path / "fetched") == 12.0


def test_each_file_is_sent_once_and_never_copied(proxy: FaultProxy, tmp_path: Path) -> None:
    writer = saver(URL, tmp_path)
    proxy.reset()
    save(writer, 3)
    sent = [request.path for request in proxy.requests if request.method == "PUT"]
    assert len(sent) == len(set(sent)) == len(FILES) + 2  # and the manifest, and `latest`
    assert sent[-2].endswith("/manifest.json")
    assert not [request for request in proxy.requests if request.method in ("POST", "DELETE")]


def test_small_file_is_one_request(proxy: FaultProxy, s3: S3Server) -> None:
    fs, path = url_to_fs(f"{URL}/manifest.json")
    write_file(fs, path, b"first")
    proxy.reset()
    write_file(fs, path, b"second")
    assert [(r.method, r.path) for r in proxy.requests] == [("PUT", f"/{path}")]
    proxy.fail = burst(1, 9, throttled())
    proxy.reset()
    write_file(fs, path, b"third")
    assert s3.read(path.removeprefix(f"{BUCKET}/")) == b"third"
    assert s3.keys() == [path.removeprefix(f"{BUCKET}/")]


def test_store_without_conditional_writes_is_used_and_named_once(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[Request] = []

    def refuse_first(request: Request) -> Fault | None:
        is_hit = request.path.endswith("manifest.json") and request.method == "PUT" and not refused
        refused.extend([request] if is_hit else [])
        return Fault(status=501, code="NotImplemented") if is_hit else None

    proxy.fail = refuse_first
    writer = saver(URL, tmp_path)
    for step in (3, 6):
        assert save(writer, step).error is None
    assert [text for text in caplog.messages if "cannot refuse to replace" in text] == [
        text for text in caplog.messages if "NotImplemented" in text or "injected" in text
    ]
    assert len(refused) == 1
    assert names(s3) == ["latest", *of_step(3, 1, 1), *of_step(6, 1, 2)]


def test_kill_between_files_and_manifest_leaves_the_checkpoint_before(
    s3: S3Server, tmp_path: Path
) -> None:
    save(saver(URL, tmp_path), 3)
    killed = saver(URL, tmp_path, background=True)
    killed.save(state(6), lambda copy: stage(6.0))
    wait_until_ready(killed)
    assert [name for name in names(s3) if "step-00000006" in name] == of_step(6, 2, 1)[:-1]
    assert weight(URL, tmp_path / "fetched") == 3.0
    # The next attempt removes the files.
    again = saver(URL, tmp_path)
    assert names(s3) == ["latest", *of_step(3, 1, 1)]
    save(again, 6)
    assert names(s3) == ["latest", *of_step(3, 1, 1), *of_step(6, 3, 1)]


def test_late_writes_of_an_older_attempt_change_nothing(s3: S3Server, tmp_path: Path) -> None:
    save(saver(URL, tmp_path), 3)
    orphan = saver(URL, tmp_path, background=True)
    orphan.save(state(6), lambda copy: stage(-1.0))
    wait_until_ready(orphan)
    successor = saver(URL, tmp_path)
    save(successor, 6)
    with pytest.raises(Fenced):
        orphan.finish()
    with pytest.raises(Fenced):
        orphan.save(state(9), lambda copy: stage(-1.0))
    # Requests that were on their way: files of both steps, and their manifests.
    for step in (6, 9):
        folder = f"run/checkpoints/step-{step:08d}/attempt-000002-0a1b2c3d-7"
        s3.write(f"{folder}/shards/model.pt", b"late")
    late = replace(state(9), folder="attempt-000002-0a1b2c3d-7")
    create_manifest(successor.storage, "step-00000009", late)
    with pytest.raises(FileExistsError):
        create_manifest(successor.storage, "step-00000006", late)
    save(successor, 12)
    assert names(s3) == ["latest", *of_step(6, 3, 1), *of_step(12, 3, 2)]
    assert weight(URL, tmp_path / "again") == 12.0


@pytest.mark.parametrize(
    ("name", "kind"),
    principal_and_further(
        product([*FILES, "manifest.json"], ["one bit", "gone", "truncated"]),
        [(FILES[0], "gone"), (FILES[2], "one bit"), ("manifest.json", "truncated")],
    ),
)
def test_damaged_checkpoint_is_set_aside(
    s3: S3Server, tmp_path: Path, name: str, kind: str
) -> None:
    writer = saver(URL, tmp_path)
    for step in (3, 6):
        save(writer, step)
    (key,) = [key for key in s3.keys() if "step-00000006" in key and key.endswith(name)]
    content = bytearray(s3.read(key))
    content[len(content) // 2] ^= 4
    if kind == "gone":
        s3.remove(key)
    else:
        s3.write(key, bytes(content if kind == "one bit" else content[:-7]))
    writer = saver(URL, tmp_path)
    found = find_newest_intact(writer.storage, ALONE, copies=tmp_path / "fetched")
    assert found.newest is not None
    assert found.newest.state.step == 3
    assert list(found.damaged) == [6]
    assert key in found.damaged[6][0]
    writer.set_aside_damaged(found)
    assert published_steps(writer.storage) == [3]
    aside = [
        each for each in of_step(6, 1, 2)[:-1] if kind != "gone" or not key.endswith(each[-8:])
    ]
    expected = ["latest", *of_step(3, 1, 1), *aside, "step-00000006/damaged.json"]
    assert names(s3) == sorted(expected)
    save(writer, 6)
    assert names(s3) == sorted([*expected, *of_step(6, 2, 1)])
    assert weight(URL, tmp_path / "again") == 6.0


def test_stale_listing_neither_hides_nor_revives_a_checkpoint(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    writer = saver(URL, tmp_path, retention=Retention(last=1))
    save(writer, 3)
    with proxy.stale_listings():
        assert published_steps(writer.storage) == [3]
        save(writer, 6)
        # The listing shows step 3, which is removed, and not step 6.
        assert StorageFolder(URL).list_names() == ["latest", "step-00000003"]
        assert weight(URL, tmp_path / "fetched") == 6.0
        found = newest_checkpoint(StorageFolder(URL))
        assert found is not None
        assert found.state.step == 6
        again = saver(URL, tmp_path, retention=Retention(last=1))
        save(again, 9)
        assert weight(URL, tmp_path / "again") == 9.0
    save(again, 12)
    assert names(s3) == ["latest", *of_step(12, 2, 2)]


FAULTS: dict[str, Rule] = {
    "every third 503": every(3, unavailable()),
    "every third 429": every(3, throttled()),
    "every third 500": every(3, Fault(status=500)),
    "every third cut": every(3, Fault(cut=True)),
    "every third lost": every(3, Fault(lose=True)),
    "every second of all kinds": every(
        2, unavailable(), Fault(cut=True), throttled(), Fault(lose=True)
    ),
    "slow first bytes": every(2, Fault(wait_s=0.05)),
    "burst of 503": burst(2, 11, unavailable()),
    "late burst of 429": burst(18, 27, throttled()),
}


@pytest.mark.parametrize(
    "name", principal_and_further(FAULTS, ["every second of all kinds", "burst of 503"])
)
def test_faults_cost_no_checkpoint(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path, name: str
) -> None:
    proxy.fail = FAULTS[name]
    writer = saver(URL, tmp_path)
    for step in (3, 6, 9):
        assert save(writer, step).error is None
    record_evaluation(writer.storage, 9, 1.0)
    again = saver(URL, tmp_path)
    assert weight(URL, tmp_path / "fetched") == 9.0
    assert save(again, 12).error is None
    assert proxy.num_faults >= 9
    assert weight(URL, tmp_path / "again") == 12.0
    kept = [*of_step(9, 1, 3), *of_step(12, 2, 1)]
    assert names(s3) == ["best.json", "latest", *kept]


def test_store_that_stays_down_costs_one_save(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr.data_prep.storage.retries.ATTEMPTS", 3)
    writer = saver(URL, tmp_path)
    save(writer, 3)
    proxy.fail = lambda request: unavailable() if "step-00000006" in request.path else None
    error = save(writer, 6).error
    assert error is not None
    assert "rank 0: StorageUnavailable: " in error
    assert "/step-00000006/" in error
    with pytest.raises(StorageUnavailable):
        writer.storage.read("step-00000006/manifest.json")
    proxy.fail = lambda request: None
    assert save(writer, 9).error is None
    assert names(s3) == ["latest", *of_step(3, 1, 1), *of_step(9, 1, 3)]
    # A checkpoint that cannot be read now is not passed over.
    proxy.fail = lambda request: unavailable() if "step-00000009" in request.path else None
    with pytest.raises(PreflightFailed, match="cannot be read now: StorageUnavailable"):
        find_newest_intact(StorageFolder(URL), ALONE)


def test_large_files_are_sent_in_parts_and_again_after_a_fault(
    proxy: FaultProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 5 << 20)
    monkeypatch.setattr("tvr.data_prep.storage.storage_folder.STORE_READ_BYTES", 1 << 22)
    content = bytes(range(256)) * (12 << 12)

    def write(file: Any) -> None:
        for start in range(0, len(content), 1 << 18):
            file.write(content[start : start + (1 << 18)])

    failed: list[Request] = []

    def fail_second_part(request: Request) -> Fault | None:
        is_hit = "partNumber=2" in request.query and len(failed) < 7
        failed.extend([request] if is_hit else [])
        return unavailable() if is_hit else None

    proxy.fail = fail_second_part
    storage = StorageFolder(URL)
    storage.write("folder/file", write)
    assert len(failed) == 7
    assert s3.read("run/checkpoints/folder/file") == content
    proxy.fail = every(3, Fault(cut=True))
    assert b"".join(storage.read_chunks("folder/file")) == content
    assert len([r for r in proxy.requests if r.method == "GET"]) >= 3

    def stop(file: Any) -> None:
        file.write(bytes(11 << 20))
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        storage.write("folder/other", stop)
    assert s3.keys() == ["run/checkpoints/folder/file"]


def test_preflight_tests_the_store_and_leaves_nothing(
    proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, checkpoint={"url": URL})
    run_dir = tmp_path / "run"
    preflight(config, run_dir, ALONE)
    assert s3.keys() == []
    sent = {request.method for request in proxy.requests if "preflight" in request.path}
    assert {"PUT", "GET", "DELETE"} <= sent
    assert not run_dir.exists()
    wrong = replace(config.checkpoint, url="s3://no-such-bucket/run")
    with pytest.raises(PreflightFailed, match="cannot be used for checkpoints: FileNotFoundError"):
        preflight(replace(config, checkpoint=wrong), run_dir, ALONE)
    proxy.fail = lambda request: Fault(status=403, code="AccessDenied")
    with pytest.raises(PreflightFailed, match=r"cannot be used for checkpoints: .*Denied"):
        preflight(config, run_dir, ALONE)


def test_all_damaged_checkpoints_on_a_store_are_reported(s3: S3Server, tmp_path: Path) -> None:
    save(saver(URL, tmp_path), 3)
    for key in s3.keys():
        if key.endswith("model.pt"):
            s3.write(key, b"short")
    with pytest.raises(CheckpointDamaged, match="5 bytes, the manifest lists"):
        find_newest_intact(StorageFolder(URL), ALONE, copies=tmp_path / "fetched")


def test_google_cloud_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs")
    with serve_gcs(monkeypatch) as bucket:
        url = f"{bucket}/run/checkpoints"
        writer = saver(url, tmp_path)
        for step in (3, 6, 9):
            assert save(writer, step).error is None
        storage = StorageFolder(url)
        assert storage.list_names() == ["latest", "step-00000006", "step-00000009"]
        assert weight(url, tmp_path / "fetched") == 9.0
        killed = saver(url, tmp_path, background=True)
        killed.save(state(12), lambda copy: stage(12.0))
        wait_until_ready(killed)
        assert "step-00000012" in storage.list_names()
        again = saver(url, tmp_path)
        assert storage.list_names() == ["latest", "step-00000006", "step-00000009"]
        save(again, 12)
        assert published_steps(storage) == [9, 12]
        assert len(storage.list_names("step-00000012")) == 2
