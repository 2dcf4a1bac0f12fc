"""Time and memory of ranking a large test set, against the similarity kernel alone.

Each of W ranks holds the features of its share of the videos in memory. `kernel` scores the same
tiles and keeps nothing; its time and that of `rank_features` are measured in turns in one run.

Prints one line of JSON:
    retrieval.py --videos 1000000 --captions 2000 4000 > tests/benchmarks/results/retrieval.json
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

FRAMES, WORDS, WIDTH = 4, 8, 64


def main() -> None:
    """Measures, and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--captions", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from builders.spawn import spawn
    from tvr_bench.harness import machine, versions

    rows = []
    for captions in options.captions:
        # Fresh processes, so that the peak of memory is that of one size.
        sizes = (options.videos, captions, options.repeats)
        found = spawn(measured, options.ranks, *sizes, timeout_s=3600, anew=True)
        rows.append({"captions": captions, **max(found, key=lambda row: row["peak_mib"])})
    line = {
        "benchmark": "ranks of a test set, both directions and the best 5 videos; att_wti, float32",
        "sizes": {"videos": options.videos, "frames": FRAMES, "words": WORDS, "width": WIDTH},
        "ranks": options.ranks,
        "repeats": options.repeats,
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(line))


def measured(
    rank: int, world_size: int, num_videos: int, num_captions: int, repeats: int
) -> dict[str, Any]:
    """Seconds and peak memory of one rank."""
    from tvr.kernels.numerics import unit
    from tvr.trainer.config import ModelConfig
    from tvr.trainer.distributed.world import World
    from tvr.trainer.evaluation.retrieval import (
        CAPTIONS_PER_BLOCK,
        SCORES_PER_TILE,
        rank_features,
    )
    from tvr.trainer.loss.objective import similarity_rows
    from tvr.trainer.model.model import Features

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    world = World(rank=rank, world_size=world_size, device=torch.device("cpu"))
    videos, captions = num_videos // world_size, num_captions // world_size
    own = Features(
        sentence=unit(torch.randn(captions, WIDTH)),
        words=unit(torch.randn(captions, WORDS, WIDTH)),
        word_mask=torch.ones(captions, WORDS, dtype=torch.long),
        frames=torch.randn(videos, FRAMES, WIDTH),
        frame_mask=torch.ones(videos, FRAMES, dtype=torch.long),
        word_logits=torch.randn(captions, WORDS),
        frame_logits=torch.randn(videos, FRAMES),
        margin_hinge=None,
    )
    own.frames.div_(own.frames.norm(dim=-1, keepdim=True))
    features_mib = peak_mib()

    score = partial(similarity_rows, model=ModelConfig(interaction="att_wti"))

    def kernel() -> None:
        """The scores of all captions with this rank's videos, tile by tile."""
        block = min(CAPTIONS_PER_BLOCK, num_captions)
        width = SCORES_PER_TILE // block
        repeated = own._replace(
            sentence=own.sentence.repeat(world_size, 1)[:block],
            words=own.words.repeat(world_size, 1, 1)[:block],
            word_mask=own.word_mask.repeat(world_size, 1)[:block],
            word_logits=own.word_logits.repeat(world_size, 1)[:block],  # type: ignore[union-attr]
        )
        for _ in range(-(-num_captions // block)):
            for start in range(0, videos, width):
                columns = slice(start, start + width)
                tile = own._replace(
                    frames=own.frames[columns],
                    frame_mask=own.frame_mask[columns],
                    frame_logits=own.frame_logits[columns],  # type: ignore[index]
                )
                score(repeated, tile)

    caption_video = torch.arange(captions) % videos
    whole = partial(rank_features, own, caption_video, score, world)
    spent: dict[str, list[float]] = {"kernel": [], "rank_features": []}
    with torch.no_grad():
        for _ in range(repeats):
            for name, action in (("kernel", kernel), ("rank_features", whole)):
                world.barrier()
                start = time.perf_counter()
                action()
                world.barrier()
                spent[name].append(time.perf_counter() - start)
    return {
        "kernel_s": median(spent["kernel"]),
        "rank_features_s": median(spent["rank_features"]),
        "to_kernel": median(spent["rank_features"]) / median(spent["kernel"]),
        "features_mib": features_mib,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """The largest memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
