"""The stored plan of a packing: order, one reading of the annotations, memory, requeued tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from builders.clip_files import file_contents, numbered_video, pack_settings, write_clips
from builders.http_store import serve_folder

from tvr.data_prep import cli
from tvr.data_prep.annotations import clip_source
from tvr.data_prep.annotations.clip_source import AnnotationFile, ClipList
from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.packing import planning, shard_records, worker_pool
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.output_files import OutputFiles
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.plan import PackPlan
from tvr.data_prep.packing.plan_build import build_plan
from tvr.data_prep.packing.planning import PlanLease, PlannedElsewhere
from tvr.data_prep.packing.word_counts import WordCounter
from tvr.data_prep.packing.words import WordTagger
from tvr.data_prep.records import Clip, TooManyBadSamples

FRAMES: dict[str, Any] = {"layout": "frames", "num_frames": 2, "samples_per_shard": 2}


def planned(source: Any, folder: Path, **changes: Any) -> PackPlan:
    """Plans a source and reads the plan back."""
    folder.mkdir(parents=True, exist_ok=True)
    used = pack_settings(**changes)
    built = build_plan(source, used, folder)
    rows = built.rows.read_bytes()
    return PackPlan(built.header, used, built.index.read_bytes(), lambda a, b: rows[a:b], folder)


def shards(plan: PackPlan) -> list[list[str]]:
    """Returns the keys of each shard."""
    return [[clip.key for clip in plan.shard_clips(n)] for n in range(plan.num_shards)]


def flat(lists: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(lists))


def clips_of(*videos: str) -> list[Clip]:
    """Returns one clip a name; clips of one video are cuts of it."""
    seen: Counter[str] = Counter()
    clips = []
    for index, video in enumerate(videos):
        start_s = float(seen[video])
        seen[video] += 1
        clips.append(
            Clip(
                key=f"k{index:03d}",
                video=f"{video}.mp4",
                captions=(f"caption {index}",),
                video_id=video,
                origin=f"a.jsonl:{index}",
                start_s=start_s,
                end_s=start_s + 1,
            )
        )
    return clips


def test_none_keeps_the_order_and_a_seed_draws_another(tmp_path: Path) -> None:
    clips = clips_of(*(f"v{n}" for n in range(30)))
    kept = planned(ClipList(clips), tmp_path / "kept")
    assert [clip for n in range(kept.num_shards) for clip in kept.shard_clips(n)] == clips
    assert [kept.shard_size(n) for n in range(kept.num_shards)] == [4] * 7 + [2]
    drawn = [
        flat(shards(planned(ClipList(clips), tmp_path / str(n), shuffle_seed=seed)))
        for n, seed in enumerate((0, 0, 1))
    ]
    keys = [clip.key for clip in clips]
    assert drawn[0] == drawn[1]
    assert all(sorted(order) == keys and order != keys for order in drawn)
    assert drawn[0] != drawn[2]
    # No shard is a run of neighbours of the list.
    numbers = [int(key[1:]) for key in drawn[0]]
    assert sum(abs(a - b) == 1 for a, b in pairwise(numbers)) < 8


def test_cuts_of_one_video_lie_together_in_one_shard(tmp_path: Path) -> None:
    videos = [f"v{n % 7}" for n in range(21)] + ["film"] * 9
    clips = clips_of(*videos)
    video_of = {clip.key: clip.video for clip in clips}
    found = shards(planned(ClipList(clips), tmp_path, shuffle_seed=3))
    assert sorted(flat(found)) == [clip.key for clip in clips]
    assert max(map(len, found)) == 4
    runs = [
        [
            video_of[key]
            for n, key in enumerate(shard)
            if n == 0 or video_of[shard[n - 1]] != video_of[key]
        ]
        for shard in found
    ]
    places = Counter(video for shard in runs for video in shard)
    # Only the film has more cuts than a shard has clips.
    assert places.pop("film.mp4") == 3
    assert set(places.values()) == {1}
    cuts = [key for shard in found for key in shard if video_of[key] == "v3.mp4"]
    assert cuts == sorted(cuts)


def test_rows_of_a_clip_that_lie_apart_are_merged(tmp_path: Path) -> None:
    lines = ["video,caption"]
    lines += [f"v{n % 5}.mp4,caption {n}" for n in range(20)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    expected = read_annotations(str(path))
    plan = planned(AnnotationFile(str(path)), tmp_path / "plan", words=True)
    found = [clip for n in range(plan.num_shards) for clip in plan.shard_clips(n)]
    assert found == expected
    assert {len(clip.captions) for clip in found} == {4}
    counts, tagger = plan.word_counts(), WordTagger(expected)
    assert (counts.num_clips, counts["caption"], counts["7"], counts["none"]) == (5, 5, 1, 0)
    assert WordTagger(counts).tag(found[0].captions) == tagger.tag(found[0].captions)
    shuffled = planned(AnnotationFile(str(path)), tmp_path / "other", shuffle_seed=0)
    found = [clip for n in range(shuffled.num_shards) for clip in shuffled.shard_clips(n)]
    assert sorted(found, key=lambda clip: clip.key) == expected


def test_the_first_conflict_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"video": f"v{n}.mp4", "caption": "x", "key": f"k{n % 6}"} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TooManyBadSamples, match=r"first: \S+:7: duplicate key 'k0', first at"):
        planned(AnnotationFile(str(path)), tmp_path / "plan")
    # A row with a path and one with a name to look up are two clips.
    write_clips(tmp_path, 1)
    path.write_text('{"video": "c00.mp4", "caption": "x"}\n{"clip_name": "c00", "caption": "y"}')
    with pytest.raises(TooManyBadSamples, match=r"a\.jsonl:2: duplicate key 'c00'"):
        planned(AnnotationFile(str(path)), tmp_path / "plan")
    csv = tmp_path / "a.csv"
    csv.write_text("video,caption,video_id\nv.mp4,x,a\nw.mp4,x,b\nv.mp4,y,c\n")
    with pytest.raises(TooManyBadSamples, match=r"a\.csv:4: video_id='c' differs from 'a' of the"):
        planned(AnnotationFile(str(csv)), tmp_path / "plan")


def test_counts_of_words_are_merged_across_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvr.data_prep.packing.word_counts.BUFFER_HASHES", 3)
    monkeypatch.setattr("tvr.data_prep.packing.word_counts.KEPT_HASHES", 2)
    counter, expected = WordCounter(), Counter[str]()
    for n in range(50):
        forms = {f"w{n % 3}", f"w{n % 11}", f"only{n}"}
        counter.add([*forms, *forms])
        expected.update(forms)
    counts = counter.finish()
    assert counts.num_clips == 50
    assert {form: counts[form] for form in expected} == dict(expected)


MEASURE = """
import json, resource, sys
from pathlib import Path
from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.packing.plan import PackPlan, PackSettings
from tvr.data_prep.packing.plan_build import build_plan

folder, peaks = Path(sys.argv[1]), []
for num_rows in (5_000, 105_000):
    path = folder / f"{num_rows}.jsonl"
    with path.open("w") as file:
        for n in range(num_rows):
            row = {"video": f"https://host/videos/{n % 997}/{n:09d}.mp4"}
            row["caption"] = f"a person number {n % 5000} does something with a thing for a while"
            file.write(json.dumps(row) + "\\n")
    settings = PackSettings(
        layout="frames", num_frames=2, short_side=None, jpeg_quality=90, samples_per_shard=1000,
        reencode=False, keyframe_interval=16, words=False, shuffle_seed=0,
    )
    built = build_plan(AnnotationFile(str(path)), settings, folder)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

with built.rows.open("rb") as rows:
    def read_rows(start, end):
        rows.seek(start)
        return rows.read(end - start)

    plan = PackPlan(built.header, settings, built.index.read_bytes(), read_rows, folder)
    held = sum(len(plan.shard_clips(number)) for number in plan.task_shards(3, 8))
peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps({"peaks": peaks, "held": held}))
"""


def test_planning_holds_a_few_numbers_a_clip(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    few, many, with_task = measured["peaks"]
    assert measured["held"] == 13_000
    # A clip as a Python object takes 941 bytes. Pages of mapped files count here, too.
    assert (many - few) / 100_000 < 200
    assert with_task - many < 8 << 20


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    write_clips(tmp_path, 9)
    rows = [{"video": f"c{n:02d}.mp4", "caption": f"clip {n}"} for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


def pack_command(annotations: Path, out: Path, *more: str) -> list[str]:
    common = ["--annotations", str(annotations), "--out", str(out), "--layout", "frames"]
    sizes = ["--num-frames", "2", "--samples-per-shard", "2", "--processes", "1"]
    return [*common, *sizes, *more]


def test_only_the_task_that_plans_reads_the_annotations(
    annotations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.pack(pack_command(annotations, tmp_path / "alone")) == 0
    out = tmp_path / "data"
    assert cli.pack(pack_command(annotations, out, "--plan-only")) == 0
    assert "planned; pack the shards" in capsys.readouterr().out
    assert not list(out.glob("*.tar"))

    def read_again(*arguments: object, **more: object) -> None:
        raise AssertionError("the annotations are read again")

    monkeypatch.setattr(clip_source, "annotated_clips", read_again)
    for task in (2, 0, 1):
        assert cli.pack(pack_command(annotations, out, "--task", f"{task}/3")) == 0
    assert file_contents(out) == file_contents(tmp_path / "alone")
    keys = read_manifest(str(out)).samples.key.tolist()
    assert sorted(keys) == [f"c{n:02d}" for n in range(9)]
    assert keys != sorted(keys)


def test_a_changed_annotation_file_is_read_and_refused(annotations: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert cli.pack(pack_command(annotations, out, "--plan-only")) == 0
    unchanged = annotations.read_text()
    annotations.write_text(unchanged.replace("clip 3", "clip 33"))
    assert cli.pack(pack_command(annotations, out, "--task", "0/2")) == 2
    annotations.write_text(unchanged)  # another time, the same clips
    assert cli.pack(pack_command(annotations, out)) == 0


def test_tasks_wait_for_the_one_that_plans(
    annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second task reads nothing while the first one plans, and says what it waits for."""
    monkeypatch.setattr(planning, "BEAT_S", 0.01)
    monkeypatch.setattr("tvr.data_prep.packing.plan_build.REPORT_EVERY", 1)
    out, is_waiting, readers = tmp_path / "data", Event(), []
    read = clip_source.annotated_clips

    def read_slowly(url: str, **more: Any) -> Any:
        readers.append(url)
        for number, row in enumerate(read(url, **more)):
            Event().wait(0.02)  # beats between rows
            if number == 4:
                assert is_waiting.wait(60)
            yield row

    def on_plan(step: str, done: int) -> None:
        if step.startswith("waiting"):
            said.append((step, done))
            is_waiting.set()

    monkeypatch.setattr(clip_source, "annotated_clips", read_slowly)
    said: list[tuple[str, int]] = []

    def pack_task(task: int) -> object:
        source = AnnotationFile(str(annotations))
        share: dict[str, Any] = {"task": task, "num_tasks": 2, "on_plan": on_plan}
        return pack_shards(source, str(out), shuffle_seed=0, **share, **FRAMES)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pack_task, 0)
        lease = out / ".packing" / "planning.json"
        while not lease.exists() and not first.done():
            Event().wait(0.005)
        second = pool.submit(pack_task, 1)
        first.result(timeout=120)
        second.result(timeout=120)
    assert len(readers) == 1
    assert said[0][0] == "waiting for the task that plans:"
    assert verify_dataset(str(out)).problems == ()


def test_a_lease_whose_owner_ended_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = OutputFiles(str(tmp_path))
    files.write("note", b'{"owner": "dead", "clips": 7}')
    said: list[int] = []
    now = iter(range(0, 1000, 10))
    lease = PlanLease(files, "note", sleep=lambda s: None, now=lambda: float(next(now)))
    assert lease.wait(lambda: False, lambda step, done: said.append(done)) is False
    assert said == [7] * planning.STALE_LOOKS
    lease.beat(1)
    files.write("note", b'{"owner": "other", "clips": 9}')
    with pytest.raises(PlannedElsewhere):
        lease.beat(2)
    assert lease.wait(lambda: True, lambda step, done: None) is True


def test_a_requeued_task_does_not_replace_what_its_launch_published(
    annotations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "data"
    assert cli.pack(pack_command(annotations, out)) == 0
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    tasks = [pack_command(annotations, out, "--overwrite", "--task", f"{n}/2") for n in range(2)]
    assert [cli.pack(task) for task in tasks] == [0, 0]
    before = file_contents(out)
    assert read_manifest(str(out)).generation == 1
    capsys.readouterr()
    assert [cli.pack(task) for task in tasks] == [0, 0]
    assert "packed 9 clips" in capsys.readouterr().out  # the task sees a complete data set
    assert file_contents(out) == before
    assert not (out / ".packing" / "plan.json").exists()
    # Another launch replaces the data set, and a late task of the first one leaves it alone.
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4712")
    assert [cli.pack(task) for task in tasks] == [0, 0]
    assert read_manifest(str(out)).generation == 2
    changed = tasks[0] + ["--num-frames", "1"]
    assert cli.pack(changed) == 0  # begins generation 3
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    assert cli.pack(tasks[0]) == 0
    assert json.loads((out / ".packing" / "plan.json").read_bytes())["generation"] == 3


def test_a_late_task_leaves_a_later_packing_alone(tmp_path: Path) -> None:
    """With clips in memory too, whose plan each task makes."""
    clips, url = write_clips(tmp_path, 4), str(tmp_path / "data")
    first: dict[str, Any] = {"num_tasks": 2, "overwrite": True, "packing_id": "first", **FRAMES}
    for task in (0, 1):
        pack_shards(clips, url, task=task, **first)
    later = first | {"packing_id": "later", "num_frames": 1}
    assert pack_shards(clips, url, task=1, **later) is None
    before = file_contents(tmp_path / "data")
    assert ".packing/plan.json" in before
    assert pack_shards(clips, url, task=0, **first) is not None
    assert file_contents(tmp_path / "data") == before
    # A lost file of the plan is written again by the next task.
    for path in (tmp_path / "data" / ".packing").glob("clips-*"):
        path.unlink()
    manifest = pack_shards(clips, url, task=0, **later)
    assert manifest is not None
    assert (manifest.num_frames, manifest.generation) == (1, 1)


def test_tasks_that_overwrite_need_the_name_of_their_launch(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 2)
    url = str(tmp_path / "data")
    with pytest.raises(ValueError, match=r"overwrite=True with num_tasks=2 .*--packing-id"):
        pack_shards(clips, url, overwrite=True, num_tasks=2, **FRAMES)
    assert not (tmp_path / "data").exists()
    share: dict[str, Any] = {"overwrite": True, "num_tasks": 2, "packing_id": "a"}
    for task in (0, 1, 0, 1):
        pack_shards(clips, url, task=task, **share, **FRAMES)
    assert read_manifest(url).generation == 0


def test_shards_are_split_by_bytes(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 7)
    whole = pack_shards(clips, str(tmp_path / "whole"), layout="video", samples_per_shard=5)
    assert whole is not None
    limit = int(whole.samples.length[:2].sum()) + 1024  # two samples and the end of a tar
    sizes: dict[str, Any] = {"layout": "video", "samples_per_shard": 5, "shard_bytes": limit}
    manifest = pack_shards(clips, str(tmp_path / "data"), **sizes)
    assert manifest is not None
    assert [shard.name for shard in manifest.shards] == [
        *("shard-000000.tar", "shard-000000-001.tar", "shard-000000-002.tar", "shard-000001.tar"),
    ]
    assert manifest.shard_sizes == (2, 2, 1, 2)
    assert max(shard.shard_bytes for shard in manifest.shards) <= limit
    assert manifest.samples.key.tolist() == whole.samples.key.tolist()
    assert verify_dataset(str(tmp_path / "data")).problems == ()
    # Interrupted in the second file of a shard, and by two tasks.
    url = str(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        pack_shards(clips, url, on_progress=interrupt_at(4), num_tasks=2, **sizes)
    for task in (1, 0):
        pack_shards(clips, url, task=task, num_tasks=2, **sizes)
    assert file_contents(tmp_path / "again") == file_contents(tmp_path / "data")
    small = pack_shards(clips, str(tmp_path / "small"), **sizes | {"shard_bytes": 1})
    assert small is not None
    assert small.shard_sizes == (1,) * 7
    for value in (0, 1 << 41):
        with pytest.raises(ValueError, match=f"shard_bytes={value} must be from 1"):
            pack_shards(clips, url, **sizes | {"shard_bytes": value})


def interrupt_at(num_done: int) -> Any:
    def on_progress(progress: Any) -> None:
        if progress.num_done == num_done:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize("processes", [1, 3])
def test_a_source_of_many_cuts_is_read_once(tmp_path: Path, processes: int) -> None:
    (tmp_path / "film.mp4").write_bytes(numbered_video(40))
    (tmp_path / "bad.mp4").write_bytes(b"garbage")
    with serve_folder(tmp_path) as storage:
        film = Clip(key="f", video=f"{storage.url}/film.mp4", captions=("x",), video_id="f")
        cuts = [replace(film, key=f"f{n:02d}", start_s=n / 4, end_s=n / 4 + 0.5) for n in range(12)]
        bad = [replace(cut, key=f"b{cut.key}", video=f"{storage.url}/bad.mp4") for cut in cuts[:3]]
        others = [*bad, *write_clips(tmp_path, 9)]
        mixed = [clip for pair in zip(cuts, others, strict=True) for clip in pair]
        share: dict[str, Any] = {"shuffle_seed": 0, "max_bad": 3, **FRAMES}
        manifest = pack_shards(
            mixed, str(tmp_path / "data"), processes=processes, **share | {"samples_per_shard": 24}
        )
        assert Counter(storage.requests) == {"film.mp4": 1, "bad.mp4": 1}
        apart = pack_shards(
            mixed, str(tmp_path / "apart"), layout="frames", num_frames=2, max_bad=3
        )
    assert manifest is not None
    assert apart is not None
    assert manifest.bad == apart.bad == {"unreadable": 3}
    contents = [
        dict(zip(each.samples.key.tolist(), each.samples.content.tolist(), strict=True))
        for each in (manifest, apart)
    ]
    assert contents[0] == contents[1]
    assert len(set(contents[0].values())) == 21
    assert verify_dataset(str(tmp_path / "data")).problems == ()


def test_a_limit_of_clips_done_ahead_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = write_clips(tmp_path, 6)
    cuts = [
        replace(clip, key=f"{clip.key}-{n}", start_s=n / 10, end_s=(n + 2) / 10)
        for clip in clips
        for n in range(3)
    ]
    pack_shards(cuts, str(tmp_path / "one"), **FRAMES)
    monkeypatch.setattr(worker_pool, "HELD_BYTES", 1)
    pack_shards(cuts, str(tmp_path / "three"), processes=3, **FRAMES)
    assert file_contents(tmp_path / "three") == file_contents(tmp_path / "one")


def test_a_task_reads_no_record_of_another_one_and_the_publisher_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, url = write_clips(tmp_path, 12), str(tmp_path / "data")
    Path(clips[4].video).write_bytes(b"garbage")  # in shard 2
    read: Counter[int] = Counter()
    decode = shard_records.decode_record

    def count(content: bytes, packing: str) -> Any:
        record = decode(content, packing)
        read[int(record.files[0].shard.name[6:12])] += 1
        return record

    monkeypatch.setattr(shard_records, "decode_record", count)
    share: dict[str, Any] = {"num_tasks": 3, "max_bad": 1, **FRAMES}
    for task in (2, 1):
        assert pack_shards(clips, url, task=task, **share) is None
    assert read == {2: 1}  # shard 2 is of task 2, and its name tells of a refused clip
    read.clear()
    assert pack_shards(clips, url, task=0, **share) is not None
    assert read == {1: 1, 2: 1, 4: 1, 5: 1}


def test_rows_beyond_the_limit_are_read_again_when_the_data_set_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = write_clips(tmp_path, 8)
    pack_shards(clips, str(tmp_path / "kept"), **FRAMES)
    monkeypatch.setattr(shard_records, "KEPT_ROWS", 2)
    kept: list[bool] = []
    rows = shard_records.ShardRecords.rows

    def note(self: shard_records.ShardRecords, names: Any) -> Any:
        kept.extend(
            file.samples is not None for each in self._records.values() for file in each.files
        )
        return rows(self, names)

    monkeypatch.setattr(shard_records.ShardRecords, "rows", note)
    manifest = pack_shards(clips, str(tmp_path / "read"), **FRAMES)
    assert (kept.count(True), kept.count(False)) == (1, 3)
    assert manifest is not None
    assert len(manifest.samples) == 8
    assert file_contents(tmp_path / "read") == file_contents(tmp_path / "kept")


def test_a_late_straggler_cannot_touch_a_later_packing(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 4)
    url = str(tmp_path / "data")
    for overwrite in (False, True):
        changed = [replace(clip, captions=(f"{overwrite}",)) for clip in clips]
        pack_shards(changed, url, num_tasks=2, overwrite=overwrite, packing_id="x", **FRAMES)
    names = {path.name for path in (tmp_path / "data").glob("*.tar")}
    assert names == {"shard-000000.tar", "shard-1-000000.tar"}
    straggler = OutputDir(url)
    built = build_plan(ClipList(changed), pack_settings(**FRAMES), tmp_path)
    assert straggler.claim(built, None) == "joined"
    assert straggler.generation == 1
