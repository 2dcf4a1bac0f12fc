"""What planning a packing of N clips costs, and what a task of it costs once the plan is stored.

    python tests/benchmarks/pack_plan.py --rows 10000000 --planned-rows 10000000 --out plan.json

Two parts, each in a process of its own, whose peak memory it reports:

- planning reads a synthetic annotation file of `--planned-rows` rows, orders the clips and counts
  their words;
- task 3/64 of `--rows` clips joins the stored plan, reads its index and its first shard (its
  start), then the clips of all its shards. If `--rows` is more than was planned, the benchmark
  writes the plan's two files itself, in the plan's format, with a vocabulary of `--words` forms.

Sizes are in bytes, and times of the processor besides those of the clock, since the machine may be
busy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.plan import PackSettings, PlanHeader, plan_record, record_fingerprint
from tvr.data_prep.packing.plan_build import BuiltPlan, build_plan
from tvr.data_prep.packing.words import WordTagger
from tvr.launchers.host_limits import host_cpus

SETTINGS = PackSettings(
    layout="frames",
    num_frames=12,
    short_side=256,
    jpeg_quality=90,
    samples_per_shard=1000,
    reencode=False,
    keyframe_interval=16,
    words=True,
    shuffle_seed=0,
)
TASK, NUM_TASKS = 3, 64
OBJECT_BYTES = 941
"""A clip as a Python object, as each task held all of them before plans were stored."""


def video_of(row: int) -> str:
    return f"https://host/videos/{row % 997:03d}/{row:09d}.mp4"


def caption_of(row: int) -> str:
    return f"a person number {row % 50_000} does something with a thing for quite a while"


def write_annotations(path: Path, num_rows: int) -> None:
    with path.open("w", buffering=1 << 20) as file:
        for row in range(num_rows):
            file.write(f'{{"video": "{video_of(row)}", "caption": "{caption_of(row)}"}}\n')


def write_plan(folder: Path, num_rows: int, num_words: int) -> BuiltPlan:
    """Writes the files of a plan as `build_plan` would, without its work."""
    per_shard, offsets, crc32s = SETTINGS.samples_per_shard, [0], []
    with (folder / "rows.jsonl").open("wb", buffering=1 << 20) as file:
        for start in range(0, num_rows, per_shard):
            lines = "".join(
                f'["{row:09d}", "{video_of(row)}", ["{caption_of(row)}"], "{row:09d}",'
                f' "/data/annotations.jsonl:{row}", 0.0, null]\n'
                for row in range(start, min(start + per_shard, num_rows))
            ).encode()
            file.write(lines)
            offsets.append(offsets[-1] + len(lines))
            crc32s.append(zlib.crc32(lines))
    hashes = np.sort(np.random.default_rng(0).integers(0, 2**63, num_words, dtype=np.uint64))
    firsts = np.append(np.arange(0, num_rows, per_shard), num_rows)
    parts = (firsts, np.array(offsets), np.array(crc32s), hashes, np.full(num_words, 3))
    index = np.concatenate([part.astype(np.uint64) for part in parts]).tobytes()
    (folder / "index.bin").write_bytes(index)
    record = plan_record(SETTINGS, num_rows, "written by the benchmark")
    header = PlanHeader(
        fingerprint=record_fingerprint(record),
        record=record,
        num_clips=num_rows,
        num_shards=len(crc32s),
        num_words=num_words,
        index_sha256=hashlib.sha256(index).hexdigest(),
        in_memory="",
    )
    return BuiltPlan(header=header, rows=folder / "rows.jsonl", index=folder / "index.bin")


def measure_planning(folder: Path, num_rows: int) -> dict[str, Any]:
    annotations = folder / "annotations.jsonl"
    write_annotations(annotations, num_rows)
    before, wall_s, cpu_s = peak_bytes(), time.perf_counter(), time.process_time()
    built = build_plan(AnnotationFile(str(annotations)), SETTINGS, folder)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    claim(folder, built)
    return {
        "rows": num_rows,
        "annotation_bytes": annotations.stat().st_size,
        "plan_bytes": built.rows.stat().st_size + built.index.stat().st_size,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "cpu_us_per_row": round(cpu_s / num_rows * 1e6, 1),
        "peak_bytes": peak_bytes(),
        "peak_bytes_per_row": round((peak_bytes() - before) / num_rows, 1),
    }


def claim(folder: Path, built: BuiltPlan) -> None:
    source = AnnotationFile(str(folder / "annotations.jsonl"))
    assert OutputDir(str(folder / "out")).claim(built, source.identity()) == "joined"


def measure_task(folder: Path, num_rows: int, num_words: int, write: bool) -> dict[str, Any]:
    if write:
        (folder / "annotations.jsonl").write_text("of the size that the plan names\n")
        sizes = [str(num_rows), str(num_words)]
        subprocess.run([sys.executable, __file__, "--write", str(folder), *sizes], check=True)
    before, wall_s, cpu_s = peak_bytes(), time.perf_counter(), time.process_time()
    output = OutputDir(str(folder / "out"))
    source = AnnotationFile(str(folder / "annotations.jsonl"))
    assert output.join(source.identity(), SETTINGS) == "joined"
    plan = output.open_plan(SETTINGS, folder)
    shards = plan.task_shards(TASK, NUM_TASKS)
    tagger = WordTagger(plan.word_counts())
    clips = plan.shard_clips(shards[0])
    tagger.tag(clips[0].captions)
    start_wall_s, start_cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    num_clips = sum(len(plan.shard_clips(number)) for number in shards)
    return {
        "rows": num_rows,
        "plan": "written by the benchmark" if write else "planned",
        "words": plan.header.num_words,
        "clips": num_clips,
        "start_wall_s": round(start_wall_s, 2),
        "start_cpu_s": round(start_cpu_s, 2),
        "all_clips_cpu_s": round(time.process_time() - cpu_s - start_cpu_s, 2),
        "peak_bytes": peak_bytes(),
        "peak_bytes_above_imports": peak_bytes() - before,
        "objects_before_bytes": OBJECT_BYTES * num_rows,
        "peak_over_objects": round(peak_bytes() / (OBJECT_BYTES * num_rows), 4),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        folder, num_rows, num_words = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
        claim(folder, write_plan(folder, num_rows, num_words))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--planned-rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=3_000_000)
    parser.add_argument("--part", choices=("planning", "task"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file of the JSON report")
    arguments = parser.parse_args()
    write = arguments.rows > arguments.planned_rows
    if arguments.part == "planning":
        print(json.dumps(measure_planning(arguments.folder, arguments.planned_rows)))
        return
    if arguments.part == "task":
        rows = arguments.rows if write else arguments.planned_rows
        print(json.dumps(measure_task(arguments.folder, rows, arguments.words, write)))
        return
    with tempfile.TemporaryDirectory(prefix="pack-plan-") as name:
        parts = {}
        for part in ("planning", "task"):
            folder = Path(name) / (part if write else "both")
            folder.mkdir(exist_ok=True)
            command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
            command += ["--rows", str(arguments.rows), "--words", str(arguments.words)]
            command += ["--planned-rows", str(arguments.planned_rows)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            parts[part] = json.loads(done.stdout)
    report = {
        **parts,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "cpus": host_cpus().usable,
        "load": [round(value, 1) for value in os.getloadavg()],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
