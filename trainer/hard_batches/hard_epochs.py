"""The caption vectors of a run with `data.hard_batches`: which epochs they serve, and their files.

    RUN_DIR/hard_batches/SET/epoch-00000000/   from the captions' words, when the run starts
    RUN_DIR/hard_batches/SET/epoch-00000004/   from the text tower, when epoch 4 begins

SET is "train" for `data.train`. Vectors for the epochs from e on are found by the weights before
the step that reads the first sample of epoch e. A run that resumes uses the same files, so that it
reads the batches of the uninterrupted one. Vectors are found anew every `data.hard_every` epochs,
as in ANCE (Xiong et al., arXiv 2007.00808).
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.hard_batches.caption_vectors import CaptionVectors, has_vectors, open_vectors
from tvr.data_prep.hard_batches.caption_words import find_word_vectors
from tvr.data_prep.hard_batches.hard_batches import HardBatches, batch_of, caption_groups
from tvr.data_prep.reading.order import Regroup
from tvr.trainer.checkpoint.catalogue import list_candidates
from tvr.trainer.config import Config
from tvr.trainer.data import training_mixture, training_sets
from tvr.trainer.distributed.world import World
from tvr.trainer.hard_batches.sentence_vectors import EncodeCaptions, write_sentence_vectors
from tvr.trainer.run_dir import checkpoints_of

FOLDER = "hard_batches"

log = logging.getLogger(__name__)


class HardEpochs:
    """The caption vectors of a run, by training set and epoch. All ranks build it together.

    Vectors that are missing are made from the captions' words by the first rank.

    Args:
        config: Settings, with `data.hard_batches` above 0.
        run_dir: Folder of the run, which all ranks see.
        start_step: Steps that are done; vectors that are found later are removed.
        world: The ranks.

    Raises:
        ValueError: no group fits into a batch; a training set is a beton; or vectors are damaged or
            missing.
        OSError, ShardCorrupt: the captions cannot be read.
    """

    def __init__(self, config: Config, run_dir: Path, start_step: int, world: World) -> None:
        data = config.data
        self._hard = HardBatches(
            share=data.hard_batches, group=data.hard_group, every=data.hard_every
        )
        self._hard.check(config.train.global_batch)
        self._config, self._world, self._folder = config, world, run_dir / FOLDER
        self._mixture = training_mixture(data, config.train)
        self._urls = {each.name: each.url for each in training_sets(data)}
        self._manifests = {
            name: read_manifest(url, node_folder=data.shard_cache)
            for name, url in self._urls.items()
        }
        # The other ranks wait for as long as it takes to read the captions.
        world.run_on_first(lambda: self._make_ready(start_step), patient=True)
        self._vectors: dict[str, dict[int, CaptionVectors]] = {name: {} for name in self._urls}
        world.run_on_all(lambda: self._open_all(start_step), ValueError)

    def regroup(self) -> dict[str, Regroup]:
        """Returns the last step of the order of each training set, by its name."""
        return dict(
            caption_groups(
                self._vectors,
                self._hard,
                seed=self._config.train.seed,
                global_batch=self._config.train.global_batch,
                mixture=self._mixture,
            )
        )

    def is_due(self, done: int) -> bool:
        """True if vectors must be found by the weights after `done` steps; equal on all ranks."""
        return bool(self._due(done))

    def find(self, done: int, encode: EncodeCaptions) -> None:
        """Finds the vectors that are due, and keeps them in files. All ranks call it.

        Args:
            done: Steps that are done.
            encode: The text tower of this step, in evaluation mode.

        Raises:
            ValueError: they are too long, or the files of another rank are not to be seen.
            OSError: the run's folder cannot be written.
        """
        for name, epoch in self._due(done):
            write_sentence_vectors(
                self._of(name, epoch),
                self._of(name, 0),
                self._vectors[name][0],
                encode,
                self._world,
                source=f"text tower after {done} steps",
            )
            self._world.run_on_all(
                lambda name=name, epoch=epoch: self._open(name, epoch), ValueError
            )
            self._world.run_on_first(lambda name=name: self._remove_old(name, done))

    def _due(self, done: int) -> list[tuple[str, int]]:
        """Sets, and epochs whose vectors are found after `done` steps and are not there."""
        if not self._hard.every:
            return []
        due = []
        for name in self._urls:
            epoch = self._hard.first_epoch(self._last_epoch(name, done))
            if epoch and self._step_of(name, epoch) == done and epoch not in self._vectors[name]:
                due.append((name, epoch))
        return due

    def _last_epoch(self, name: str, done: int) -> int:
        """The epoch of a set's last position in the batch after `done` steps."""
        end = (done + 1) * self._config.train.global_batch
        own = end if self._mixture is None else self._mixture.drawn(end)[name]
        return max(0, own - 1) // self._manifests[name].num_samples

    def _step_of(self, name: str, epoch: int) -> int:
        """Steps that are done when the vectors for the epochs from this one on are found."""
        position = epoch * self._manifests[name].num_samples
        return batch_of(position, self._config.train.global_batch, self._mixture, name)

    def _of(self, name: str, epoch: int) -> Path:
        return self._folder / (name or "train") / f"epoch-{epoch:08d}"

    def _remove_old(self, name: str, done: int) -> None:
        """Removes files that no resume needs: the two newest stay, and those of checkpoints."""
        epochs = self._epochs(name)
        storage = checkpoints_of(self._config.checkpoint, self._folder.parent)
        kept = {0, *epochs[-2:]}
        try:
            for step in (*list_candidates(storage), done):
                kept |= self._in_use(name, step)
            for epoch in epochs:
                if epoch not in kept:
                    shutil.rmtree(self._of(name, epoch))
        except OSError as error:
            log.warning("old vectors of data.hard_batches stay in %s: %s", self._folder, error)

    def _in_use(self, name: str, done: int) -> set[int]:
        """Epochs whose vectors order the batch after `done` steps."""
        batch = self._config.train.global_batch
        at = done * batch if self._mixture is None else self._mixture.drawn(done * batch)[name]
        first = at // self._manifests[name].num_samples
        return {self._hard.first_epoch(each) for each in (first, self._last_epoch(name, done))}

    def _epochs(self, name: str) -> list[int]:
        """Epochs from which files of vectors hold."""
        folders = (self._folder / (name or "train")).glob("epoch-*")
        return sorted(int(folder.name.removeprefix("epoch-")) for folder in folders)

    def _make_ready(self, start_step: int) -> None:
        for name, url in self._urls.items():
            for epoch in self._epochs(name):
                # Those that an earlier attempt found by weights that are lost.
                if epoch and self._step_of(name, epoch) > start_step:
                    shutil.rmtree(self._of(name, epoch))
            if not has_vectors(self._of(name, 0)):
                find_word_vectors(url, self._manifests[name], self._of(name, 0))

    def _open_all(self, start_step: int) -> None:
        for name in self._urls:
            self._open(name, 0)
            for needed in sorted(self._in_use(name, start_step) - {0}):
                if has_vectors(self._of(name, needed)) or self._step_of(name, needed) < start_step:
                    self._open(name, needed)

    def _open(self, name: str, epoch: int) -> None:
        """Opens vectors; raises ValueError if they are damaged or missing."""
        folder = self._of(name, epoch)
        try:
            # Read once: each of many ranks reading gigabytes would hold up a shared disk.
            content, verify = self._manifests[name].content, self._world.is_first
            found = open_vectors(folder, content, verify=verify)
        except OSError as error:
            raise ValueError(
                f"{folder}: the caption vectors for data.hard_batches are missing: {error}. All"
                " ranks must see the run's folder, and a run that resumes needs its files"
            ) from error
        self._vectors[name][epoch] = found
        # An epoch needs one, and a batch may span two.
        for old in sorted(self._vectors[name])[1:-2]:
            del self._vectors[name][old]
