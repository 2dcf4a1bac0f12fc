"""droid1k by cross-validation: annotations -> `tvr pack` -> frozen features -> five folds.

The folds divide the groups (laboratory and day), so that no recording day is in training and test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.droid_features import NUM_FRAMES, ClipFeatures, compute
from evidence.droid_model import HeadShape, Rows, ranks, reduce_frames, train_model
from evidence.rows import nested
from numpy.typing import NDArray

from tvr.trainer.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig, merged

FOLDS = 5
SPLITS = ("train", "val", "test")
SHAPE = HeadShape()


def base() -> Config:
    """The settings that all rows share; chosen on inner folds, see README.md."""
    return Config(
        data=DataConfig(train="droid1k", num_frames=NUM_FRAMES),
        model=ModelConfig(),
        loss=LossConfig(temperature=0.05, mask_same_video=True, mask_equal_captions=True),
        train=TrainConfig(
            steps=80,
            global_batch=128,
            micro_batch=128,
            learning_rate=1e-3,
            weight_decay=0.2,
            warmup_steps=5,
        ),
    )


def prepare(source: Path, folder: Path, workers: int = 1) -> ClipFeatures:
    """Writes annotations of the published splits, packs them by `tvr pack`, and encodes all."""
    meta = meta_of(source)
    for split in SPLITS:
        annotations = folder / f"{split}.jsonl"
        if not annotations.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = (source / "captions.jsonl").read_text().splitlines()
            own = [x for x in lines if meta[_name(json.loads(x)["video"])]["split"] == split]
            annotations.write_text("\n".join(own) + "\n")
        if not (folder / "data" / split / "manifest.json").exists():
            line = [sys.executable, "-m", "tvr.launchers.cli", "pack", "--layout", "frames"]
            line += ["--annotations", str(annotations), "--videos", str(source / "clips")]
            line += ["--num-frames", str(NUM_FRAMES), "--short-side", "224"]
            subprocess.run([*line, "--out", str(folder / "data" / split)], check=True)
    return compute([folder / "data" / x for x in SPLITS], folder / "features.npz", workers)


def meta_of(source: Path) -> dict[str, dict[str, Any]]:
    """The lines of meta.jsonl by the name of the clip."""
    lines = map(json.loads, (source / "meta.jsonl").read_text().splitlines())
    return {_name(line["video"]): line for line in lines}


def _name(video: str) -> str:
    return video.rsplit(".", 1)[0]


def folds_of(groups: Sequence[str], folds: int = FOLDS) -> NDArray[np.int64]:
    """The fold of each clip: whole groups, the largest first, each to the smallest fold."""
    names, counts = np.unique(np.asarray(groups), return_counts=True)
    sizes, fold = np.zeros(folds, np.int64), dict[str, int]()
    for place in np.lexsort((names, -counts)):
        smallest = int(sizes.argmin())
        fold[str(names[place])] = smallest
        sizes[smallest] += counts[place]
    return np.array([fold[group] for group in groups], np.int64)


class Folds:
    """The features of all clips, divided; training clips and test clips of a fold are made once."""

    def __init__(
        self,
        features: ClipFeatures,
        groups: Sequence[str],
        shape: HeadShape = SHAPE,
        *,
        inner: bool = False,
    ) -> None:
        """
        Args:
            inner: For the choice of settings: each outer test fold is left out of training and of
                test, and the next fold is the test in its place.
        """
        self._features, self.shape, self._inner = features, shape, inner
        self._fold = folds_of(groups)
        self._made: dict[int, tuple[NDArray[np.int64], Rows, Rows]] = {}

    def __len__(self) -> int:
        return len(self._fold)

    def rows(self, outer: int) -> tuple[NDArray[np.int64], Rows, Rows]:
        """Numbers of the test clips of a fold, its training clips, its test clips."""
        if outer not in self._made:
            tested = (outer + 1) % FOLDS if self._inner else outer
            own = np.flatnonzero(self._fold == tested)
            others = np.flatnonzero((self._fold != tested) & (self._fold != outer))
            train, test = (Rows(self._features, x, self.shape.parts) for x in (others, own))
            reduce_frames(train, test, self.shape)
            self._made[outer] = own, train, test
        return self._made[outer]


def cross_validate(folds: Folds, settings: Mapping[str, Any], seed: int) -> NDArray[np.int64]:
    """(2, C) ranks of each clip's caption and of each clip, among the clips of its fold.

    Args:
        settings: Settings of a row, by names such as "loss.tpm_cl".
    """
    config = merged(base(), nested({**settings, "train.seed": seed}), where="row")
    found = np.zeros((2, len(folds)), np.int64)
    for outer in range(FOLDS):
        own, train, test = folds.rows(outer)
        model = train_model(config, folds.shape, train)
        found[:, own] = np.stack([x.numpy() for x in ranks(model, config, test)])
    return found
