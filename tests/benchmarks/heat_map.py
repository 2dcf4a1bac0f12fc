"""Share of queries whose word "circle" peaks on a frame with the circle, read from heat maps.

In the demo's clips both objects are in all frames, so that every frame would be right. Here test
scenes with a circle are rendered anew, with the circle in a part of the frames and the other object
in all of them. The model is that of `tvr demo`; it has seen none of these scenes.

Prints one line of JSON:
    tvr demo --out runs/demo
    heat_map.py runs/demo/run > tests/benchmarks/results/heat_map.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = "circle"
SHARES = (1.0, 1 / 2, 1 / 6)
TRAIN_CLIPS, TEST_CLIPS = 3000, 256  # as `tvr demo` by default: its test scenes are drawn here


def main() -> None:
    """Measures, and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run of `tvr demo`")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tvr_bench.harness import machine, versions

    from tvr.data_prep.demo_clips import demo_scenes
    from tvr.trainer.demo import SCENES_SEED
    from tvr.trainer.evaluation.model_source import load_source

    source = load_source(options.run)
    scenes = demo_scenes(TRAIN_CLIPS, TEST_CLIPS, SCENES_SEED)["test"]
    line = {
        "benchmark": f"the word {SHAPE!r} peaks on a frame with the {SHAPE}, in % of the queries",
        "queries": options.queries,
        "step": source.step,
        "rows": [measured(source, scenes, share, options) for share in SHARES],
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(line))


def measured(
    source: Any, scenes: list[Any], share: float, options: argparse.Namespace
) -> dict[str, float]:
    """Percentages over all queries of one share of visible frames.

    `chance` is the share of frames with the circle. `other_shape` is the word of the object that
    is in all frames.
    """
    from builders.heat_map import HeatMap, part_clips

    from tvr.data_prep.video.frame_sampling import segment_centres
    from tvr.trainer.explanation.explanation import explain, explanation_page

    hits: dict[str, list[bool]] = {SHAPE: [], "other shape": [], "sentence": []}
    visible, choices = [], []
    clips = part_clips(scenes, SHAPE, count=options.queries, share=share, seed=options.seed)
    for clip in clips:
        picked = segment_centres(len(clip.frames), source.num_frames)
        found = explain(source, clip.caption, clip.frames[picked])
        page = HeatMap(explanation_page(found, clip.frames[picked], title="query"))
        right = clip.visible[picked]
        for name, token in ((SHAPE, SHAPE), ("other shape", clip.other)):
            hits[name].append(bool(right[page.marked(token)]))
        hits["sentence"].append(bool(right[page.marked("whole sentence")]))
        visible.append(right.mean())
        choices.append(len(set(found.best_frame.tolist())))
    return {
        "frames_with_circle": round(share * source.num_frames),
        "frames": source.num_frames,
        "chance": round(100 * float(np.mean(visible)), 1),
        **{name.replace(" ", "_"): 100 * float(np.mean(each)) for name, each in hits.items()},
        "different_best_frames": round(float(np.mean(choices)), 2),
    }


if __name__ == "__main__":
    main()
