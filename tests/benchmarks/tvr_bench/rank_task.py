"""What `tvr bench train`, `save` and `metrics` run on each rank: real steps, timed."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tvr.data_prep.dataset.manifest import read_manifest
from tvr_bench.scraper import Scraper
from tvr.trainer.checkpoint.catalogue import Retention
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.checkpoint.place import Place
from tvr.trainer.checkpoint.saver import Saved, Saver, shard_files
from tvr.trainer.config import Config, from_json
from tvr.trainer.data import build_tokenizer, training_batches
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.random_state import get_random_state
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import build_model
from tvr.trainer.monitoring.monitor import NodeMonitor
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.server import FOLDER
from tvr.trainer.monitoring.stopwatch import Laps, Stopwatch
from tvr.trainer.train_step import OptimiserStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to time; `folder` takes log, checkpoints and the answer, `answer.json`."""

    what: str
    """One of "steps", "saves" and "metrics"."""
    config: str
    """As JSON."""
    folder: str
    count: int
    """Of steps or saves, of each kind, after what is not counted."""
    save_every: int = 0
    """Steps between saves; 0: none."""


def main(task: Task) -> None:
    """All ranks; rank 0 writes the answer."""
    config, folder = from_json(task.config, where="the task"), Path(task.folder)
    with join_world() as world:
        run = _Timed(config, folder, world)
        answer = {"steps": run.steps, "saves": run.saves, "metrics": run.metrics}[task.what](task)
        if world.is_first:
            (folder / "answer.json").write_text(json.dumps(answer))


class _Timed:
    """A run without evaluation, as `loop.train` builds it."""

    def __init__(self, config: Config, folder: Path, world: World) -> None:
        self._config, self._folder, self._world = config, folder, world
        data = config.data
        num_samples = read_manifest(data.train).num_samples
        tokenizer = build_tokenizer(config)
        self._attempt = world.run_on_first(lambda: begin_attempt(folder))
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=data.num_frames)
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._engine = Engine(model, config.train, world)
        self._watch = Laps(world.device)
        log = LogWriter(folder, self._attempt, world)
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
            elif self._all(saver.is_ready):
                saver.go_on()
            self._watch.lap("save")
            parts = self._watch.take()
            taken += [parts] if step else []  # the first one's caches were cold
        saver.finish()
        return self._answer(taken)

    def saves(self, task: Task) -> dict[str, Any]:
        """What saves of both kinds took, and steps without any between them."""
        savers = {kind: self._saver(kind, background=kind == "background") for kind in KINDS}
        found: dict[str, list[Any]] = {kind: [] for kind in (*KINDS, "step_s")}
        num_bytes = 0
        for counted in range(task.count + 1):
            for kind, saver in savers.items():
                plain = [self._advance() for _ in range(PLAIN_STEPS)]
                saved, record = self._save(saver)
                num_bytes = saved.num_bytes
                if counted:  # the first one's memory was new, and its caches were cold
                    found[kind].append(record)
                    found["step_s"] += plain
        return self._answer(found) | {"checkpoint_bytes": num_bytes}

    def metrics(self, task: Task) -> dict[str, Any]:
        """Seconds of steps with and without metrics, in turn, in blocks in which the endpoint is
        asked all the time and blocks in which it is not."""
        monitor = NodeMonitor(self._config, self._folder, self._world)
        monitor.begin(self._attempt, None)
        watches = {"on": monitor.watch, "off": Stopwatch()}
        steps = {kind: replace(self._step, watch=watch) for kind, watch in watches.items()}
        taken = {kind + how: [] for kind in (*steps, "monitor") for how in ("", "_scraped")}
        scraper = Scraper(self._target(), SCRAPES_PER_S) if self._world.is_first else None
        for block in range(2 + 2 * -(-task.count // BLOCK)):
            how = "_scraped" if block % 2 else ""
            if scraper is not None:
                scraper.hold(not how)
            for turn in range(2 * BLOCK):
                kind = ("on", "off")[(turn + block // 2) % 2]  # none is always the first
                self._done += 1
                before = time.perf_counter()
                record = steps[kind].take(self._done, self._batches)
                between = time.perf_counter()
                if kind == "on":
                    monitor.step(record, steps[kind].tally)
                after = time.perf_counter()
                if block > 1:  # before, caches were cold
                    taken[kind + how].append(after - before)
                    taken["monitor" + how] += [after - between] if kind == "on" else []
        if scraper is None:
            monitor.end(well=True)
            return self._answer(taken)
        scraper.hold(False)
        monitor.end(well=True)
        return self._answer(taken) | {"scrapes": scraper.count(), "scraped_s": scraper.seconds}

    def _target(self) -> str:
        (file,) = (self._folder / FOLDER).glob("*.json")
        return f"http://{json.loads(file.read_text())[0]['targets'][0]}/metrics"

    def _save(self, saver: Saver) -> tuple[Saved, dict[str, float]]:
        """One save, and the seconds from its begin to its end, in which training goes on."""
        self._world.barrier()
        before, steps = time.perf_counter(), 0
        ended = saver.save(self._state(), self._staged)
        while not ended:
            self._advance()
            steps += 1
            if self._all(saver.is_ready):
                ended = saver.go_on()
        (saved,) = ended
        if saved.error is not None:
            raise OSError(saved.error)
        seconds = time.perf_counter() - before
        return saved, {"waited_s": saved.held_up_s, "seconds": seconds, "steps": steps}

    def _advance(self) -> float:
        """The step's seconds."""
        self._done += 1
        return self._step.take(self._done, self._batches)["step_s"]

    def _all(self, ready: bool) -> bool:
        return all(self._world.all_gather_counts(int(ready)))

    def _saver(self, name: str, *, background: bool) -> Saver:
        return Saver(
            Place(str(self._folder / name)),
            self._world,
            self._attempt,
            Retention(last=1, every=0, best=False),
            background=background,
        )

    def _staged(self, copy: bool) -> dict[str, Any]:
        return shard_files(self._engine.state_dict(copy=copy), self._world.rank, get_random_state())

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
            "by_rank": self._world.all_gather_objects(mine),
            "parameters": self._num_parameters,
            "threads": torch.get_num_threads(),
            "device": self._world.device.type,
        }


BLOCK = 25  # steps of each kind
SCRAPES_PER_S = 50
KINDS = ("background", "synchronous")
PLAIN_STEPS = 3
"""Before each save, to compare with."""


if __name__ == "__main__":
    main(Task(**json.loads(Path(sys.argv[1]).read_text())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo may abort a process that is taken down
