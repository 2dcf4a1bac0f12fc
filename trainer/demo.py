"""The demo: the whole job on rendered clips, from packing to training on 2 ranks to a report.

Every stage leaves a complete result or none, so a second call continues where the first stopped.
"""

from __future__ import annotations

import json
import os
import signal
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
from tvr.launchers.process import child_set_up
from tvr.trainer.config import Config, to_json
from tvr.trainer.model.tokenizer import train_tokenizer

SCENES_SEED = 2023
VOCABULARY = 768

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Folders and files of a demo."""

    root: Path

    @property
    def clips(self) -> Path:
        """Folder of the rendered clips."""
        return self.root / "clips"

    @property
    def tokenizer(self) -> Path:
        """Folder of the learned tokeniser."""
        return self.root / "tokenizer"

    def data(self, split: str) -> Path:
        """Folder of a packed split: train, test or exchanged."""
        return self.root / "data" / split

    def claim(self, sizes: dict[str, int]) -> None:
        """Records the sizes of the demo in its folder, or compares them with those recorded.

        Raises:
            ValueError: the folder holds a demo of other sizes.
        """
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
        """Writes the file for `tvr train --config`: the settings with this demo's folders.

        Raises:
            ValueError: the ranks do not divide the global batch.
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
    log: Callable[[str], None],
) -> None:
    """Renders and packs `train`, `test` and `exchanged`, and learns a tokeniser from the captions.

    Stages that are complete are skipped.

    Args:
        log: Called with a line for each stage.

    Raises:
        ValueError: the folder holds a demo of other sizes. Test scenes differ from the training
            scenes of one demo only, so parts of two demos must not be mixed.
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
            log(f"clips/{split}: complete")
        else:
            _render(folder, scenes, workers, training=split == "train")
            log(f"clips/{split}: {len(scenes)} clips rendered")
        _pack(paths, split, num_frames, image_size, workers, log)
    if (paths.tokenizer / "tokenizer_config.json").exists():
        log("tokenizer: complete")
        return
    clips = read_annotations(str(paths.clips / "train" / ANNOTATIONS))
    captions = [caption for clip in clips for caption in clip.captions]
    tokenizer = train_tokenizer(
        captions, paths.tokenizer, vocab_size=VOCABULARY, max_words=max_words
    )
    log(f"tokenizer: {tokenizer.vocab_size} tokens from {len(captions)} captions")


def train_on_ranks(ranks: int, arguments: list[str]) -> int:
    """Runs `tvr launch local --ranks N -- tvr train ARGUMENTS` on the CPU, to its exit code."""
    command = ["launch", "local", "--ranks", str(ranks), "--", "tvr", "train", *arguments]
    # On the CPU the demo gives the same result everywhere, and NCCL refuses two ranks on one GPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tvr.launchers.cli", *command],
        env=environment,
        preexec_fn=child_set_up(signal.SIGTERM),
    )
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the launcher got the interrupt too, and waits for its ranks


def _render(folder: Path, scenes: list[Scene], workers: int, *, training: bool) -> None:
    done = write_clips(
        folder,
        scenes,
        # Test clips and their exchanged counterparts share keys: the evaluation pairs them by key.
        prefix="train" if training else "test",
        seed=SCENES_SEED,
        workers=workers,
        all_wordings=training,
    )
    for _ in _with_progress(done, f"render {folder.name}", len(scenes)):
        pass


def _pack(
    paths: DemoPaths,
    split: str,
    num_frames: int,
    image_size: int,
    workers: int,
    log: Callable[[str], None],
) -> None:
    url = str(paths.data(split))
    if (paths.data(split) / MANIFEST_NAME).exists():
        log(f"data/{split}: complete")
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
            shuffle_seed=None,  # the clips are drawn at random already
            processes=workers,
            on_progress=on_progress,
        )
    assert manifest is not None, "this is the only task"
    log(f"data/{split}: {manifest.num_samples} clips in {len(manifest.shards)} shards")


def _with_progress(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    console = Console(stderr=True)
    yield from track(items, title, total=total, console=console, disable=not console.is_terminal)
