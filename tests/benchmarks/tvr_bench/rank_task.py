"""The ranks of `tvr bench train`, `save` and `metrics`: real training steps, timed.

python -m tvr_bench.rank_task TASK.json, under a launcher.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tvr_bench.scraper import Scraper

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.launchers.rank_main import end_process
from tvr.trainer.build_run import build_run
from tvr.trainer.checkpoint.catalogue import Retention
from tvr.trainer.checkpoint.saver import Saver
from tvr.trainer.config import Config, from_json
from tvr.trainer.data import build_tokenizer, training_set_sizes
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.monitoring.monitor import NodeMonitor
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.server import FOLDER
from tvr.trainer.monitoring.stopwatch import LapStopwatch, Stopwatch
from tvr.trainer.records import SaveResult

BLOCK_STEPS = 25
"""Steps with metrics, and as many without, in a block that is scraped or not."""
SCRAPES_PER_S = 50
SAVE_KINDS = ("background", "synchronous")
PLAIN_STEPS = 3
"""Steps without a save before each save, to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """Measurement task; `folder` receives log, checkpoints and the result, `answer.json`."""

    what: str
    """One of "steps", "saves" and "metrics"."""
    config: str
    """The run's configuration as JSON."""
    folder: str
    count: int
    """Steps or saves of each kind, after a warm-up."""
    save_every: int = 0
    """Steps between saves; 0: none."""


def main(task: RankTask) -> None:
    """Runs the task on this rank; rank 0 writes the result of all ranks."""
    config, folder = from_json(task.config, where="the task"), Path(task.folder)
    with join_world() as world:
        run = _TimedRun(config, folder, world)
        answer = {"steps": run.steps, "saves": run.saves, "metrics": run.metrics}[task.what](task)
        if world.is_first:
            (folder / "answer.json").write_text(json.dumps(answer))


class _TimedRun:
    """A training run without evaluation."""

    def __init__(self, config: Config, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._num_parameters = 0
        self._watch = LapStopwatch(world.device)
        attempt = world.run_on_first(lambda: begin_attempt(folder))

        def count_parameters(model: TextVideoModel) -> None:
            self._num_parameters = sum(p.numel() for p in model.parameters())

        self._run = build_run(
            config,
            folder,
            world,
            attempt=attempt,
            log=LogWriter(folder, attempt, world),
            tokenizer=build_tokenizer(config.model, config.data),
            num_samples=training_set_sizes(config.data),
            inspect_model=count_parameters,
            watch=self._watch,
        )
        self._batches = self._run.batches()
        self._done = 0

    def steps(self, task: RankTask) -> dict[str, Any]:
        """Times every step by part, on every rank."""
        background = self._run.config.checkpoint.background
        saver = self._saver("checkpoints", background=background)
        timed = []
        for step in range(task.count + 1):
            self._train_step()
            if task.save_every and step and step % task.save_every == 0:
                saver.save(self._run.saved_state(self._done), self._run.state_dict)
            elif self._all(saver.is_ready):
                saver.advance()
            self._watch.lap("save")
            parts = self._watch.pop_all()
            if step:  # the first step warms up caches
                timed.append(parts)
        saver.finish()
        return self._answer(timed)

    def saves(self, task: RankTask) -> dict[str, Any]:
        """Times saves of both kinds in turn, and steps without a save between them."""
        savers = {kind: self._saver(kind, background=kind == "background") for kind in SAVE_KINDS}
        timed: dict[str, list[Any]] = {kind: [] for kind in (*SAVE_KINDS, "step_s")}
        num_bytes = 0
        for counted in range(task.count + 1):
            for kind, saver in savers.items():
                plain = [self._train_step() for _ in range(PLAIN_STEPS)]
                saved, record = self._save(saver)
                num_bytes = saved.num_bytes
                if counted:  # the first save warms up memory and caches
                    timed[kind].append(record)
                    timed["step_s"] += plain
        return self._answer(timed) | {"checkpoint_bytes": num_bytes}

    def metrics(self, task: RankTask) -> dict[str, Any]:
        """Times steps with and without metrics in turn, in blocks with and without scrapes."""
        monitor = NodeMonitor(self._run.config, self._folder, self._world)
        monitor.start(self._run.attempt, 0)
        watches = {"on": monitor.watch, "off": Stopwatch()}
        steps = {
            kind: replace(self._run.train_step, watch=watch) for kind, watch in watches.items()
        }
        timed = {kind + how: [] for kind in (*steps, "monitor") for how in ("", "_scraped")}
        scraper = Scraper(self._endpoint(), SCRAPES_PER_S) if self._world.is_first else None
        for block in range(2 + 2 * -(-task.count // BLOCK_STEPS)):
            how = "_scraped" if block % 2 else ""
            if scraper is not None:
                (scraper.resume if how else scraper.pause)()
            for turn in range(2 * BLOCK_STEPS):
                kind = ("on", "off")[(turn + block // 2) % 2]  # the kinds alternate in going first
                self._done += 1
                before = time.perf_counter()
                record = steps[kind](self._done, self._batches)
                between = time.perf_counter()
                if kind == "on":
                    monitor.on_step(record, steps[kind].counters)
                after = time.perf_counter()
                if block > 1:  # the first blocks warm up caches
                    timed[kind + how].append(after - before)
                    timed["monitor" + how] += [after - between] if kind == "on" else []
        if scraper is None:
            monitor.close(succeeded=True)
            return self._answer(timed)
        scraper.resume()
        monitor.close(succeeded=True)
        return self._answer(timed) | {"scrapes": scraper.count(), "scraped_s": scraper.seconds}

    def _endpoint(self) -> str:
        (file,) = (self._folder / FOLDER).glob("*.json")
        return f"http://{json.loads(file.read_text())[0]['targets'][0]}/metrics"

    def _save(self, saver: Saver) -> tuple[SaveResult, dict[str, float]]:
        """Trains until one save has ended; returns it, its seconds, and the steps meanwhile."""
        self._world.barrier()
        before, steps = time.perf_counter(), 0
        ended = saver.save(self._run.saved_state(self._done), self._run.state_dict)
        while not ended:
            self._train_step()
            steps += 1
            if self._all(saver.is_ready):
                ended = saver.advance()
        (saved,) = ended
        if saved.error is not None:
            raise OSError(saved.error)
        seconds = time.perf_counter() - before
        return saved, {"waited_s": saved.blocked_s, "seconds": seconds, "steps": steps}

    def _train_step(self) -> float:
        """Runs one step; returns its seconds."""
        self._done += 1
        return self._run.train_step(self._done, self._batches).step_s

    def _all(self, ready: bool) -> bool:
        return all(self._world.all_gather_counts(int(ready)))

    def _saver(self, name: str, *, background: bool) -> Saver:
        return Saver(
            StorageFolder(str(self._folder / name)),
            self._world,
            self._run.attempt,
            Retention(last=1, every=0, best=False),
            background=background,
        )

    def _answer(self, timed: Any) -> dict[str, Any]:
        return {
            "by_rank": self._world.all_gather_objects(timed),
            "parameters": self._num_parameters,
            "threads": torch.get_num_threads(),
            "device": self._world.device.type,
        }


if __name__ == "__main__":
    main(RankTask(**json.loads(Path(sys.argv[1]).read_text())))
    end_process(EXIT_DONE)
