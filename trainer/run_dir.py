"""The folder of a run: the configuration that owns it, and files that are replaced atomically.

config.json       the resolved configuration      log.jsonl       one event a line (run_log.py)
evaluation.json   the last evaluation             report.html     `tvr report`
dashboard.html    `tvr dashboard`
checkpoints/      one folder a step (checkpoint/)
launch/           a job on a cluster: record, script, attempts, output (tvr.launchers.job)
failures/         a job's first failure (failures.py)
metrics/          targets of the nodes for Prometheus, and their last values (monitor.py)
stalls/           progress and stacks of the ranks of a stalled job (watchdog.py)
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.checkpoint.catalogue import Checkpoint, Retention, newest_checkpoint
from tvr.trainer.config import CheckpointConfig, Config, from_json, to_json
from tvr.trainer.distributed.world import World
from tvr.trainer.records import Evaluation
from tvr.trainer.run_files import CONFIG, EVALUATION, named_settings

CHECKPOINTS = "checkpoints"

# Settings that may change when a run resumes: no result depends on them.
FREE = frozenset(
    {
        "data.workers",
        "data.cache_mib",
        "data.shard_cache",
        "data.shard_cache_gib",
        "data.max_bad",
        "data.max_bad_in_a_row",
        "data.max_unavailable_in_a_row",
        "train.eval_every",
        "train.log_every",
        "train.log_keys",
        "train.stall_factor",
        "train.stall_min_s",
        "train.gc_every",
        "train.timeout_s",
        "checkpoint.every",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "checkpoint.keep_best",
        "checkpoint.background",
        "metrics.enabled",
        "metrics.endpoint",
        "metrics.address",
        "metrics.host",
        "metrics.port",
        "metrics.peak_tflops",
        "metrics.writers",
    }
)

# Settings that may change as well: results then agree to rounding, no longer bit for bit.
ROUNDING = frozenset(
    {
        "train.zero_stage",
        "train.precision",
        "train.accumulation_dtype",
        "train.reduction_dtype",
        "train.overlap_comm",
        "train.offload",
        "train.activation_checkpointing",
        "train.compile",
        "train.micro_batch",
        "train.exchange",
        "train.scores",
    }
)


# Of each training set, this setting is FREE as well.
FREE_OF_SETS = re.compile(r"data\.train_sets\.\w+\.max_bad")


def claim(run_dir: Path, config: Config, world: World) -> None:
    """Makes `run_dir` the folder of this configuration, or checks that it is. All ranks call it.

    Raises:
        ValueError: it holds a run of another configuration, the differing settings named.
    """
    world.run_on_first(lambda: _claim(run_dir, config, world.world_size))


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


def write_evaluation(run_dir: Path, evaluation: Evaluation, step: int) -> None:
    """Replaces evaluation.json: the summary, as in the log, and the best videos of every query."""
    content = {"step": step, **evaluation.summary(), "queries": evaluation.queries}
    write_atomically(run_dir / EVALUATION, json.dumps(content, indent=1) + "\n")


def is_finished(run_dir: Path, config: Config) -> bool:
    """True if a run of these settings was trained, saved and evaluated to its last step."""
    found = newest_checkpoint(checkpoints_of(config.checkpoint, run_dir))
    steps = config.train.steps
    if found is None or found.state.step != steps or evaluated_step(run_dir) != steps:
        return False
    return read_config(run_dir) == config


def evaluated_step(run_dir: Path) -> int | None:
    """Returns the step of the last evaluation; None without one."""
    path = run_dir / EVALUATION
    return json.loads(path.read_text())["step"] if path.exists() else None


def _claim(run_dir: Path, config: Config, world_size: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CONFIG
    before = read_config(run_dir) if path.exists() else config
    saved = newest_checkpoint(checkpoints_of(before.checkpoint, run_dir))
    # Without a checkpoint no result depends on the stored settings yet, so all of them may change.
    if saved is not None:
        old, new = (dict(named_settings(asdict(settings))) for settings in (before, config))
        differing = [
            f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
            for name in old | new  # keys of train.deepspeed and sets may be in one of them only
            if old.get(name) != new.get(name) and not _may_change(name)
        ]
        differing += _other_negatives(before, saved, config, world_size)
        if differing:
            raise ValueError(
                f"{run_dir} holds a run of another configuration: {'; '.join(differing)}. "
                "Give the settings it was started with, or another folder"
            )
    write_atomically(path, to_json(config))


def _may_change(setting: str) -> bool:
    return setting in FREE | ROUNDING or FREE_OF_SETS.fullmatch(setting) is not None


def _other_negatives(before: Config, saved: Checkpoint, now: Config, world_size: int) -> list[str]:
    """Describes a change of the pairs of one loss, which would change the results."""
    was, is_now = before.train, now.train
    pairs = (was.micro_batch * saved.state.world_size, is_now.micro_batch * world_size)
    if is_now.gradient_cache or pairs[0] == pairs[1]:
        return []
    return [
        f"train.micro_batch x ranks, the pairs of one loss, was {was.micro_batch} x"
        f" {saved.state.world_size} = {pairs[0]}, is {is_now.micro_batch} x {world_size} ="
        f" {pairs[1]}"
    ]
