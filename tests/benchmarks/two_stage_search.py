"""Recall and time of search in two stages, against DMAE's similarity with all videos.

Plants captions among videos: each video has one to four scenes near one of some themes, and a
caption has the sentence and the words of one scene, with noise and with words of no meaning. The
features go to files in fp16, and each index is built from these files. `exhaustive` scores all
videos with the kernel, from features that are in memory in fp32; a two-stage search reads its
candidates from the files. One caption is searched at a time, exhaustively and by each method in
turns in one process. `batched_query_s` is the time of a caption if the kernel scores all at once.

Prints one line of JSON:
    two_stage_search.py > tests/benchmarks/results/two_stage_search.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvr.kernels.numerics import unit
from tvr.trainer.config import ModelConfig
from tvr.trainer.features.feature_set import (
    DataSource,
    FeatureHeader,
    FeatureSet,
    FeatureWriter,
    VideoSource,
)
from tvr.trainer.index.index import Index, build_index
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

PER_BLOCK, SCENES, VOCABULARY = 1024, 4, 50
METHODS = ("exact", "ivf", "hnsw")


def main() -> None:
    """Measures, and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=50_000)
    parser.add_argument("--captions", type=int, default=400)
    parser.add_argument("--timed", type=int, default=8, help="captions whose time is taken")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rerank", type=int, default=200)
    parser.add_argument("--noise", type=float, default=7.5, help="of sentences and words")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tvr_bench.harness import machine, versions

    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), options)
    line = {
        "benchmark": "two-stage search against the whole similarity; att_wti, neighbour frames",
        "sizes": vars(options),
        **rows,
        "versions": versions() | {"faiss-cpu": version("faiss-cpu")},
        "machine": machine(),
    }
    print(json.dumps(line))


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Recall at 10, seconds and sizes of the whole similarity and of each method."""
    torch.manual_seed(0)
    whole, captions, right = plant(options)
    features = written(folder, whole, options)
    model = ModelConfig(interaction="att_wti")
    ranks, batched_s = exhaustive_ranks(whole, captions, right, model)
    full = (ranks <= 10).float().mean().item()
    indices, build_s = {}, {}
    for method in METHODS:
        place = folder / method
        shutil.copytree(folder / "features", place, copy_function=_link)
        start = time.perf_counter()
        build_index(FeatureSet.open(place), method=method)
        build_s[method] = time.perf_counter() - start
        indices[method] = Index.open(place)

    found: dict[str, list[bool]] = {method: [] for method in METHODS}
    spent: dict[str, list[float]] = {name: [] for name in ("exhaustive", *METHODS)}
    with torch.no_grad():
        for number in range(options.captions):
            one = row_of(captions, number)
            if number < options.timed:
                start = time.perf_counter()
                similarity_rows(one, whole, model)[0].topk(10)
                spent["exhaustive"].append(time.perf_counter() - start)
            for method, index in indices.items():
                start = time.perf_counter()
                hits = index.search_features(one, k=10, rerank=options.rerank)
                if number < options.timed:
                    spent[method].append(time.perf_counter() - start)
                found[method].append(int(right[number]) in [hit.video for hit in hits])
    seconds = {name: median(values) for name, values in spent.items()}
    rows = []
    for method in METHODS:
        recall = float(np.mean(found[method]))
        files = (folder / method / "index").rglob("*.*")
        rows.append(
            {
                "method": method,
                "recall_at_10": recall,
                "of_exhaustive": recall / full,
                "query_s": seconds[method],
                "times_faster": seconds["exhaustive"] / seconds[method],
                "build_s": build_s[method],
                "index_mib": sum(file.stat().st_size for file in files) / 2**20,
            }
        )
    return {
        "exhaustive": {
            "recall_at_10": full,
            "query_s": seconds["exhaustive"],
            "batched_query_s": batched_s,
        },
        "rows": rows,
        "features_mib": sum(file.stat().st_size for file in (folder / "features").rglob("*.bin"))
        / 2**20,
        "videos_of_features": len(features),
    }


def plant(options: argparse.Namespace) -> tuple[Features, Features, Tensor]:
    """Videos, captions, and the video of each caption. Noise vectors have a mean length of 1."""
    videos, frames, width = options.videos, options.frames, options.width

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, width) / width**0.5

    themes = noise(max(1, videos // 100))
    own = themes[torch.randint(len(themes), (videos,))] + 0.8 * noise(videos)
    scenes = unit(own[:, None] + 0.9 * noise(videos, SCENES))
    num_scenes = torch.randint(1, SCENES + 1, (videos,))
    scene = torch.arange(frames) * num_scenes[:, None] // frames
    shown = torch.empty(videos, frames, width)
    for start in range(0, videos, PER_BLOCK):
        piece = slice(start, start + PER_BLOCK)
        which = scene[piece][..., None].expand(-1, -1, width)
        base = scenes[piece].gather(1, which)
        shown[piece] = unit(base + 0.5 * noise(*base.shape[:2]))
    mask = torch.ones(videos, frames, dtype=torch.long)
    mask[torch.rand(videos) < 0.1, frames * 2 // 3 :] = 0

    captions, words = options.captions, options.words
    right = torch.randperm(videos)[:captions]
    # The first scene is shown also in short videos.
    said = scenes[right, 0]
    is_content = torch.rand(captions, words) < 0.5
    fillers = unit(noise(VOCABULARY))[torch.randint(VOCABULARY, (captions, words))]
    meant = unit(said[:, None] + options.noise * noise(captions, words))
    word_mask = torch.ones(captions, words, dtype=torch.long)
    word_mask[torch.rand(captions) < 0.5, words * 2 // 3 :] = 0
    video_features = Features(
        sentence=torch.empty(0, width),
        words=torch.empty(0, words, width),
        word_mask=torch.empty(0, words, dtype=torch.long),
        frames=shown,
        frame_mask=mask,
        word_logits=torch.empty(0, words),
        frame_logits=0.5 * torch.randn(videos, frames),
        margin_hinge=None,
    )
    caption_features = Features(
        sentence=unit(said + options.noise * noise(captions)),
        words=torch.where(is_content[..., None], meant, fillers),
        word_mask=word_mask,
        frames=torch.empty(0, frames, width),
        frame_mask=torch.empty(0, frames, dtype=torch.long),
        word_logits=is_content.float() + 0.3 * torch.randn(captions, words),
        frame_logits=torch.empty(0, frames),
        margin_hinge=None,
    )
    return video_features, caption_features, right


def written(folder: Path, whole: Features, options: argparse.Namespace) -> FeatureSet:
    """The videos as a feature set in fp16."""
    header = FeatureHeader(
        model="planted",
        fingerprint="0" * 64,
        settings={
            "interaction": "att_wti",
            "neighbour_frames": True,
            "num_frames": options.frames,
            "max_words": options.words,
            "image_size": 224,
        },
        stored="fp16",
        num_frames=options.frames,
        num_words=options.words,
        width=options.width,
        has_logits=True,
    )
    blocks = -(-options.videos // PER_BLOCK)
    source = DataSource(url="planted", kind="packed", content="0" * 64, num_blocks=blocks)
    writer = FeatureWriter(folder / "features", header, source)
    for block in range(blocks):
        rows = range(block * PER_BLOCK, min((block + 1) * PER_BLOCK, options.videos))
        piece = slice(rows.start, rows.stop)
        part = whole._replace(
            frames=whole.frames[piece],
            frame_mask=whole.frame_mask[piece],
            frame_logits=whole.frame_logits[piece],  # type: ignore[index]
        )
        sources = [VideoSource(row=row) for row in rows]
        writer.write(block, part, keys=[f"v{row}" for row in rows], sources=sources)
    assert writer.publish()
    return FeatureSet.open(folder / "features")


def exhaustive_ranks(
    whole: Features, captions: Features, right: Tensor, model: ModelConfig
) -> tuple[Tensor, float]:
    """Rank of each caption's video among all, and seconds of a caption in a batch."""
    start = time.perf_counter()
    with torch.no_grad():
        scores = similarity_rows(captions, whole, model)
    seconds = (time.perf_counter() - start) / len(right)
    own = scores[torch.arange(len(right)), right]
    return (scores > own[:, None]).sum(1) + 1, seconds


def row_of(captions: Features, number: int) -> Features:
    """One caption."""
    piece = slice(number, number + 1)
    return captions._replace(
        sentence=captions.sentence[piece],
        words=captions.words[piece],
        word_mask=captions.word_mask[piece],
        word_logits=captions.word_logits[piece],  # type: ignore[index]
    )


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


if __name__ == "__main__":
    main()
