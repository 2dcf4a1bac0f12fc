"""What `tvr bench train` and `tvr bench save` run on each rank: real steps with a watch in them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvr.data_prep.manifest import read_manifest
from tvr.trainer.attempt import begin_attempt
from tvr.trainer.checkpoint import Retention
from tvr.trainer.checkpoint_manifest import SavedState
from tvr.trainer.config import Config, from_json
from tvr.trainer.engine import Engine
from tvr.trainer.inputs import tokenizer_of, training_batches
from tvr.trainer.model import build_model
from tvr.trainer.place import Place
from tvr.trainer.random_state import random_state
from tvr.trainer.run_log import LogWriter
from tvr.trainer.saver import Saver, shard_files
from tvr.trainer.step import OptimiserStep
from tvr.trainer.stopwatch import Laps
from tvr.trainer.world import World, join_world


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to time; `folder` takes log, checkpoints and the answer, `answer.json`."""

    what: str
    """Either "steps" or "saves"."""
    config: str
    """As JSON."""
    folder: str
    count: int
    """Of steps, or of saves of either kind, after one that is not counted."""
    save_every: int = 0
    """Steps between saves; 0: none."""


def main(task: Task) -> None:
    """All ranks; rank 0 writes the answer."""
    config, folder = from_json(task.config, where="the task"), Path(task.folder)
    with join_world() as world:
        run = _Timed(config, folder, world)
        answer = run.steps(task) if task.what == "steps" else run.saves(task)
        if world.is_first:
            (folder / "answer.json").write_text(json.dumps(answer))


class _Timed:
    """A run without evaluation, as `loop.train` builds it."""

    def __init__(self, config: Config, folder: Path, world: World) -> None:
        self._config, self._folder, self._world = config, folder, world
        data = config.data
        tokenizer = tokenizer_of(config)
        self._attempt = world.from_first(lambda: begin_attempt(folder))
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=data.num_frames)
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._engine = Engine(model, config.train, world)
        self._watch = Laps(world.device)
        log = LogWriter(folder, self._attempt, world)
        num_samples = read_manifest(data.train).num_samples
        self._step = OptimiserStep(config, self._engine, log, world, num_samples, watch=self._watch)
        self._batches = training_batches(config, tokenizer, world)
        self._done = 0

    def steps(self, task: Task) -> dict[str, Any]:
        """Seconds of every counted step by part, on every rank."""
        saver = self._saver("checkpoints", background=self._config.checkpoint.background)
        taken = []
        for step in range(task.count + 1):
            self._advance()
            if task.save_every and step and step % task.save_every == 0:
                saver.save(self._state(), self._staged)
            elif self._all_have(saver.is_written):
                saver.publish()
            self._watch.lap("save")
            parts = self._watch.take()
            taken += [parts] if step else []  # the first one's caches were cold
        saver.finish()
        return self._answer(taken)

    def saves(self, task: Task) -> dict[str, Any]:
        """Seconds that steps waited for each save in the background, and for each that was not."""
        savers = {kind: self._saver(kind, background=kind == "background") for kind in KINDS}
        waits: dict[str, list[float]] = {kind: [] for kind in KINDS}
        num_bytes = 0
        for _ in range(task.count + 1):
            for kind, saver in savers.items():
                self._advance()
                self._world.barrier()
                ended, waited_s = _timed(lambda s=saver: s.save(self._state(), self._staged))
                while kind == "background" and not ended:
                    self._advance()  # training goes on while it is written
                    if self._all_have(saver.is_written):
                        published, more_s = _timed(lambda s=saver: s.publish())
                        ended, waited_s = [published], waited_s + more_s
                if ended[0].error is not None:
                    raise OSError(ended[0].error)
                waits[kind].append(waited_s)
                num_bytes = ended[0].num_bytes
        mine = {kind: found[1:] for kind, found in waits.items()}
        return self._answer(mine) | {"checkpoint_bytes": num_bytes}

    def _advance(self) -> None:
        self._done += 1
        self._step.take(self._done, self._batches)

    def _all_have(self, written: bool) -> bool:
        return all(self._world.gather_counts(int(written)))

    def _saver(self, name: str, *, background: bool) -> Saver:
        return Saver(
            Place(str(self._folder / name)),
            self._world,
            self._attempt,
            Retention(last=1, every=0, best=False),
            background=background,
        )

    def _staged(self) -> dict[str, Any]:
        return shard_files(self._engine.stage(), self._world.rank, random_state())

    def _state(self) -> SavedState:
        return SavedState(
            step=self._done,
            world_size=self._world.world_size,
            zero_stage=self._config.train.zero_stage,
            precision=self._config.train.precision,
            attempt=self._attempt.number,
            quarantine={},
            metrics={},
            files={},
        )

    def _answer(self, mine: Any) -> dict[str, Any]:
        return {
            "by_rank": self._world.gather_objects(mine),
            "parameters": self._num_parameters,
            "threads": torch.get_num_threads(),
            "device": self._world.device.type,
        }


KINDS = ("background", "synchronous")


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    before = time.perf_counter()
    return action(), time.perf_counter() - before


if __name__ == "__main__":
    main(Task(**json.loads(Path(sys.argv[1]).read_text())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo may abort a process that is taken down
