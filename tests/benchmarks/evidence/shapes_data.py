"""The clips of the shapes: the demo's maker with a test set of 2,000 clips and a set for tuning.

No two of the splits share a scene, nor a scene with its colours exchanged: `train` for training,
`tune` for the choice of settings, `test` and `exchanged` for the result.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.dataset.manifest import MANIFEST_NAME
from tvr.data_prep.demo_clips import ANNOTATIONS, Scene, demo_scenes, draw_scenes, write_clips
from tvr.data_prep.packing.pack import pack_shards
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.model.tokenizer import train_tokenizer

SCENES_SEED = 1900
VOCABULARY = 768
MAX_WORDS = 24
NUM_FRAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesSizes:
    """Sizes of the data; those of the stored results by default."""

    train_clips: int = 10_000
    tune_clips: int = 1_000
    test_clips: int = 2_000
    image_size: int = 32


def scenes_of(sizes: ShapesSizes) -> dict[str, list[Scene]]:
    """The scenes of each split; no scene looks like one of another split."""
    drawn = demo_scenes(sizes.train_clips, sizes.test_clips, SCENES_SEED)
    taken = {scene.identity() for scenes in drawn.values() for scene in scenes}
    tune = draw_scenes(sizes.tune_clips, SCENES_SEED + 2, excluded=taken)
    return {**drawn, "tune": tune}


def prepare(folder: Path, sizes: ShapesSizes, workers: int) -> None:
    """Renders and packs all splits and learns a tokeniser; complete stages are skipped.

    Raises:
        ValueError: the folder holds shapes of other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "sizes.json"
    if not record.exists():
        write_atomically(record, json.dumps(asdict(sizes)) + "\n")
    if (before := json.loads(record.read_text())) != asdict(sizes):
        raise ValueError(f"{folder} holds shapes of {before}, not of {asdict(sizes)}")
    for split, scenes in scenes_of(sizes).items():
        clips = folder / "clips" / split
        if not (clips / ANNOTATIONS).exists():
            # Test clips and their exchanged counterparts share keys: evaluation pairs them by key.
            prefix = "test" if split == "exchanged" else split
            seed = SCENES_SEED + ("train", "tune", prefix).index(prefix)
            whole = split == "train"
            done = write_clips(
                clips, scenes, prefix=prefix, seed=seed, workers=workers, all_wordings=whole
            )
            print(f"{split}: {sum(1 for _ in done)} clips rendered", flush=True)
        if not (data_of(folder, split) / MANIFEST_NAME).exists():
            pack_shards(
                read_annotations(str(clips / ANNOTATIONS)),
                str(data_of(folder, split)),
                layout="frames",
                num_frames=NUM_FRAMES,
                short_side=sizes.image_size,
                jpeg_quality=95,
                samples_per_shard=500,
                processes=workers,
            )
            print(f"{split}: packed", flush=True)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").exists():
        annotated = read_annotations(str(folder / "clips" / "train" / ANNOTATIONS))
        captions = [caption for clip in annotated for caption in clip.captions]
        train_tokenizer(captions, tokenizer, vocab_size=VOCABULARY, max_words=MAX_WORDS)


def data_of(folder: Path, split: str) -> Path:
    """Folder of a packed split."""
    return folder / "data" / split
