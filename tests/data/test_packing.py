"""Packing by many processes and tasks, killed and run again: always the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.clip_files import numbered_video, read_number, write_clips
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep import cli
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import Manifest, read_manifest
from tvr.data_prep.packing import output_dir
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.pack import PackProgress, pack_shards
from tvr.data_prep.packing.progress import show_progress
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Clip, TooManyBadSamples
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.images import decode_jpeg

FRAMES: dict[str, Any] = {"layout": "frames", "num_frames": 3, "samples_per_shard": 2}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def numbers_of(url: str, key: str) -> list[int]:
    """What five frames of a packed clip show."""
    reader = SampleReader(url, num_frames=1, image_size=1)
    members = reader.members(reader.manifest.samples.key.tolist().index(key))
    if "mp4" in members:
        frames = list(sample_frames(members["mp4"], 5)[0])
    else:
        jpegs = sorted(name for name in members if name.endswith(".jpg"))
        frames = [decode_jpeg(members[name], key=key, member=name) for name in jpegs]
    return [read_number(frame) for frame in frames]


def some_bad_clips(folder: Path) -> list[Clip]:
    """Nine clips; shard 1 of 2 clips holds bad ones only, shard 3 one."""
    clips = write_clips(folder, 9)
    for index in (2, 7):
        Path(clips[index].video).write_bytes(b"garbage")
    Path(clips[3].video).unlink()
    return clips


@pytest.fixture(scope="module")
def bad_clips_packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Clip], Path]:
    """Clips and what one process makes of them, undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    clips = some_bad_clips(folder)
    pack_shards(clips, str(folder / "data"), max_bad=3, **FRAMES)
    return clips, folder / "data"


def test_bad_clips_leave_their_places_empty(bad_clips_packed: tuple[list[Clip], Path]) -> None:
    _, folder = bad_clips_packed
    manifest = read_manifest(str(folder))
    assert [shard.name for shard in manifest.shards] == [
        f"shard-{number:06d}.tar" for number in (0, 2, 3, 4)
    ]
    assert manifest.shard_sizes == (2, 2, 1, 1)
    assert manifest.samples.key.tolist() == ["c00", "c01", "c04", "c05", "c06", "c08"]
    assert manifest.samples.shard.tolist() == [0, 0, 1, 1, 2, 3]
    assert verify_dataset(str(folder)).problems == ()
    assert set(contents(folder)) == {
        *("bad.jsonl", "manifest.json", "samples.npz"),
        *(shard.name for shard in manifest.shards),
    }
    bad = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in bad] == [
        *(("c02", "unreadable"), ("c03", "missing_file"), ("c07", "unreadable")),
    ]


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_change_no_byte(
    bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path, processes: int
) -> None:
    clips, undisturbed = bad_clips_packed
    told: list[PackProgress] = []
    pack_shards(
        clips,
        str(tmp_path),
        max_bad=3,
        processes=processes,
        on_progress=told.append,
        **FRAMES,
    )
    assert contents(tmp_path) == contents(undisturbed)
    assert [progress.num_done for progress in told] == list(range(10))
    assert told[-1].num_clips == 9
    stored = sum(shard.shard_bytes - 1024 for shard in read_manifest(str(tmp_path)).shards)
    assert told[-1].num_bytes == stored


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_tasks_end_in_any_order(
    bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path, order: tuple[int, ...]
) -> None:
    clips, undisturbed = bad_clips_packed

    def run(task: int) -> bool:
        share = {"task": task, "num_tasks": 3, "max_bad": 3, **FRAMES}
        return pack_shards(clips, str(tmp_path), **share) is not None

    assert [run(task) for task in order] == [False, False, True]
    assert contents(tmp_path) == contents(undisturbed)
    assert all(run(task) for task in order)  # run again: complete
    assert contents(tmp_path) == contents(undisturbed)


def test_more_tasks_than_shards_and_a_last_call(
    bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path
) -> None:
    clips, undisturbed = bad_clips_packed
    share: dict[str, Any] = {"num_tasks": 7, "max_bad": 3, **FRAMES}
    for task in (6, 0, 1, 5):
        assert pack_shards(clips, str(tmp_path), task=task, **share) is None
    made = set(tmp_path.glob("*.tar"))
    assert pack_shards(clips, str(tmp_path), max_bad=3, **FRAMES) is not None
    assert contents(tmp_path) == contents(undisturbed)
    assert made < set(tmp_path.glob("*.tar"))
    with pytest.raises(ValueError, match=r"task=7 must be from 0 to 6"):
        pack_shards(clips, str(tmp_path), task=7, **share)


def test_the_budget_counts_all_tasks(
    bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path
) -> None:
    clips, undisturbed = bad_clips_packed
    share: dict[str, Any] = {"num_tasks": 2, "max_bad": 2, **FRAMES}
    assert pack_shards(clips, str(tmp_path), task=1, **share | {"max_bad": 3}) is None
    with pytest.raises(TooManyBadSamples, match=r"3 bad samples .* max_bad=2 .*c07: unreadable"):
        pack_shards(clips, str(tmp_path), task=0, **share)
    assert not (tmp_path / "manifest.json").exists()
    assert pack_shards(clips, str(tmp_path), task=0, **share | {"max_bad": 3}) is not None
    assert contents(tmp_path) == contents(undisturbed)


def test_the_budget_ends_a_task_that_others_spent_it_for(tmp_path: Path) -> None:
    clips = some_bad_clips(tmp_path)
    url = str(tmp_path / "data")
    share: dict[str, Any] = {"num_tasks": 2, "max_bad": 2, **FRAMES}
    others: list[object] = []

    def others_pack(progress: PackProgress) -> None:
        if progress.num_done == 2 and not others:  # in the first of three shards
            others.append(0)
            pack_shards(clips, url, task=1, **share | {"max_bad": 3})

    with pytest.raises(TooManyBadSamples, match="3 bad samples"):
        pack_shards(clips, url, task=0, on_progress=others_pack, **share)
    tars = {path.name for path in (tmp_path / "data").glob("*.tar")}
    assert tars == {"shard-000000.tar", "shard-000003.tar"}


def test_another_packing_in_the_folder_is_refused_and_named(tmp_path: Path) -> None:
    clips = some_bad_clips(tmp_path)
    url = str(tmp_path / "data")
    with pytest.raises(TooManyBadSamples):
        pack_shards(clips, url, **FRAMES)
    before = contents(tmp_path / "data")
    assert {"shard-000000.tar", ".packing/plan.json"} <= set(before)
    for change, message in (
        ({"num_frames": 4}, r"\(num_frames was 3, is 4\); pack to another folder, .*--overwrite"),
        ({"samples_per_shard": 3, "short_side": 8}, "short_side was None, is 8; samples_per_shard"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_shards(clips, url, max_bad=9, **FRAMES | change)
    recaptioned = [*clips[:-1], replace(clips[-1], captions=("other",))]
    with pytest.raises(ValueError, match=r"the clips' keys, paths, captions, cuts.* differ"):
        pack_shards(recaptioned, url, max_bad=9, **FRAMES)
    assert contents(tmp_path / "data") == before
    pack_shards(recaptioned, url, max_bad=9, overwrite=True, **FRAMES)
    pack_shards(recaptioned, str(tmp_path / "fresh"), max_bad=9, **FRAMES)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    clips = some_bad_clips(tmp_path)
    with pytest.raises(TooManyBadSamples):
        pack_shards(clips, str(tmp_path / "data"), layout="frames")
    assert contents(tmp_path / "data") == {}
    assert pack_shards(clips, str(tmp_path / "data"), layout="video", max_bad=3) is not None


def test_an_overwritten_data_set_is_whole_at_every_moment(tmp_path: Path) -> None:
    """The same clips and settings too: their sources may have changed."""
    clips = write_clips(tmp_path, 6)
    url = str(tmp_path / "data")
    pack_shards(clips, url, **FRAMES)
    Path(clips[0].video).write_bytes(numbered_video(4, first=77, bframes=0))
    read: list[int] = []

    def look(progress: PackProgress) -> None:
        assert verify_dataset(url).problems == ()
        read.append(numbers_of(url, "c00")[0])

    # Ended in the middle, it goes on with --overwrite as well.
    with pytest.raises(KeyboardInterrupt):
        pack_shards(
            clips,
            url,
            overwrite=True,
            on_progress=lambda progress: interrupt() if progress.num_done == 3 else None,
            **FRAMES,
        )
    told: list[PackProgress] = []

    def look_and_note(progress: PackProgress) -> None:
        look(progress)
        told.append(progress)

    manifest = pack_shards(clips, url, overwrite=True, on_progress=look_and_note, **FRAMES)
    assert manifest is not None
    assert told[0].num_done == 2
    look(told[-1])
    assert read[-1] == 77
    assert set(read[:-1]) == {0}
    assert manifest.generation == 1
    assert sorted(contents(tmp_path / "data")) == [
        *("bad.jsonl", "manifest.json", "samples-1.npz"),
        *(f"shard-1-00000{number}.tar" for number in range(3)),
    ]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_packers_side_by_side(bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path) -> None:
    """The same packing several times at once, without and with tasks: nothing but its bytes."""
    clips, undisturbed = bad_clips_packed
    shares = [{}, {}, {"num_tasks": 2, "task": 0}, {"num_tasks": 2, "task": 1}]
    for attempt in range(4):
        url = str(tmp_path / str(attempt))

        def run(share: dict[str, int], url: str = url) -> object:
            return pack_shards(clips, url, max_bad=3, **share, **FRAMES)

        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(run, shares))  # raises what they raised
        assert contents(Path(url)) == contents(undisturbed)


def test_published_by_another(
    bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes last finds its partial file removed, though the plan of the packing still lies."""
    clips, undisturbed = bad_clips_packed
    url = str(tmp_path / "data")

    def overtaken(url: str, manifest: Manifest) -> None:
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(OutputDir, "_remove_work", lambda _: None)
            pack_shards(clips, url, max_bad=3, **FRAMES)
        raise FileNotFoundError("samples.npz.partial")

    monkeypatch.setattr(output_dir, "write_manifest", overtaken)
    manifest = pack_shards(clips, url, max_bad=3, **FRAMES)
    assert manifest.samples.num_captions.sum() == manifest.num_captions
    pack_shards(clips, url, max_bad=3, **FRAMES)
    assert contents(Path(url)) == contents(undisturbed)


def test_lost_on_the_way(
    bad_clips_packed: tuple[list[Clip], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody published: a file that is gone is an error."""

    def lost(url: str, manifest: Manifest) -> None:
        raise FileNotFoundError("samples.npz.partial")

    monkeypatch.setattr(output_dir, "write_manifest", lost)
    with pytest.raises(FileNotFoundError, match=r"samples\.npz"):
        pack_shards(bad_clips_packed[0], str(tmp_path / "data"), max_bad=3, **FRAMES)


# The command itself, and processes that die.


def annotate(folder: Path, num_clips: int) -> Path:
    """An annotation file of long clips; every eleventh is bad."""
    video = numbered_video(250)
    lines = []
    for index in range(num_clips):
        name = f"v{index:02d}.mp4"
        (folder / name).write_bytes(b"garbage" if index % 11 == 5 else video)
        lines.append(json.dumps({"video": name, "caption": f"clip {index}", "video_id": "v"}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder / "a.jsonl"


def command(annotations: Path, out: Path, *more: str) -> list[str]:
    settings = ["--layout", "frames", "--num-frames", "4", "--samples-per-shard", "4"]
    places = ["--annotations", str(annotations), "--out", str(out), "--max-bad", "11"]
    return [sys.executable, "-m", "tvr.launchers.cli", "pack", *places, *settings, *more]


@contextmanager
def started(line: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
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
    """Starts packing and kills it that long after it completed so many more shards."""
    before = num_records(out)
    with started(line) as process:
        wait_for(lambda: num_records(out) >= before + num_new, f"{num_new} more shards")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # the fork server and two packing processes, at least
        time.sleep(delay_s)
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # The others end by themselves.
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []


def test_killed_twice_and_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = annotate(tmp_path, 120)
    chance = random.Random(5)
    line = command(annotations, tmp_path / "data", "--processes", "2")
    kill_after(line, tmp_path / "data", 2, chance.uniform(0, 0.1), group=False)
    kill_after(line, tmp_path / "data", 3, chance.uniform(0, 0.1), group=True)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert cli.pack(line[4:]) == 0
    assert "packed 109 clips with 109 captions into 30 shards" in capsys.readouterr().out
    assert cli.pack(command(annotations, tmp_path / "one", "--processes", "1")[4:]) == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "one")
    assert verify_dataset(str(tmp_path / "data")).problems == ()


def test_a_killed_task_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = annotate(tmp_path, 64)
    second = command(annotations, tmp_path / "data", "--processes", "2", "--task", "1/2")
    kill_after(second, tmp_path / "data", 1, 0.02, group=True)
    first = command(annotations, tmp_path / "data", "--processes", "1", "--task", "0/2")
    assert cli.pack(first[4:]) == 0
    assert capsys.readouterr().out.startswith("task 0/2 packed its shards; the last task completes the data set")
    assert cli.pack(second[4:]) == 0
    assert "packed 58 clips" in capsys.readouterr().out
    assert cli.pack(command(annotations, tmp_path / "one", "--processes", "1")[4:]) == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "one")
    assert cli.pack(command(annotations, tmp_path / "data", "--task", "2/2")[4:]) == 2
    assert "task='2/2' must be i/n with 0 <= i < n" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path) -> None:
    annotations = annotate(tmp_path, 12)
    line = command(annotations, tmp_path / "data", "--processes", "1")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tvr pack: error: [Errno 27] File too large")
    assert contents(tmp_path / "data") == {}
    assert cli.pack(line[4:]) == 0
    assert verify_dataset(str(tmp_path / "data")).problems == ()
    assert min(path.stat().st_size for path in (tmp_path / "data").glob("*.tar")) > 20_000


def kill_client(store: HttpStorage, number: signal.Signals, killed: list[int]) -> None:
    """Sends a signal to the packing process that is connected to the store."""
    port = int(store.url.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        if port in {other.raddr.port for other in process.net_connections() if other.raddr}:
            killed.append(process.pid)
            os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGSEGV, 2), (signal.SIGKILL, 2), (signal.SIGKILL, 1)]
)
def test_a_clip_whose_process_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals, times: int
) -> None:
    """Some first processes that read c04 get a signal while they do."""
    clips = write_clips(tmp_path, 7)
    killed: list[int] = []
    url = str(tmp_path / "data")

    def fails(count: int) -> bool:
        if count <= times:
            kill_client(store, number, killed)
        return False

    with serve_folder(tmp_path) as store:
        store.fails = fails
        clips[4] = replace(clips[4], video=f"{store.url}/c04.mp4")
        if (number, times) == (signal.SIGKILL, 2):
            with pytest.raises(
                ChildProcessError, match=r"ended with SIGKILL while it packed c04 \(.*--processes"
            ):
                pack_shards(clips, url, max_bad=1, processes=2, **FRAMES)
            assert num_records(tmp_path / "data") == 2
            assert not (tmp_path / "data" / "manifest.json").exists()
        manifest = pack_shards(clips, url, max_bad=1, processes=2, **FRAMES)
    assert len(set(killed)) == times
    assert f"a packing process ended with {number.name} while it packed c04" in caplog.text
    assert manifest is not None
    assert len(store.requests) == 2 if number == signal.SIGSEGV else times + 1
    if number == signal.SIGSEGV:
        assert manifest.samples.key.tolist() == [f"c{i:02d}" for i in (0, 1, 2, 3, 5, 6)]
        (bad,) = map(json.loads, (tmp_path / "data" / "bad.jsonl").read_text().splitlines())
        assert (bad["key"], bad["reason"]) == ("c04", "unreadable")
        assert bad["detail"].startswith("the decoder crashed twice with SIGSEGV [")
    else:
        assert (manifest.num_samples, manifest.bad) == (7, {})


def test_a_fault_in_the_code_ends_packing_with_its_traceback(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 5)
    clips[3] = replace(clips[3], captions=(7,))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"(?s)packing c03 .*Traceback.*in pack_clip.*TypeError"):
        pack_shards(clips, str(tmp_path / "data"), processes=2, **FRAMES)


def test_a_source_that_fails_for_a_moment_is_asked_again(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 4)
    with serve_folder(tmp_path) as store:
        remote = [replace(clip, video=f"{store.url}/{Path(clip.video).name}") for clip in clips]
        store.fails = lambda number: number in (1, 3)
        pack_shards(remote, str(tmp_path / "data"), processes=2, **FRAMES)
        assert len(store.requests) == 6
        store.fails = lambda number: store.requests[-1] == "c02.mp4"
        store.status = 400  # for good
        manifest = pack_shards(
            remote, str(tmp_path / "other"), processes=2, max_bad=2, layout="video"
        )
    assert manifest is not None
    assert manifest.bad == {"read_error": 1}
    assert read_manifest(str(tmp_path / "data")).num_samples == 4


def test_memory_is_for_one_process(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 2)
    with pytest.raises(ValueError, match=r"processes=2 must be 1 \(--processes 1\) with memory://"):
        pack_shards(clips, "memory://two", processes=2, **FRAMES)
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        pack_shards(clips, str(tmp_path / "data"), processes=0, **FRAMES)


# Progress.


def test_lines_for_a_log_and_a_bar_for_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(at_s: dict[int, float]) -> str:
        now = iter(at_s.values())
        with show_progress("packing", clock=lambda: next(now)) as on_progress:
            for num_done in at_s:
                num_bytes = 50_000 * (num_done - 2_000)
                on_progress(PackProgress(num_done=num_done, num_clips=4_000, num_bytes=num_bytes))
        return capsys.readouterr().err

    # 2,000 clips were there before.
    lines = show({2_000: 100.0, 2_010: 129.0, 2_300: 130.0, 2_310: 159.0, 2_600: 160.0})
    assert lines.splitlines() == [
        "packing: 2,300 of 4,000 clips, 10.0 clips/s, 0.5 MB/s, 0:02:50 left",
        "packing: 2,600 of 4,000 clips, 10.0 clips/s, 0.5 MB/s, 0:02:20 left",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    bar = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show({2_000: 100.0, 2_600: 160.0}))
    assert re.search(r"packing \S+ 2600/4000 10\.0 clips/s, 0\.5 MB/s", bar)


# Cuts.


def test_a_cut_is_packed_in_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(numbered_video(40))  # 10 frames a second
    whole = Clip(key="w", video=str(tmp_path / "v.mp4"), captions=("x",), video_id="v")
    clips = [
        whole,
        replace(whole, key="a", start_s=1.0, end_s=2.0),
        replace(whole, key="b", start_s=3.5),
        replace(whole, key="late", start_s=9.0),
    ]
    for settings in (
        {"layout": "frames", "num_frames": 5, "jpeg_quality": 95},
        {"layout": "video", "reencode": True},
    ):
        url = str(tmp_path / str(settings["layout"]))
        manifest = pack_shards(clips, url, max_bad=1, **settings)  # type: ignore[arg-type]
        assert manifest is not None
        assert manifest.samples.key.tolist() == ["w", "a", "b"]
        assert manifest.bad == {"no_frames": 1}
        assert len(set(manifest.samples.content.tolist())) == 3
        numbers = {key: numbers_of(url, key) for key in ("w", "a", "b")}
        assert numbers == {
            "w": [4, 12, 20, 28, 36],
            "a": [11, 13, 15, 17, 19],
            "b": [35, 36, 37, 38, 39],
        }
    with pytest.raises(ValueError, match=r"clip 'a' is cut .* needs reencode=True \(--reencode\)"):
        pack_shards(clips, str(tmp_path / "copy"), layout="video")
    bad = replace(whole, start_s=2.0, end_s=1.0)
    with pytest.raises(ValueError, match=r"span=\(2.0, 1.0\) must be"):
        pack_shards([bad], str(tmp_path / "copy"), layout="frames")
