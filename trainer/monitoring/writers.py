"""Writes a run's log for TensorBoard, Weights & Biases (offline) and MLflow (files).

All of them write into run_dir, in a thread of rank 0. Nothing is sent over the network.

    run_dir/tensorboard/    one event file per start of the run
    run_dir/wandb/          one offline run per start; `wandb sync` uploads it
    run_dir/mlruns/         one run per start; `mlflow ui --backend-store-uri` shows them
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from tvr.trainer.config import Config, WriterName, to_json

# The end of a run waits at most this long for values that are still to be written.
CLOSE_S = 60.0
# Module that each tool needs; the extra that installs it has the tool's name.
NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A tool that stores numbers over the steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Stores numbers by name, such as `train/loss`."""
        ...

    def close(self) -> None: ...


class Writers:
    """The configured tools. If one raises an error, it is logged once and that tool is closed."""

    def __init__(self, config: Config, run_dir: Path, start_step: int, attempt: int) -> None:
        """Raises ValueError if one of them is not installed."""
        names = config.metrics.writers
        check_installed(names)
        self._open: dict[WriterName, Writer] = {}
        for name in names:
            try:
                self._open[name] = OPEN[name](config, run_dir, start_step, attempt)
            except Exception as error:
                _log_failure(name, error)
        self._queue: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="writers", daemon=True)
        self._thread.start()

    def write(self, step: int, kind: str, record: Mapping[str, Any]) -> None:
        """Queues the numbers of a record; `kind` is the first part of their names."""
        if self._open:
            self._queue.put((step, dict(_numbers(record, kind))))

    def close(self) -> None:
        """Writes the queued values and closes the tools."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("the last values are not written after %.0f s: %s", CLOSE_S, [*self._open])

    def _work(self) -> None:
        while (found := self._queue.get()) is not None:
            self._on_all(lambda writer, found=found: writer.write(*found))
        self._on_all(lambda writer: writer.close())

    def _on_all(self, action: Callable[[Writer], None]) -> None:
        for name, writer in list(self._open.items()):
            try:
                action(writer)
            except Exception as error:
                del self._open[name]
                _log_failure(name, error)


def _log_failure(name: WriterName, error: Exception) -> None:
    log.warning("%s gets no more values: %s: %s", name, type(error).__name__, error)


def check_installed(names: Sequence[WriterName]) -> None:
    """Raises ValueError for the first tool that is not installed, and names its extra."""
    for name in names:
        if find_spec(NEEDS[name]) is None:
            raise ValueError(f"metrics.writers={name} needs a package: pip install 'tvr[{name}]'")


class _TensorBoard:
    def __init__(self, config: Config, run_dir: Path, start_step: int, attempt: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Removes what an earlier start wrote beyond the checkpoint.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self._writer.add_text("config", f"```json\n{to_json(config)}```", start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, run_dir: Path, start_step: int, attempt: int) -> None:
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            mode="offline",
            dir=str(run_dir),
            project="tvr",
            group=run_dir.resolve().name,
            name=f"{run_dir.resolve().name}-{attempt}",
            config=asdict(config),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, config: Config, run_dir: Path, start_step: int, attempt: int) -> None:
        # MLflow no longer develops its file store, and refuses it without this variable.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=(run_dir / "mlruns").resolve().as_uri())
        name = run_dir.resolve().name
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=f"{name}-{attempt}")
        self._id = run.info.run_id
        for section, settings in asdict(config).items():
            for setting, value in settings.items():
                self._client.log_param(self._id, f"{section}.{setting}", json.dumps(value))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


OPEN: dict[WriterName, Callable[[Config, Path, int, int], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}/{name}", float(value)
