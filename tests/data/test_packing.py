"""Packing with any number of processes and tasks gives the same bytes."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import file_contents, numbered_video, read_number, write_clips

from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.packing import output_dir
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.pack import PackProgress, pack_shards
from tvr.data_prep.packing.progress import show_progress
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Clip, TooManyBadSamples
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.images import decode_jpeg

FRAMES: dict[str, Any] = {"layout": "frames", "num_frames": 3, "samples_per_shard": 2}


def shown_numbers(url: str, key: str) -> list[int]:
    """Returns the numbers that the frames of a packed clip show."""
    reader = SampleReader(url, num_frames=1, image_size=1)
    members = reader.members(reader.manifest.samples.key.tolist().index(key))
    if "mp4" in members:
        frames = list(sample_frames(members["mp4"], 5)[0])
    else:
        jpegs = sorted(name for name in members if name.endswith(".jpg"))
        frames = [decode_jpeg(members[name], key=key, member=name) for name in jpegs]
    return [read_number(frame) for frame in frames]


def some_bad_clips(folder: Path) -> list[Clip]:
    """Writes nine clips. With 2 clips a shard, shard 1 has only bad clips and shard 3 has one."""
    clips = write_clips(folder, 9)
    for index in (2, 7):
        Path(clips[index].video).write_bytes(b"garbage")
    Path(clips[3].video).unlink()
    return clips


@pytest.fixture(scope="module")
def undisturbed_packing(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Clip], Path]:
    """Clips, and the data set that one uninterrupted process packs from them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    clips = some_bad_clips(folder)
    pack_shards(clips, str(folder / "data"), max_bad=3, **FRAMES)
    return clips, folder / "data"


def test_bad_clips_are_left_out(undisturbed_packing: tuple[list[Clip], Path]) -> None:
    _, folder = undisturbed_packing
    manifest = read_manifest(str(folder))
    assert [shard.name for shard in manifest.shards] == [
        f"shard-{number:06d}.tar" for number in (0, 2, 3, 4)
    ]
    assert manifest.shard_sizes == (2, 2, 1, 1)
    assert manifest.samples.key.tolist() == ["c00", "c01", "c04", "c05", "c06", "c08"]
    assert manifest.samples.shard.tolist() == [0, 0, 1, 1, 2, 3]
    assert verify_dataset(str(folder)).problems == ()
    assert set(file_contents(folder)) == {
        *("bad.jsonl", "manifest.json", "samples.rows"),
        *(shard.name for shard in manifest.shards),
    }
    bad = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in bad] == [
        *(("c02", "unreadable"), ("c03", "missing_file"), ("c07", "unreadable")),
    ]


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_change_no_byte(
    undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path, processes: int
) -> None:
    clips, undisturbed = undisturbed_packing
    reported: list[PackProgress] = []
    pack_shards(
        clips,
        str(tmp_path),
        max_bad=3,
        processes=processes,
        on_progress=reported.append,
        **FRAMES,
    )
    assert file_contents(tmp_path) == file_contents(undisturbed)
    assert [progress.num_done for progress in reported] == list(range(10))
    assert reported[-1].num_clips == 9
    stored = sum(shard.shard_bytes - 1024 for shard in read_manifest(str(tmp_path)).shards)
    assert reported[-1].num_bytes == stored


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_tasks_end_in_any_order(
    undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path, order: tuple[int, ...]
) -> None:
    clips, undisturbed = undisturbed_packing

    def pack_task(task: int) -> bool:
        share = {"task": task, "num_tasks": 3, "max_bad": 3, **FRAMES}
        return pack_shards(clips, str(tmp_path), **share) is not None

    assert [pack_task(task) for task in order] == [False, False, True]
    assert file_contents(tmp_path) == file_contents(undisturbed)
    assert all(pack_task(task) for task in order)  # complete already
    assert file_contents(tmp_path) == file_contents(undisturbed)


def test_more_tasks_than_shards_and_a_last_call(
    undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path
) -> None:
    clips, undisturbed = undisturbed_packing
    share: dict[str, Any] = {"num_tasks": 7, "max_bad": 3, **FRAMES}
    for task in (6, 0, 1, 5):
        assert pack_shards(clips, str(tmp_path), task=task, **share) is None
    before = set(tmp_path.glob("*.tar"))
    assert pack_shards(clips, str(tmp_path), max_bad=3, **FRAMES) is not None
    assert file_contents(tmp_path) == file_contents(undisturbed)
    assert before < set(tmp_path.glob("*.tar"))
    with pytest.raises(ValueError, match=r"task=7 must be from 0 to 6"):
        pack_shards(clips, str(tmp_path), task=7, **share)


def test_the_budget_counts_all_tasks(
    undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path
) -> None:
    clips, undisturbed = undisturbed_packing
    share: dict[str, Any] = {"num_tasks": 2, "max_bad": 2, **FRAMES}
    assert pack_shards(clips, str(tmp_path), task=1, **share | {"max_bad": 3}) is None
    with pytest.raises(TooManyBadSamples, match=r"3 bad samples .* max_bad=2 .*c07: unreadable"):
        pack_shards(clips, str(tmp_path), task=0, **share)
    assert not (tmp_path / "manifest.json").exists()
    assert pack_shards(clips, str(tmp_path), task=0, **share | {"max_bad": 3}) is not None
    assert file_contents(tmp_path) == file_contents(undisturbed)


def test_bad_clips_of_other_tasks_end_a_task(tmp_path: Path) -> None:
    clips = some_bad_clips(tmp_path)
    url = str(tmp_path / "data")
    share: dict[str, Any] = {"num_tasks": 2, "max_bad": 2, **FRAMES}
    other_tasks: list[object] = []

    def pack_other_task(progress: PackProgress) -> None:
        if progress.num_done == 2 and not other_tasks:  # in the first of three shards
            other_tasks.append(0)
            pack_shards(clips, url, task=1, **share | {"max_bad": 3})

    with pytest.raises(TooManyBadSamples, match="3 bad samples"):
        pack_shards(clips, url, task=0, on_progress=pack_other_task, **share)
    tars = {path.name for path in (tmp_path / "data").glob("*.tar")}
    assert tars == {"shard-000000.tar", "shard-000003.tar"}


def test_an_unfinished_packing_with_another_plan_is_refused(tmp_path: Path) -> None:
    clips = some_bad_clips(tmp_path)
    url = str(tmp_path / "data")
    with pytest.raises(TooManyBadSamples):
        pack_shards(clips, url, **FRAMES)
    before = file_contents(tmp_path / "data")
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
    assert file_contents(tmp_path / "data") == before
    pack_shards(recaptioned, url, max_bad=9, overwrite=True, **FRAMES)
    pack_shards(recaptioned, str(tmp_path / "fresh"), max_bad=9, **FRAMES)
    # A straggler of the refused packing writes other names, so it cannot touch the new files.
    replaced, fresh = (file_contents(tmp_path / name) for name in ("data", "fresh"))
    tars = {name.replace("shard-1-", "shard-"): replaced[name] for name in replaced}
    assert {name for name in tars if name.endswith(".tar")} == {
        name for name in fresh if name.endswith(".tar")
    }
    assert all(tars[name] == fresh[name] for name in fresh if name.endswith(".tar"))
    assert read_manifest(url).generation == 1
    assert len(replaced) == len(fresh)


def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    clips = some_bad_clips(tmp_path)
    with pytest.raises(TooManyBadSamples):
        pack_shards(clips, str(tmp_path / "data"), layout="frames")
    assert file_contents(tmp_path / "data") == {}
    assert pack_shards(clips, str(tmp_path / "data"), layout="video", max_bad=3) is not None


def test_an_overwritten_data_set_stays_complete(tmp_path: Path) -> None:
    """Overwriting works with the same clips and settings too: the sources may have changed."""
    clips = write_clips(tmp_path, 6)
    url = str(tmp_path / "data")
    pack_shards(clips, url, **FRAMES)
    Path(clips[0].video).write_bytes(numbered_video(4, first=77, bframes=0))
    read: list[int] = []

    def check(progress: PackProgress) -> None:
        assert verify_dataset(url).problems == ()
        read.append(shown_numbers(url, "c00")[0])

    # An interrupted packing resumes with --overwrite too.
    with pytest.raises(KeyboardInterrupt):
        pack_shards(
            clips,
            url,
            overwrite=True,
            on_progress=lambda progress: interrupt() if progress.num_done == 3 else None,
            **FRAMES,
        )
    reported: list[PackProgress] = []

    def check_and_append(progress: PackProgress) -> None:
        check(progress)
        reported.append(progress)

    manifest = pack_shards(clips, url, overwrite=True, on_progress=check_and_append, **FRAMES)
    assert manifest is not None
    assert reported[0].num_done == 2
    check(reported[-1])
    assert read[-1] == 77
    assert set(read[:-1]) == {0}
    assert manifest.generation == 1
    assert sorted(file_contents(tmp_path / "data")) == [
        *("bad.jsonl", "manifest.json", "samples-1.rows"),
        *(f"shard-1-00000{number}.tar" for number in range(3)),
    ]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_concurrent_packings(undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path) -> None:
    """Concurrent packings of the same plan, with and without tasks, give the same bytes."""
    clips, undisturbed = undisturbed_packing
    shares = [{}, {}, {"num_tasks": 2, "task": 0}, {"num_tasks": 2, "task": 1}]
    for attempt in range(4):
        url = str(tmp_path / str(attempt))

        def pack_share(share: dict[str, int], url: str = url) -> object:
            return pack_shards(clips, url, max_bad=3, **share, **FRAMES)

        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(pack_share, shares))  # raises their exceptions
        assert file_contents(Path(url)) == file_contents(undisturbed)


def test_another_process_publishes_first(
    undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process removed this one's partial file, but not yet the plan."""
    clips, undisturbed = undisturbed_packing
    url = str(tmp_path / "data")

    def publish_by_another(*_: object) -> None:
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(OutputDir, "_remove_work", lambda _: None)
            pack_shards(clips, url, max_bad=3, **FRAMES)
        raise FileNotFoundError("samples.rows.partial")

    monkeypatch.setattr(output_dir, "write_manifest", publish_by_another)
    manifest = pack_shards(clips, url, max_bad=3, **FRAMES)
    assert manifest.samples.num_captions.sum() == manifest.num_captions
    pack_shards(clips, url, max_bad=3, **FRAMES)
    assert file_contents(Path(url)) == file_contents(undisturbed)


def test_a_lost_partial_file_is_an_error(
    undisturbed_packing: tuple[list[Clip], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file is an error if no other process has published the data set."""

    def lose_file(*_: object) -> None:
        raise FileNotFoundError("samples.rows.partial")

    monkeypatch.setattr(output_dir, "write_manifest", lose_file)
    with pytest.raises(FileNotFoundError, match=r"samples\.rows"):
        pack_shards(undisturbed_packing[0], str(tmp_path / "data"), max_bad=3, **FRAMES)


def test_memory_urls_need_one_process(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 2)
    with pytest.raises(ValueError, match=r"processes=2 must be 1 \(--processes 1\) with memory://"):
        pack_shards(clips, "memory://two", processes=2, **FRAMES)
    with pytest.raises(ValueError, match="processes=-1 must be at least 0"):
        pack_shards(clips, str(tmp_path / "data"), processes=-1, **FRAMES)


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

    # 2,000 clips were complete before.
    lines = show({2_000: 100.0, 2_010: 129.0, 2_300: 130.0, 2_310: 159.0, 2_600: 160.0})
    assert lines.splitlines() == [
        "packing: 2,300 of 4,000 clips, 10.0 clips/s, 0.5 MB/s, 0:02:50 left",
        "packing: 2,600 of 4,000 clips, 10.0 clips/s, 0.5 MB/s, 0:02:20 left",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    bar = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show({2_000: 100.0, 2_600: 160.0}))
    assert re.search(r"packing \S+ 2600/4000 10\.0 clips/s, 0\.5 MB/s", bar)


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
        numbers = {key: shown_numbers(url, key) for key in ("w", "a", "b")}
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
