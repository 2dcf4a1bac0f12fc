"""Reads of a video with and without its stored frame index, and as earlier releases read it.

    .venv/bin/python tests/benchmarks/video_index.py --lengths 300 9000 --json out.json

Each read samples 12 frames at random places of their segments. The three ways take turns on one
video, so that other load of the machine affects all of them alike; ratios are of medians. `before`
lists all packets and computes the time of every frame twice, as releases with format version 2 did.
`reencoded` are the same frames as `tvr pack --reencode` writes them: with x264's tune `fastdecode`
and a stored index now, with neither before.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

BENCHMARKS = Path(__file__).resolve().parent
FRAMES = 12


def main() -> None:
    """Measures, prints the numbers, and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 9000])
    parser.add_argument("--intervals", type=int, nargs="+", default=[16, 250])
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--reads", type=int, default=20)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = [
        measured(length, interval, arguments.size, arguments.reads)
        for length in arguments.lengths
        for interval in arguments.intervals
    ]
    versions = {"python": platform.python_version(), "av": version("av"), "numpy": np.__version__}
    result = {"benchmark": "video index", "versions": versions, "frames_read": FRAMES, "rows": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


def measured(length: int, interval: int, size: int, reads: int) -> dict[str, Any]:
    """Times the three ways for a clip of `length` frames; returns milliseconds and ratios."""
    sys.path.insert(0, str(BENCHMARKS))
    from tvr_bench.data_sources import DataBenchSizes, write_clip

    from tvr.data_prep.video.decode import sample_frames
    from tvr.data_prep.video.frame_index import index_packets
    from tvr.data_prep.video.stored_index import INDEX_MEMBER, decode_index, index_member

    sizes = DataBenchSizes(
        **dict.fromkeys(("clips", "batch", "workers", "epochs", "repeats"), 1),
        frames=FRAMES,
        size=size,
        clip_frames=length,
        keyframe_interval=interval,
    )
    with tempfile.TemporaryDirectory() as folder:

        def clip(**options: str) -> bytes:
            write_clip(Path(folder) / "clip.mp4", 0, sizes, options=options)
            return (Path(folder) / "clip.mp4").read_bytes()

        video = clip()
        reencoded = {"preset": "fast", "crf": "20", "g": "16"}
        plain, tuned = clip(**reencoded), clip(**reencoded, tune="fastdecode")
    member, tuned_member = (index_member(x, "clip")[INDEX_MEMBER] for x in (video, tuned))
    draws = np.random.default_rng(0)

    def before(video: bytes, offsets: list[float]) -> None:
        index = index_packets(video, "clip")
        assert index.times_s == index.times_s
        # The packets are listed once more, and the listing's time is taken off below.
        sample_frames(video, FRAMES, offsets=offsets)

    def stored(video: bytes, member: bytes, offsets: list[float]) -> None:
        index = decode_index(member, len(video), "clip")
        sample_frames(video, FRAMES, offsets=offsets, frame_index=index)

    ways: dict[str, Callable[[list[float]], object]] = {
        "before": partial(before, video),
        "without": lambda offsets: sample_frames(video, FRAMES, offsets=offsets),
        "stored": partial(stored, video, member),
        "listing": lambda offsets: index_packets(video, "clip"),
        "reencoded before": partial(before, plain),
        "reencoded": partial(stored, tuned, tuned_member),
        "reencoded listing": lambda offsets: index_packets(plain, "clip"),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(reads):
        offsets = draws.random(FRAMES).tolist()
        for name, way in ways.items():
            start = time.perf_counter()
            way(offsets)
            spent[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: median(values) for name, values in spent.items()}
    ms["before"] -= ms["listing"]
    ms["reencoded before"] -= ms["reencoded listing"]
    return {
        "clip_frames": length,
        "keyframe_interval": interval,
        "size": size,
        "video_bytes": len(video),
        "index_bytes": len(member),
        "before_ms": round(ms["before"], 2),
        "without_index_ms": round(ms["without"], 2),
        "stored_index_ms": round(ms["stored"], 2),
        "to_before": round(ms["before"] / ms["stored"], 2),
        "to_without_index": round(ms["without"] / ms["stored"], 2),
        "reencoded_bytes_before": len(plain),
        "reencoded_bytes": len(tuned),
        "reencoded_before_ms": round(ms["reencoded before"], 2),
        "reencoded_ms": round(ms["reencoded"], 2),
        "to_reencoded_before": round(ms["reencoded before"] / ms["reencoded"], 2),
    }


if __name__ == "__main__":
    main()
