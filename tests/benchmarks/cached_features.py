"""Steps a second from stored outputs of frozen towers, against those from the videos of droid1k.

Packs some clips of droid1k, and trains the heads on top of frozen towers of the size of ViT-B/32
with random weights, whose speed is that of pretrained ones: from the videos, from stored outputs
that this run makes, and from the videos again. Each step counts from its batch to its update. The
loss and the gradient norm of the first step must agree to the last bit. Prints one line of JSON;
exits with 1 if not, or if the ratio is below 10:

PYTHONPATH=tests python tests/benchmarks/cached_features.py --droid1k shared/realdata/droid1k \\
    --out runs/cached_features

The same command again continues: runs that are whole are read from their logs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tvr_bench.harness import machine, versions

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.packing.pack import pack_shards
from tvr.trainer.config import Config, DataConfig, ModelConfig, TowersConfig, TrainConfig, to_json
from tvr.trainer.model.tokenizer import train_tokenizer

WANTED_RATIO = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--droid1k", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--video-steps", type=int, default=3)
    parser.add_argument("--stored-steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    line = compare(options, options.out)
    print(json.dumps(line))
    return 0 if line["equal_first_steps"] and line["ratio"] >= WANTED_RATIO else 1


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    captions = pack(options.droid1k, folder / "train", options.clips)
    train_tokenizer(captions, folder / "tokenizer", vocab_size=1024, max_words=32)
    config = Config(
        data=DataConfig(train=str(folder / "train"), num_frames=options.frames, workers=1),
        model=ModelConfig(
            tokenizer=str(folder / "tokenizer"),
            towers=TowersConfig(
                width=768,
                layers=options.layers,
                heads=12,
                embed_width=512,
                image_size=224,
                patch_size=32,
            ),
            freeze="both",
            sequence_header_layers=1,
        ),
        train=TrainConfig(
            steps=options.video_steps,
            global_batch=options.batch,
            micro_batch=options.batch,
            log_every=1,
        ),
    )
    stored = replace(config, data=replace(config.data, features=str(folder / "features")))
    stored = replace(stored, train=replace(stored.train, steps=options.stored_steps))
    runs = {}
    for name, each in (("video", config), ("stored", stored), ("video again", config)):
        runs[name] = train(each, folder / name.replace(" ", "-"))
    videos = [step["step_s"] for name in ("video", "video again") for step in runs[name]]
    # The first step of a process allocates memory, and waits for the loader's first batch.
    warm = [step["step_s"] for step in runs["stored"][1:]]
    # Later steps follow other learning rates, since the schedule has another length.
    first = {name: (run[0]["loss"], run[0]["gradient_norm"]) for name, run in runs.items()}
    size = sum(file.stat().st_size for file in (folder / "features").rglob("*.bin"))
    return {
        "benchmark": "training steps from stored tower outputs, and from videos (droid1k)",
        "ratio": round(median(videos) / median(warm), 1),
        "steps_per_s": {
            "video": round(1 / median(videos), 4),
            "stored": round(1 / median(warm), 3),
        },
        "step_s": {"video": videos, "stored": warm},
        "first_loss_and_gradient_norm": first["stored"],
        "equal_first_steps": len(set(first.values())) == 1,
        "kb_per_clip_with_caption": round(size / options.clips / 1e3, 1),
        "sizes": {
            "clips": options.clips,
            "global_batch": options.batch,
            "frames": options.frames,
            "towers": f"width 768, {options.layers} layers, patch 32 of 224 pixels, D 512",
        },
        "versions": versions(),
        "machine": machine(),
    }


def pack(droid1k: Path, out: Path, clips: int) -> list[str]:
    """Packs the first clips as videos; returns their captions."""
    lines = (droid1k / "captions.jsonl").read_text().splitlines()[:clips]
    annotations = out.with_suffix(".jsonl")
    annotations.write_text("\n".join(lines) + "\n")
    if not (out / "manifest.json").is_file():
        pack_shards(
            read_annotations(str(annotations), videos=str(droid1k / "clips")),
            str(out),
            layout="video",
            samples_per_shard=32,
        )
    found = [json.loads(line) for line in lines]
    return [str(line.get("caption") or line["captions"][0]) for line in found]


def train(config: Config, run_dir: Path) -> list[dict[str, Any]]:
    """Trains in a process of its own, unless that is done; returns the steps of its log."""
    log = run_dir / "log.jsonl"
    if log.is_file() and len(found := steps_of(log)) == config.train.steps:
        return found
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(config))
    command = [sys.executable, "-m", "tvr.launchers.cli", "train", "--config", str(settings)]
    subprocess.run([*command, "--run-dir", str(run_dir)], check=True, stdout=sys.stderr)
    shutil.rmtree(run_dir / "checkpoints")
    return steps_of(log)


def steps_of(log: Path) -> list[dict[str, Any]]:
    return [
        event for event in map(json.loads, log.read_text().splitlines()) if event["event"] == "step"
    ]


if __name__ == "__main__":
    sys.exit(main())
