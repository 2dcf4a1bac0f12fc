"""The main job end to end on rendered clips: clips -> shards -> training on 2 ranks -> report.

Every stage leaves a complete result or none, so that a second run goes on where the first stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.dataset.manifest import MANIFEST_NAME
from tvr.data_prep.demo_clips import ANNOTATIONS, Scene, demo_scenes, write_clips
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.progress import show_progress
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.config import Config, to_json
from tvr.trainer.model.tokenizer import train_tokenizer

SCENES_SEED = 2023
VOCABULARY = 768

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where the demo keeps its things."""

    root: Path

    @property
    def clips(self) -> Path:
        return self.root / "clips"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def data(self, split: str) -> Path:
        return self.root / "data" / split

    def claim(self, sizes: dict[str, int]) -> None:
        """Makes this the folder of a demo of these sizes, or checks that it is."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "demo.json"
        if not path.exists():
            write_atomically(path, json.dumps(sizes) + "\n")
        before = json.loads(path.read_text())
        differing = [
            f"{name} was {before.get(name)}, is {sizes[name]}"
            for name in sizes
            if before.get(name) != sizes[name]
        ]
        if differing:
            raise ValueError(
                f"{self.root} holds a demo of other sizes ({'; '.join(differing)}); "
                "remove it or choose another --out"
            )

    def write_settings(self, settings: Config, ranks: int) -> Path:
        """The file for `tvr train --config`: the settings with this demo's places in them.

        Raises:
            ValueError: the global batch cannot be shared out among the ranks.
        """
        if ranks < 1 or settings.train.global_batch % ranks:
            raise ValueError(
                f"--ranks {ranks} must be at least 1 and divide train.global_batch="
                f"{settings.train.global_batch}"
            )
        data = replace(
            settings.data,
            train=str(self.data("train")),
            test=str(self.data("test")),
            test_exchanged=str(self.data("exchanged")),
        )
        train = replace(settings.train, micro_batch=settings.train.global_batch // ranks)
        model = replace(settings.model, tokenizer=str(self.tokenizer))
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "settings.json"
        write_atomically(path, to_json(replace(settings, data=data, train=train, model=model)))
        return path


def prepare_demo(
    paths: DemoPaths,
    *,
    train_clips: int,
    test_clips: int,
    num_frames: int,
    image_size: int,
    max_words: int,
    workers: int,
    say: Callable[[str], None],
) -> None:
    """Renders and packs `train`, `test` and `exchanged`, and learns a tokeniser from the captions.

    What is complete already is left as it is.

    Raises:
        ValueError: the folder holds a demo of other sizes. Test scenes are drawn apart from one
            training set of one size, so parts of two demos must not meet.
    """
    paths.claim(
        {
            "train_clips": train_clips,
            "test_clips": test_clips,
            "num_frames": num_frames,
            "image_size": image_size,
            "max_words": max_words,
            "seed": SCENES_SEED,
        }
    )
    splits = demo_scenes(train_clips, test_clips, SCENES_SEED)
    for split, scenes in splits.items():
        folder = paths.clips / split
        if (folder / ANNOTATIONS).exists():
            say(f"clips/{split}: complete")
        else:
            _render(folder, scenes, workers, training=split == "train")
            say(f"clips/{split}: {len(scenes)} clips rendered")
        _pack(paths, split, num_frames, image_size, workers, say)
    if (paths.tokenizer / "tokenizer_config.json").exists():
        say("tokenizer: complete")
        return
    clips = read_annotations(str(paths.clips / "train" / ANNOTATIONS))
    captions = [caption for clip in clips for caption in clip.captions]
    tokenizer = train_tokenizer(
        captions, paths.tokenizer, vocab_size=VOCABULARY, max_words=max_words
    )
    say(f"tokenizer: {tokenizer.vocab_size} tokens from {len(captions)} captions")


def train_on_ranks(ranks: int, arguments: list[str]) -> int:
    """`tvr launch local --ranks N -- tvr train ARGUMENTS`, as a user would type it, on the CPU."""
    command = ["launch", "local", "--ranks", str(ranks), "--", "tvr", "train", *arguments]
    # The demo shows the same on every machine; two ranks on one GPU could not meet in NCCL.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tvr.launchers.cli", *command], env=environment
    )
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the launcher got it too, and waits for its ranks to end


def _render(folder: Path, scenes: list[Scene], workers: int, *, training: bool) -> None:
    done = write_clips(
        folder,
        scenes,
        # Test clips and their exchanged twins share keys: the evaluation pairs them by these.
        prefix="train" if training else "test",
        seed=SCENES_SEED,
        workers=workers,
        all_wordings=training,
    )
    for _ in _tracked(done, f"render {folder.name}", len(scenes)):
        pass


def _pack(
    paths: DemoPaths,
    split: str,
    num_frames: int,
    image_size: int,
    workers: int,
    say: Callable[[str], None],
) -> None:
    url = str(paths.data(split))
    if (paths.data(split) / MANIFEST_NAME).exists():
        say(f"data/{split}: complete")
        return
    clips = read_annotations(str(paths.clips / split / ANNOTATIONS))
    with show_progress(f"pack {split}") as on_progress:
        manifest = pack_shards(
            clips,
            url,
            layout="frames",
            num_frames=num_frames,
            short_side=image_size,
            jpeg_quality=95,
            samples_per_shard=500,
            processes=workers,
            on_progress=on_progress,
        )
    assert manifest is not None, "this is the only task"
    say(f"data/{split}: {manifest.num_samples} clips in {len(manifest.shards)} shards")


def _tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    console = Console(stderr=True)
    yield from track(items, what, total=total, console=console, disable=not console.is_terminal)
