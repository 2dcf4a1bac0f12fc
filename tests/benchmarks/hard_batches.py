"""What hard batches cost, and how they change the hard negatives of a run.

    python tests/benchmarks/hard_batches.py --out tests/benchmarks/results/hard_batches.json

- words: the vectors of `--captions` captions of ten random words;
- windows: drawing the first window of synthetic sets of 1 and 10 million samples;
- nodes: samples that a node reads from shards that it does not own, in batches of 1,024;
- training: hard negatives a row (NegNCE, log mode) in the last 24 of 240 steps on the demo's clips,
  a tiny model, one seed, batch 32 of 256 clips;
- same_weights: the same over an epoch of these orders, all with the weights of the run without.

Times are those of the processor, since the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tvr.data_prep.hard_batches.caption_vectors import CaptionVectors, VectorsIndex, open_vectors
from tvr.data_prep.hard_batches.caption_words import SampleCaptions, write_word_vectors
from tvr.data_prep.hard_batches.hard_batches import CaptionGroups, HardBatches, every_batch
from tvr.data_prep.reading.locality import assigned, owned
from tvr.data_prep.reading.order import SampleOrder, window_shards

SHARD, WIDTH, WORDS, CAPTION_WORDS = 1000, 256, 30_000, 10
SHARE, GROUP = 0.25, 4
ORDERS = ((0.0, 0), (0.25, 0), (0.5, 0), (0.5, 1))
WINDOWS = ((1_000_000, 1024), (1_000_000, 8192), (10_000_000, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words, vectors = word_vectors(Path(folder), arguments.captions)
        result = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "share": SHARE,
            "group": GROUP,
            "words": words,
            "windows": [drawn_window(Path(folder), *each) for each in WINDOWS],
            "nodes": [reads_of_others(vectors, ranks) for ranks in (16, 64)],
            "training": hard_negatives(Path(folder), arguments.steps),
        }
        result["same_weights"] = same_weights(Path(folder))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def order_of(vectors: CaptionVectors | None, num_samples: int, batch: int) -> SampleOrder:
    """The order of shards of 1,000 samples; with hard batches if there are vectors."""
    groups = None
    if vectors is not None:
        hard = HardBatches(share=SHARE, group=GROUP)
        groups = CaptionGroups({0: vectors}, hard, seed=1, batch_starts=every_batch(batch))
    sizes = [SHARD] * (num_samples // SHARD)
    return SampleOrder(sizes, 1, window_shards(batch, len(sizes)), groups)


def word_vectors(folder: Path, count: int) -> tuple[dict[str, Any], CaptionVectors]:
    """Makes the vectors of captions whose words have Zipf's frequencies."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, WORDS + 1)
    words = random.choice(WORDS, size=(count, CAPTION_WORDS), p=weights / weights.sum())

    def captions() -> Iterator[SampleCaptions]:
        for number, own in enumerate(words.tolist()):
            yield SampleCaptions(f"v{number}", (" ".join(f"w{word}" for word in own),))

    start = time.process_time()
    write_word_vectors(folder / "words", captions(), content="")
    seconds = time.process_time() - start
    size = sum(file.stat().st_size for file in (folder / "words").iterdir())
    found = {"captions": count, "cpu_s": round(seconds, 2), "bytes_each": round(size / count, 1)}
    return found, open_vectors(folder / "words", "")


def drawn_window(folder: Path, num_samples: int, batch: int) -> dict[str, Any]:
    """Draws a window in the middle of an epoch, without and with hard batches."""
    path, random = folder / "vectors.npy", np.random.default_rng(0)
    written = np.lib.format.open_memmap(path, "w+", np.int8, (num_samples, WIDTH))
    some = random.integers(-60, 61, (1 << 16, WIDTH)).astype(np.int8)
    for first in range(0, num_samples, len(some)):
        written[first : first + len(some)] = np.roll(some, first >> 16, axis=1)[
            : num_samples - first
        ]
    del written
    names = np.arange(num_samples, dtype=np.uint64)
    vectors = CaptionVectors(
        index=VectorsIndex(format_version=1, content="", source="random", sha256={}),
        vectors=np.load(path, mmap_mode="r"),
        texts=names,
        videos=names,
        starts=np.arange(num_samples + 1),
    )
    found: dict[str, Any] = {"samples": num_samples, "global_batch": batch}
    for name, own in (("plain", None), ("hard", vectors)):
        order = order_of(own, num_samples, batch)
        start = time.process_time()
        order.locate(num_samples // 2)
        found[f"{name}_cpu_s"] = round(time.process_time() - start, 2)
    tracemalloc.start()
    order = order_of(vectors, num_samples, batch)
    order.locate(num_samples // 2)
    found["window"] = order.window_at(num_samples // 2).num_samples
    found["peak_mib"] = round(tracemalloc.get_traced_memory()[1] / 2**20)
    tracemalloc.stop()
    path.unlink()
    return found


def reads_of_others(vectors: CaptionVectors, ranks: int, per_node: int = 8) -> dict[str, Any]:
    """The share of samples that a node reads from shards it does not own, over a few batches."""
    batch = 1024
    found: dict[str, Any] = {"ranks": ranks, "nodes": ranks // per_node}
    for name, own in (("plain", None), ("hard", vectors)):
        order, far, near = order_of(own, vectors.num_samples, batch), 0, list[float]()
        for step in range(12):
            here = order.locate_range(step * batch, (step + 1) * batch)
            window = order.window_at(step * batch)
            for first in range(0, ranks, per_node):
                node = range(first, first + per_node)
                mine = window.shards[owned(window.starts, node, ranks)]
                rows = np.concatenate([assigned(here.place, rank, ranks) for rank in node])
                far += int((~np.isin(here.shard[rows], mine)).sum())
            values = np.asarray(vectors.vectors[here.sample]).astype(np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            cosines = values @ values.T
            np.fill_diagonal(cosines, -1)
            near.append(float(cosines.max(axis=1).mean()))
        found[f"{name}_share"] = round(far / (12 * batch), 4)
        found[f"{name}_nearest_cosine"] = round(float(np.mean(near)), 3)
    return found


def hard_negatives(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Trains a tiny model on the demo's clips."""
    from builders.tiny import make_tiny_data

    make_tiny_data(folder, num_train=256)
    return [
        trained(folder, f"run-{share}-{every}", share, every, 24, train={"steps": steps})
        for share, every in ORDERS
    ]


def same_weights(folder: Path) -> list[dict[str, Any]]:
    """Two epochs of 8 steps at a learning rate of almost 0, of which the second one counts."""
    rates = {"steps": 16, "learning_rate": 1e-12, "encoder_learning_rate": 1e-12}
    start = {"init_from": str(folder / "run-0.0-0")}
    return [
        trained(folder, f"same-{share}-{every}", share, every, 8, train=rates, model=start)
        for share, every in ORDERS
    ]


def trained(
    folder: Path, name: str, share: float, every: int, last: int, **changes: dict[str, Any]
) -> dict[str, Any]:
    """Trains, and averages what the log says of the last steps."""
    from builders import jobs
    from builders.tiny import tiny_config

    from tvr.trainer.config import merged
    from tvr.trainer.loop import train

    data = {"hard_batches": share, "hard_every": every, "test": None, "test_exchanged": None}
    settings = {
        "data": data,
        "train": {"global_batch": 32, "micro_batch": 32, "log_every": 1},
        "loss": {"similarity": "neg_nce", "neg_nce_mode": "log"},
        "checkpoint": {"every": 0},
    }
    config = merged(tiny_config(folder), settings, where="benchmark")
    train(merged(config, changes, where="benchmark"), folder / name)
    steps = jobs.events(folder / name, "step")[-last:]
    names = ("hard_negatives_per_row", "hardest_similarity", "loss")
    means = {name: round(sum(step[name] for step in steps) / len(steps), 3) for name in names}
    return {"hard_batches": share, "hard_every": every, "steps": len(steps), **means}


if __name__ == "__main__":
    main()
