"""The main job end to end on rendered clips: clips -> shards -> training on 2 ranks -> report.

Every stage leaves a complete result or none, so that a second run goes on where the first stopped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from tvr.data_prep.annotations import read_annotations
from tvr.data_prep.manifest import MANIFEST_NAME, read_manifest
from tvr.data_prep.pack import pack_shards
from tvr.data_prep.shapes import ANNOTATIONS, Scene, demo_scenes, write_clips
from tvr.trainer.config import Config, to_json
from tvr.trainer.run_dir import write_whole
from tvr.trainer.tokenizer import train_tokenizer

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

    def write_settings(self, settings: Config, ranks: int) -> Path:
        """The file for `tvr train --config`: the settings with this demo's places in them."""
        data = replace(
            settings.data,
            train=str(self.data("train")),
            test=str(self.data("test")),
            test_exchanged=str(self.data("exchanged")),
        )
        train = replace(settings.train, micro_batch=max(1, settings.train.global_batch // ranks))
        model = replace(settings.model, tokenizer=str(self.tokenizer))
        path = self.root / "settings.json"
        write_whole(path, to_json(replace(settings, data=data, train=train, model=model)))
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

    What is complete already is left as it is; a data set of another size is an error, since the
    runs beside it were trained on it.
    """
    splits = demo_scenes(train_clips, test_clips, SCENES_SEED)
    for split, scenes in splits.items():
        folder = paths.clips / split
        if (folder / ANNOTATIONS).exists():
            say(f"clips/{split}: complete")
        else:
            _render(folder, scenes, workers, training=split == "train")
            say(f"clips/{split}: {len(scenes)} clips rendered")
        _pack(paths, split, len(scenes), num_frames, image_size, say)
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
    """`tvr launch local --ranks N -- tvr train ARGUMENTS`, as a user would type it."""
    command = ["launch", "local", "--ranks", str(ranks), "--", "tvr", "train", *arguments]
    return subprocess.call([sys.executable, "-m", "tvr.launchers.cli", *command])


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
    count: int,
    num_frames: int,
    image_size: int,
    say: Callable[[str], None],
) -> None:
    url = str(paths.data(split))
    if (paths.data(split) / MANIFEST_NAME).exists():
        found = read_manifest(url).num_samples
        if found != count:
            raise ValueError(
                f"{url} holds {found} clips, {count} were asked for; "
                "remove the folder or choose another --out"
            )
        say(f"data/{split}: complete")
        return
    clips = read_annotations(str(paths.clips / split / ANNOTATIONS))
    manifest = pack_shards(
        _tracked(clips, f"pack {split}", len(clips)),
        url,
        layout="frames",
        num_frames=num_frames,
        short_side=image_size,
        jpeg_quality=95,
        samples_per_shard=500,
    )
    say(f"data/{split}: {manifest.num_samples} clips in {len(manifest.shards)} shards")


def _tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    console = Console(stderr=True)
    yield from track(items, what, total=total, console=console, disable=not console.is_terminal)
