"""Packing processes that are killed, crash or fill the disk: the packed bytes stay the same."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.clip_files import file_contents, numbered_video, pack_settings, write_clips
from builders.exhaustive import further
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep import cli
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.worker_pool import pack_clips

FRAMES: dict[str, Any] = {"layout": "frames", "num_frames": 3, "samples_per_shard": 2}


def annotate(folder: Path, num_clips: int) -> Path:
    """Writes long clips, every eleventh of them bad, and returns their annotation file."""
    video = numbered_video(250)
    lines = []
    for index in range(num_clips):
        name = f"v{index:02d}.mp4"
        (folder / name).write_bytes(b"garbage" if index % 11 == 5 else video)
        lines.append(json.dumps({"video": name, "caption": f"clip {index}", "video_id": "v"}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder / "a.jsonl"


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotate(tmp_path_factory.mktemp("clips"), 64)


@pytest.fixture(scope="module")
def expected(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the data set that one uninterrupted process packs."""
    out = tmp_path_factory.mktemp("expected") / "data"
    assert cli.pack(pack_command(annotations, out, "--processes", "1")[4:]) == 0
    return file_contents(out)


def pack_command(annotations: Path, out: Path, *more: str) -> list[str]:
    settings = ["--layout", "frames", "--num-frames", "4", "--samples-per-shard", "4"]
    files = ["--annotations", str(annotations), "--out", str(out), "--max-bad", "11"]
    return [sys.executable, "-m", "tvr.launchers.cli", "pack", *files, *settings, *more]


@contextmanager
def started(line: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Runs a command in its own process group, and kills it at the end of the context."""
    process = subprocess.Popen(
        line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0, **more
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(f"waited 60 s for {what}")


def num_records(out: Path) -> int:
    return len(list(out.glob(".packing/shard-*.json")))


def kill_after(line: list[str], out: Path, num_new: int, delay_s: float, *, group: bool) -> None:
    """Starts packing and kills it `delay_s` after it completed `num_new` more shards.

    Args:
        group: Kill the whole process group instead of the main process.
    """
    before = num_records(out)
    with started(line) as process:
        wait_for(lambda: num_records(out) >= before + num_new, f"{num_new} more shards")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # at least the fork server and two packing processes
        time.sleep(delay_s)
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # The other processes end without a signal.
        _, running = psutil.wait_procs(family, timeout=20)
        assert running == []


def test_a_packing_that_is_killed_twice_resumes(
    annotations: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chance = random.Random(5)
    line = pack_command(annotations, tmp_path / "data", "--processes", "2")
    kill_after(line, tmp_path / "data", 2, chance.uniform(0, 0.1), group=False)
    kill_after(line, tmp_path / "data", 3, chance.uniform(0, 0.1), group=True)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert cli.pack(line[4:]) == 0
    assert "packed 58 clips with 58 captions into 16 shards" in capsys.readouterr().out
    assert file_contents(tmp_path / "data") == expected
    assert verify_dataset(str(tmp_path / "data")).problems == ()


@pytest.mark.exhaustive
def test_a_killed_task_resumes(
    annotations: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = pack_command(annotations, tmp_path / "data", "--processes", "2", "--task", "1/2")
    kill_after(second, tmp_path / "data", 1, 0.02, group=True)
    first = pack_command(annotations, tmp_path / "data", "--processes", "1", "--task", "0/2")
    assert cli.pack(first[4:]) == 0
    assert capsys.readouterr().out.startswith(
        "task 0/2 packed its shards; the last task completes the data set"
    )
    assert cli.pack(second[4:]) == 0
    assert "packed 58 clips" in capsys.readouterr().out
    assert file_contents(tmp_path / "data") == expected
    assert cli.pack(pack_command(annotations, tmp_path / "data", "--task", "2/2")[4:]) == 2
    assert "task='2/2' must be i/n with 0 <= i < n" in capsys.readouterr().err


def test_a_full_disk_leaves_no_partial_shard(tmp_path: Path) -> None:
    annotations = annotate(tmp_path, 12)
    line = pack_command(annotations, tmp_path / "data", "--processes", "1")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tvr pack: error: [Errno 27] File too large")
    assert file_contents(tmp_path / "data") == {}
    assert cli.pack(line[4:]) == 0
    assert verify_dataset(str(tmp_path / "data")).problems == ()
    assert min(path.stat().st_size for path in (tmp_path / "data").glob("*.tar")) > 20_000


def kill_client(storage: HttpStorage, number: signal.Signals, killed: list[int]) -> None:
    """Sends a signal to the packing process that is connected to the storage."""
    port = int(storage.url.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        if port in {other.raddr.port for other in process.net_connections() if other.raddr}:
            killed.append(process.pid)
            os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("number", "times", "processes"),
    [
        (signal.SIGSEGV, 2, 2),
        (signal.SIGKILL, 1, 2),
        *further((signal.SIGKILL, 2, 2), (signal.SIGKILL, 2, 1)),
    ],
)
def test_a_clip_whose_process_dies(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
    times: int,
    processes: int,
) -> None:
    """The first `times` processes that read c04 get a signal while they read it."""
    clips = write_clips(tmp_path, 7)
    killed: list[int] = []
    url = str(tmp_path / "data")

    def fails(count: int) -> bool:
        if count <= times:
            kill_client(storage, number, killed)
        return False

    with serve_folder(tmp_path) as storage:
        storage.fails = fails
        clips[4] = replace(clips[4], video=f"{storage.url}/c04.mp4")
        manifest = pack_shards(clips, url, max_bad=1, processes=processes, **FRAMES)
    assert len(set(killed)) == times
    assert f"a packing process ended with {number.name} while it packed c04" in caplog.text
    assert manifest is not None
    assert len(storage.requests) == 2
    if times == 1:
        assert (manifest.num_samples, manifest.bad) == (7, {})
        return
    assert manifest.samples.key.tolist() == [f"c{i:02d}" for i in (0, 1, 2, 3, 5, 6)]
    (bad,) = map(json.loads, (tmp_path / "data" / "bad.jsonl").read_text().splitlines())
    reason, how = {
        signal.SIGSEGV: ("unreadable", "the decoder crashed twice with SIGSEGV ["),
        signal.SIGKILL: ("killed", "twice, its process ended with SIGKILL ["),
    }[number]
    assert (bad["key"], bad["reason"]) == ("c04", reason)
    assert bad["detail"].startswith(how)


def test_a_bug_ends_packing_with_its_traceback(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 5)
    clips[3] = replace(clips[3], captions=(7,))  # type: ignore[arg-type]
    settings = pack_settings(num_frames=3, samples_per_shard=2)
    with pytest.raises(RuntimeError, match=r"(?s)packing c03 .*Traceback.*in pack_clip.*TypeError"):
        list(pack_clips(clips, settings, 2))


def test_transient_read_errors_of_a_source_are_retried(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 4)
    with serve_folder(tmp_path) as storage:
        remote = [replace(clip, video=f"{storage.url}/{Path(clip.video).name}") for clip in clips]
        storage.fails = lambda number: number in (1, 3)
        pack_shards(remote, str(tmp_path / "data"), processes=2, **FRAMES)
        assert len(storage.requests) == 6
        storage.fails = lambda number: storage.requests[-1] == "c02.mp4"
        storage.status = 400  # a permanent error
        manifest = pack_shards(
            remote, str(tmp_path / "other"), processes=2, max_bad=2, layout="video"
        )
    assert manifest is not None
    assert manifest.bad == {"read_error": 1}
    assert read_manifest(str(tmp_path / "data")).num_samples == 4
