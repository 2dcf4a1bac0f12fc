"""The folder of a run: the configuration that owns it, and files that are replaced atomically.

config.json       the resolved configuration      log.jsonl       one event a line (run_log.py)
evaluation.json   the last evaluation             report.html     `tvr report`
evaluation-step-00000300.json   `tvr evaluate --checkpoint` of another one
dashboard.html    `tvr dashboard`
checkpoints/      one folder a step (checkpoint/)
hard_batches/     vectors of the captions for data.hard_batches (hard_batches/)
launch/           a job on a cluster: record, script, attempts, output (tvr.launchers.job)
failures/         a job's first failure (failures.py)
metrics/          targets of the nodes for Prometheus, and their last values (monitor.py)
stalls/           progress and stacks of the ranks of a stalled job (watchdog.py)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.checkpoint.catalogue import Checkpoint, Retention, newest_checkpoint
from tvr.trainer.checkpoint.resume_rules import find_changes, refusal_text, settings_of
from tvr.trainer.config import CheckpointConfig, Config, from_json, to_json
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.records import Evaluation
from tvr.trainer.run_files import CONFIG, EVALUATION, step_evaluation

CHECKPOINTS = "checkpoints"

log = logging.getLogger(__name__)

# Files by which a tokeniser is recognised, and the one that gives the shape of a model.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")
MODEL_FILES, OPEN_CLIP_FILES = ("config.json",), ("open_clip_config.json",)
POOLING_FILES, PIXEL_FILES = ("1_Pooling/config.json",), ("preprocessor_config.json",)


@dataclass(frozen=True, slots=True)
class Claim:
    """A run's folder, as a start of the run found it."""

    before: Config
    """Settings of the start before; those of this one if it is the first."""
    contents: Mapping[str, str]
    """Digests of the data sets and model folders of this start, by setting."""


def claim(
    run_dir: Path, config: Config, world: World, contents: Mapping[str, str] = MappingProxyType({})
) -> Claim:
    """Makes `run_dir` the folder of this configuration, or checks that it may continue the run.

    All ranks call it. `checkpoint.resume_rules` says which settings may differ.

    Args:
        contents: Digests of the data sets, see `DataSets`.

    Raises:
        ValueError: it holds a run of another configuration, the differing settings named.
    """
    return world.run_on_first(lambda: _claim(run_dir, config, world.world_size, contents))


def read_config(run_dir: Path) -> Config:
    """The configuration of an existing run.

    Raises:
        ValueError: there is none, or it is of another version of the program.
    """
    path = run_dir / CONFIG
    if not path.exists():
        raise ValueError(f"{run_dir} is no run: it has no {CONFIG}")
    return from_json(path.read_text(), where=str(path))


def checkpoints_of(checkpoint: CheckpointConfig, run_dir: Path) -> StorageFolder:
    """Returns the storage of a run's checkpoints."""
    return StorageFolder(checkpoint.url or str(run_dir / CHECKPOINTS))


def retention(checkpoint: CheckpointConfig) -> Retention:
    """Returns the rule for the checkpoints that are kept."""
    return Retention(
        last=checkpoint.keep_last, every=checkpoint.keep_every, best=checkpoint.keep_best
    )


def write_evaluation(
    run_dir: Path, evaluation: Evaluation, step: int, *, is_last: bool = True
) -> None:
    """Writes an evaluation: the summary, as in the log, and the best videos of every query.

    Args:
        is_last: False: evaluation.json stays that of the last step, and the step gets a file of
            its own.
    """
    content = evaluation.document() | {"step": step}
    name = EVALUATION if is_last else step_evaluation(step)
    write_atomically(run_dir / name, json.dumps(content, indent=1) + "\n")


def is_finished(run_dir: Path, config: Config) -> bool:
    """True if a run of these settings was trained, saved and evaluated to its last step."""
    found = newest_checkpoint(checkpoints_of(config.checkpoint, run_dir))
    steps = config.train.steps
    if found is None or found.state.step != steps or evaluated_step(run_dir) != steps:
        return False
    return read_config(run_dir) == config


def remove_later_evaluations(run_dir: Path, step: int) -> None:
    """Removes the stored evaluations of steps after `step`, which are trained anew."""
    for path in [run_dir / EVALUATION, *run_dir.glob("evaluation-step-*.json")]:
        if path.exists() and json.loads(path.read_text())["step"] > step:
            path.unlink()


def evaluated_step(run_dir: Path) -> int | None:
    """Returns the step of the last evaluation; None without one."""
    path = run_dir / EVALUATION
    return json.loads(path.read_text())["step"] if path.exists() else None


def _claim(
    run_dir: Path, config: Config, world_size: int, data_contents: Mapping[str, str]
) -> Claim:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CONFIG
    before = _stored_config(path) if path.exists() else config
    contents = {**data_contents, **_model_contents(config)}
    saved = _saved_checkpoint(run_dir, before, config)
    # Without a checkpoint no result depends on the stored settings yet, so all of them may change.
    if saved is not None:
        settings = settings_of(saved.state, before)
        changes = find_changes(saved.state, settings, config, contents, world_size)
        if text := refusal_text(str(run_dir), changes):
            raise ValueError(text)
    write_atomically(path, to_json(config))
    return Claim(before, contents)


def _stored_config(path: Path) -> Config:
    """The settings of a run, with those that its release did not have as it behaved."""
    stored = json.loads(path.read_text())
    loss, data = stored.get("loss", {}), stored.get("data", {})
    if loss.get("similarity") == "neg_nce" and loss.get("neg_nce_mode") == "log":
        loss.setdefault("mask_equal_captions", False)
    data.setdefault("frame_spacing", "index")
    return from_json(json.dumps({**stored, "loss": loss, "data": data}), where=str(path))


def _saved_checkpoint(run_dir: Path, before: Config, config: Config) -> Checkpoint | None:
    """The run's newest checkpoint, at the place that its settings name now.

    Raises:
        ValueError: the place was changed, and the newest checkpoint is not there.
    """
    storage = checkpoints_of(config.checkpoint, run_dir)
    saved = newest_checkpoint(storage)
    if before.checkpoint.url == config.checkpoint.url:
        return saved
    left = checkpoints_of(before.checkpoint, run_dir)
    try:
        old = newest_checkpoint(left)
    except (OSError, PreflightFailed) as error:
        if saved is None:
            raise
        log.warning("%s cannot be read, %s is used: %s", left.url, storage.url, error)
        old = None
    if old is not None and (saved is None or saved.state.step < old.state.step):
        there = "no checkpoint" if saved is None else f"only {saved.name}"
        raise ValueError(
            f"checkpoint.url was {before.checkpoint.url!r}, is {config.checkpoint.url!r}:"
            f" {left.url} holds {old.name} of this run, {storage.url} {there}. Copy the checkpoints"
            " there, or give the old place"
        )
    return saved


def _model_contents(config: Config) -> dict[str, str]:
    """Digests of the files that decide the shape of a pretrained model, and its vocabulary."""
    model, found = config.model, {}
    for setting, folder, names in (
        ("model.pretrained", model.pretrained, _pretrained_files(model.pretrained)),
        ("model.text_tower", model.text_tower, (*MODEL_FILES, *POOLING_FILES)),
        ("model.vision_tower", model.vision_tower, (*MODEL_FILES, *PIXEL_FILES)),
        (
            "model.tokenizer",
            model.tokenizer or model.text_tower or model.pretrained,
            VOCABULARY_FILES,
        ),
    ):
        files = [] if folder is None else [Path(folder) / name for name in names]
        content = [(path.name, path.read_bytes()) for path in files if path.is_file()]
        if content:
            found[setting] = hashlib.sha256(repr(content).encode()).hexdigest()
    return found


def _pretrained_files(folder: str | None) -> tuple[str, ...]:
    """The files that decide the shape of a pretrained model; open_clip's where it is read."""
    try:
        content = json.loads((Path(folder or "") / "config.json").read_text())
    except (OSError, ValueError):
        return OPEN_CLIP_FILES
    return MODEL_FILES if "model_type" in content else (*MODEL_FILES, *OPEN_CLIP_FILES)
