"""Checkpoints: search, verification, retention, and saves that fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.file_damage import DAMAGE
from builders.savers import ALONE, save, saver, stage, state, wait_until_ready
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import (
    Checkpoint,
    Retention,
    best_step,
    newest_checkpoint,
    read_state,
    record_evaluation,
)
from tvr.trainer.checkpoint.file_writer import NICENESS
from tvr.trainer.checkpoint.manifest import create_manifest
from tvr.trainer.checkpoint.restore import local_files
from tvr.trainer.checkpoint.verification import CheckpointScan, find_newest_intact
from tvr.trainer.engine import staging as staging_module
from tvr.trainer.engine.random_state import get_random_state, set_random_state
from tvr.trainer.engine.staging import Staging, pinned_bytes, staged_bytes
from tvr.trainer.errors import CheckpointDamaged, Fenced, PreflightFailed
from tvr.trainer.fencing import Attempt, begin_attempt


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(folder: Path, step: int) -> Path:
    """The folder with the files of a step's checkpoint."""
    path = folder / f"step-{step:08d}"
    return path / json.loads((path / "manifest.json").read_text())["folder"]


def path_in(folder: Path, step: int, name: str) -> Path:
    inside = folder / f"step-{step:08d}" if name == "manifest.json" else files_of(folder, step)
    return inside / name


def test_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert find_newest_intact(StorageFolder(str(folder)), ALONE).newest is None
        assert newest_checkpoint(StorageFolder(str(folder))) is None


def test_manifest_lists_every_file_of_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    result = save(saver(folder, tmp_path), 3)
    assert (result.step, result.error) == (3, None)
    assert names(folder) == ["latest", "step-00000003"]
    assert (folder / "latest").read_text() == "step-00000003\n"
    written = {p.relative_to(folder / "step-00000003").as_posix() for p in all_files(folder)}
    found = find_newest_intact(StorageFolder(str(folder)), ALONE).newest
    assert found is not None
    inside = {f"{found.state.folder}/{name}" for name in found.state.files}
    assert inside | {"manifest.json"} == written
    assert re.fullmatch(r"attempt-000001-[0-9a-f]{8}-1", found.state.folder)
    assert set(found.state.files) == {
        "random-rank-00000.pt",
        "shards/model.pt",
        "shards/optimiser.pt",
    }
    assert result.num_bytes == sum(p.stat().st_size for p in all_files(folder)) - manifest_bytes(
        folder
    )


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*/**/*") if path.is_file())


def manifest_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("step-*/manifest.json"))


@pytest.mark.parametrize("url", ["disk", "memory://checkpoints-{}"])
def test_saved_state_is_read_back(tmp_path: Path, url: str) -> None:
    storage = str(tmp_path / "disk") if url == "disk" else url.format(tmp_path.name)
    writer = saver(storage, tmp_path)
    for step in (3, 6):
        save(writer, step)
    found = find_newest_intact(StorageFolder(storage), ALONE)
    assert found.newest is not None
    assert (found.newest.state.step, found.damaged) == (6, {})
    files = local_files(StorageFolder(storage), found.newest, tmp_path / "fetched")
    weight = torch.load(files / "shards" / "model.pt")["weight"]
    assert torch.equal(weight, torch.full((1000,), 6.0))


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "name", ["manifest.json", "random-rank-00000.pt", "shards/model.pt", "shards/optimiser.pt"]
)
def test_damage_to_any_file_is_reported_and_the_checkpoint_before_is_used(
    tmp_path: Path, name: str, kind: str
) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path)
    for step in (3, 6):
        save(writer, step)
    damaged = path_in(folder, 6, name)
    DAMAGE[kind](damaged)
    found = find_newest_intact(StorageFolder(str(folder)), ALONE)
    assert found.newest is not None
    assert found.newest.state.step == 3
    (lines,) = found.damaged.values()
    assert str(damaged) in " ".join(lines)
    # The files stay, without a manifest, and retention no longer counts them.
    before = {path.name for path in (folder / "step-00000006").iterdir()} - {"manifest.json"}
    writer = saver(folder, tmp_path)
    writer.set_aside_damaged(found)
    assert names(folder / "step-00000006") == sorted({*before, "damaged.json"})
    assert (folder / "latest").read_text() == "step-00000003\n"
    storage = StorageFolder(str(folder))
    assert find_newest_intact(storage, ALONE) == CheckpointScan(newest=found.newest, damaged={})
    record = json.loads((folder / "step-00000006" / "damaged.json").read_text())
    assert record["errors"] == list(lines)
    # The step is saved again beside them.
    save(writer, 6)
    found = find_newest_intact(storage, ALONE)
    assert found.newest == newest_checkpoint(storage)
    assert found.newest is not None
    assert found.newest.state.step == 6
    kept = {*before, "damaged.json", "manifest.json", found.newest.state.folder}
    assert names(folder / "step-00000006") == sorted(kept)
    save(writer, 9)
    assert names(folder) == ["latest", "step-00000006", "step-00000009"]
    save(writer, 12)
    assert names(folder / "step-00000006") == sorted({*before, "damaged.json"})


def test_unlisted_file_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path)
    for step in (3, 6):
        save(writer, step)
    more = files_of(folder, 6) / "shards" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    more.write_bytes(b"the loader of the other shards would read this file, too")
    found = find_newest_intact(StorageFolder(str(folder)), ALONE)
    assert found.newest is not None
    assert found.newest.state.step == 3
    assert found.damaged == {6: (f"{more}: the manifest does not list it",)}


@pytest.mark.parametrize("name", ["manifest.json", "shards/model.pt"])
def test_passing_read_error_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path)
    for step in (3, 6):
        save(writer, step)

    file = path_in(folder, 6, name).relative_to(folder).as_posix()

    def stale(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(storage: StorageFolder, asked: str) -> Any:
            if asked == file:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return method(storage, asked)

        return call

    with monkeypatch.context() as patch:
        for attribute in ("read", "read_chunks"):
            patch.setattr(StorageFolder, attribute, stale(getattr(StorageFolder, attribute)))
        with pytest.raises(PreflightFailed, match=r"06 cannot be read now: .*Stale") as refused:
            find_newest_intact(StorageFolder(str(folder)), ALONE)
    assert refused.value.rank == 0  # the launcher may start the job again
    found = find_newest_intact(StorageFolder(str(folder)), ALONE).newest
    assert found is not None
    assert found.state.step == 6


def test_all_damaged_checkpoints_are_reported_and_training_does_not_restart(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path)
    for step in (3, 6):
        save(writer, step)
        DAMAGE["one bit"](files_of(folder, step) / "shards" / "model.pt")
    with pytest.raises(CheckpointDamaged, match=r"all checkpoints are damaged: .*06/.*; .*03/"):
        find_newest_intact(StorageFolder(str(folder)), ALONE)


def test_edited_manifest_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(saver(folder, tmp_path), 3)
    path = folder / "step-00000003" / "manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "step": 4}))
    with pytest.raises(CheckpointDamaged, match="its sha256 does not match its content"):
        find_newest_intact(StorageFolder(str(folder)), ALONE)


@given(
    st.sets(st.integers(1, 60), min_size=1),
    st.integers(1, 4),
    st.integers(0, 10),
    st.booleans(),
    st.integers(1, 60),
)
def test_retention_keeps_last_periodic_and_best(
    steps: set[int], last: int, every: int, keep_best: bool, best: int
) -> None:
    gone = Retention(last=last, every=every, best=keep_best).expired_steps(steps, best)
    kept = steps - set(gone)
    assert set(sorted(steps)[-last:]) <= kept
    assert not every or {step for step in steps if step % every == 0} <= kept
    assert not keep_best or best not in gone
    for step in kept:
        assert (
            step in sorted(steps)[-last:]
            or (every and step % every == 0)
            or (keep_best and step == best)
        )


def test_pruning_keeps_last_periodic_and_best_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path, retention=Retention(last=2, every=50, best=True))
    storage = StorageFolder(str(folder))
    for step, score in ((10, 30.0), (20, 44.0), (30, 44.0), (40, 20.0), (50, 1.0), (60, 2.0)):
        save(writer, step)
        record_evaluation(storage, step, score)
    assert best_step(storage) == 30  # the newer one of two equal scores
    save(writer, 70)
    kept = ["step-00000030", "step-00000050", "step-00000060", "step-00000070"]
    assert names(folder) == ["best.json", "latest", *kept]


def test_background_save_is_invisible_before_publication(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path, background=True)
    assert writer.save(state(3), lambda copy: stage(3.0)) == []
    wait_until_ready(writer)
    assert names(folder) == ["step-00000003"]
    assert newest_checkpoint(StorageFolder(str(folder))) is None
    assert writer.advance() == []
    wait_until_ready(writer)
    (result,) = writer.advance()
    assert result.error is None
    assert not writer.is_ready
    assert names(folder) == ["latest", "step-00000003"]
    # A save waits for an unfinished one.
    assert writer.save(state(6), lambda copy: stage(6.0)) == []
    (result,) = writer.save(state(9), lambda copy: stage(9.0))
    assert (result.step, result.error) == (6, None)
    assert (result.background, result.no_room) == (True, None)
    (result,) = writer.finish()
    assert (result.step, result.error) == (9, None)
    assert writer.finish() == []


def test_changes_after_staging_are_not_saved(tmp_path: Path) -> None:
    staging = Staging()
    weight = torch.zeros(5)
    nested = {"a": [weight, {"b": (weight, 3)}], "step": 1}
    staging.save(nested, "/somewhere/model.pt")
    weight += 1
    nested["step"] = 2
    first = staging.pop_files()["model.pt"]
    assert first["a"][0].tolist() == first["a"][1]["b"][0].tolist() == [0.0] * 5
    assert first["step"] == 1
    assert staging.pop_files() == {}
    # The memory is reused, since new pages would cost more than the copy.
    staging.save(nested, "/somewhere/model.pt")
    second = staging.pop_files()["model.pt"]
    assert second["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert second["a"][0].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("background", "free", "is_last", "low_priority"),
    [
        (True, 10**12, False, True),
        (True, 10**12, True, False),  # no step follows
        (True, 0, False, False),  # the step waits
        (False, 10**12, False, False),
    ],
)
def test_old_checkpoints_are_removed_on_a_thread_of_low_priority(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    background: bool,
    free: int,
    is_last: bool,
    low_priority: bool,
) -> None:
    """Removing a large checkpoint takes longer than the copy, so it must not slow down steps."""
    seen: list[tuple[bool, int]] = []

    def removing(*_: Any) -> None:
        ident = threading.get_native_id()
        in_main = threading.current_thread() is threading.main_thread()
        seen.append((in_main, os.getpriority(os.PRIO_PROCESS, ident)))

    monkeypatch.setattr("tvr.trainer.checkpoint.publication.Publisher._prune", removing)
    monkeypatch.setattr(
        "tvr.trainer.engine.staging.host_memory", lambda: SimpleNamespace(available=free)
    )
    before = os.getpriority(os.PRIO_PROCESS, 0)
    writer = saver(tmp_path / "checkpoints", tmp_path, background=background)
    writer.save(state(3), lambda copy: stage(3.0))
    writer.finish()
    seen.clear()
    writer.save(state(6), lambda copy: stage(6.0), is_last=is_last)
    writer.finish()
    assert seen == [(False, max(NICENESS, before) if low_priority else before)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_without_memory_for_a_copy_steps_wait_and_one_warning_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = SimpleNamespace(available=3000)  # the state takes 4000 bytes and more
    monkeypatch.setattr("tvr.trainer.engine.staging.host_memory", lambda: free)
    writer, copies = saver(tmp_path / "checkpoints", tmp_path, background=True), []

    def staged(copy: bool) -> dict[str, Any]:
        copies.append(copy)
        return stage(1.0)

    for step in (3, 6):
        (result,) = writer.save(state(step), staged)
        assert (result.step, result.error) == (step, None)
        assert not result.background
        assert result.no_room is not None
        assert "3e-06 GB are free" in result.no_room
    assert not any(copies)
    (line,) = caplog.messages
    assert "not written in the background" in line
    assert "3e-06 GB are free" in line


@pytest.mark.parametrize(
    ("size", "taken"), [(0, 0), (1, 1), (4, 4), (5, 8), (4096, 4096), ((1 << 30) + 1, 1 << 31)]
)
def test_pinned_memory_is_counted_in_powers_of_two(size: int, taken: int) -> None:
    assert pinned_bytes(size) == taken


@pytest.mark.parametrize("pinned", [False, True])
def test_room_for_copies_is_checked_as_torch_allocates_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """The copies of a GPU's state lie in pinned memory."""
    monkeypatch.setattr(staging_module, "_is_staged_pinned", lambda tensor: pinned)
    state_dict = stage(1.0)
    exact = sum(leaf.nbytes for leaf in tree_leaves(state_dict) if isinstance(leaf, torch.Tensor))
    assert staged_bytes(state_dict) == (sum_of_powers(state_dict) if pinned else exact)
    assert exact < sum_of_powers(state_dict)
    # Room for the exact bytes, and for what a step may need.
    monkeypatch.setattr(
        staging_module.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=0)
    )
    monkeypatch.setattr(staging_module, "host_memory", lambda: SimpleNamespace(available=exact))
    writer = saver(tmp_path / "checkpoints", tmp_path, background=True)
    writer.save(state(3), lambda copy: state_dict)
    (result,) = writer.finish() or [writer.last]
    assert result is not None
    assert result.background is not pinned
    assert (result.no_room is not None) is pinned


def sum_of_powers(value: Any) -> int:
    sizes = [leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(next(1 << n for n in range(64) if 1 << n >= size) for size in sizes)


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """The kernel limits the size of files, as a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_costs_one_checkpoint_only(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "checkpoints"
    writer = saver(folder, tmp_path, background=background)
    writer.save(state(3), lambda copy: stage(3.0))
    writer.finish()
    with limited_file_size(2000):
        results = [*writer.save(state(6), lambda copy: stage(6.0)), *writer.finish()]
    assert len(results) == 1
    assert results[0].error is not None
    assert "rank 0: OSError: [Errno 27] File too large" in results[0].error
    assert names(folder) == ["latest", "step-00000003"]
    results = [*writer.save(state(9), lambda copy: stage(9.0)), *writer.finish()]
    assert results[0].error is None
    assert names(folder) == ["latest", "step-00000003", "step-00000009"]


def test_new_attempt_removes_an_unfinished_save(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(saver(folder, tmp_path), 3)
    (folder / "step-00000006" / "attempt-000001-0a1b2c3d-2" / "shards").mkdir(parents=True)
    (folder / "step-00000003" / "attempt-000001-0a1b2c3d-2").mkdir()
    (folder / ".step-00000009.attempt-1.partial" / "shards").mkdir(parents=True)
    saver(folder, tmp_path)
    assert names(folder) == ["latest", "step-00000003"]
    assert len(names(folder / "step-00000003")) == 2
    assert find_newest_intact(StorageFolder(str(folder)), ALONE).damaged == {}


def test_files_of_a_newer_attempt_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    newer = folder / "step-00000003" / "attempt-000002-0a1b2c3d-1"
    newer.mkdir(parents=True)
    save(saver(folder, tmp_path), 3)
    assert newer.exists()


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_late_manifest_of_an_older_attempt_is_removed(tmp_path: Path, kind: str) -> None:
    """Its files may be gone, since a newer attempt removes what is not published."""
    url = str(tmp_path / "checkpoints") if kind == "local" else f"memory://{tmp_path.name}"
    storage = StorageFolder(url)
    save(saver(url, tmp_path), 3)
    writer = saver(url, tmp_path)
    for step in (6, 9):
        late = replace(state(step), folder="attempt-000001-0a1b2c3d-2")
        create_manifest(storage, f"step-{step:08d}", late)
    save(writer, 6)  # the same step
    assert [step for step in (3, 6, 9) if read_state(storage, step)[0]] == [3, 6]
    found = find_newest_intact(storage, ALONE)
    assert found.damaged == {}
    assert found.newest is not None
    assert found.newest.state.folder.startswith("attempt-000002")


def test_lost_manifest_of_the_newest_checkpoint_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(saver(folder, tmp_path), 3)
    (folder / "step-00000003" / "manifest.json").unlink()
    with pytest.raises(CheckpointDamaged, match=r"03/manifest.json: missing, although .*latest"):
        find_newest_intact(StorageFolder(str(folder)), ALONE)


def test_checkpoint_of_format_version_1_is_read_and_removed(tmp_path: Path) -> None:
    """Its files lie directly in the step's folder."""
    folder = tmp_path / "checkpoints"
    first = saver(folder, tmp_path)
    for step in (3, 6):
        save(first, step)
        path = folder / f"step-{step:08d}"
        for file in files_of(folder, step).iterdir():
            file.rename(path / file.name)
        files_of(folder, step).rmdir()
        fields = json.loads((path / "manifest.json").read_text())
        fields.pop("folder")
        fields.pop("sha256")
        fields["format_version"] = 1
        digest = hashlib.sha256(
            json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
        (path / "manifest.json").write_text(json.dumps({**fields, "sha256": digest}))
    storage = StorageFolder(str(folder))
    found = find_newest_intact(storage, ALONE)
    assert found.damaged == {}
    assert found.newest is not None
    files = local_files(storage, found.newest, tmp_path / "unused")
    assert files == folder / "step-00000006"
    weight = torch.load(files / "shards" / "model.pt")["weight"]
    assert torch.equal(weight, torch.full((1000,), 6.0))
    writer = saver(folder, tmp_path)
    save(writer, 9)
    assert names(folder) == ["latest", "step-00000006", "step-00000009"]
    assert names(folder / "step-00000006") == ["manifest.json", "random-rank-00000.pt", "shards"]
    save(writer, 12)
    assert names(folder) == ["latest", "step-00000009", "step-00000012"]


def test_other_hidden_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".ssh").mkdir(parents=True)
    (folder / ".step-00000003.trash-7").mkdir()
    (folder / ".bashrc").write_text("mine")
    saver(folder, tmp_path)
    assert names(folder) == [".bashrc", ".ssh"]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_failed_removal_of_an_old_checkpoint_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    storage = str(tmp_path / "checkpoints") if kind == "local" else f"memory://{tmp_path.name}"
    writer = saver(storage, tmp_path, retention=Retention(last=1))
    save(writer, 3)
    remove = writer.storage.remove

    def busy(name: str, *_: object) -> None:
        remove(name)  # removes some of the files, or all
        if name.startswith("step-00000003"):
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(writer.storage, "remove", busy)
    assert save(writer, 6).error is None
    found = find_newest_intact(writer.storage, ALONE).newest
    assert found is not None
    assert found.name == "step-00000006"


def test_fenced_attempt_cannot_publish(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    orphan = saver(folder, tmp_path, background=True)
    orphan.save(state(3), lambda copy: stage(3.0))
    wait_until_ready(orphan)
    successor = saver(folder, tmp_path)
    with pytest.raises(Fenced, match=r"attempt 1 at .* is over: a newer attempt has begun"):
        orphan.finish()
    with pytest.raises(Fenced):
        orphan.save(state(6), lambda copy: stage(6.0))
    assert names(folder) == []
    save(successor, 3)
    found = newest_checkpoint(StorageFolder(str(folder)))
    assert isinstance(found, Checkpoint)
    assert found.state.attempt == 1  # from the given state
    assert names(folder) == ["latest", "step-00000003"]


def test_simultaneous_attempts_get_different_numbers(tmp_path: Path) -> None:
    taken: list[Attempt] = []
    threads = [
        threading.Thread(target=lambda: taken.append(begin_attempt(tmp_path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(attempt.number for attempt in taken) == list(range(1, 9))
    newest_one = max(taken, key=lambda attempt: attempt.number)
    newest_one.check()
    for attempt in taken:
        if attempt is not newest_one:
            with pytest.raises(Fenced):
                attempt.check()


def test_all_random_states_are_restored() -> None:
    import random

    import numpy as np

    saved = get_random_state()
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    set_random_state(saved)
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn
