"""`tvr train --dry-run`: tables of what a run would do, and one step on random data.

It writes nothing to the run's folder. Data sets need not exist. The model's folder must hold
config.json and a tokeniser, which give the shapes; for the step it must hold the weights too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tvr.data_prep.dataset.manifest import Manifest, check_words, read_manifest
from tvr.trainer.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    TrainConfig,
    accumulation_steps,
)
from tvr.trainer.data import build_tokenizer, check_mixed_sets, training_mixture, training_sets
from tvr.trainer.distributed.world import World
from tvr.trainer.dry_run.synthetic_step import run_synthetic_step, single_rank_config
from tvr.trainer.engine.deepspeed_config import deepspeed_config
from tvr.trainer.engine.schedule import learning_rate_factor
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.frozen.tower_outputs import check_settings
from tvr.trainer.memory.environment import device_line
from tvr.trainer.memory.model_memory import checkpoint_bytes
from tvr.trainer.memory.rank_memory import free_bytes, rank_memory
from tvr.trainer.model.model import TextVideoModel, build_meta_model
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.monitoring.step_record import log_event
from tvr.trainer.resilience.preflight import check_disk, preflight

Row = Sequence[str]
SHARES_OF_RUN = (0.0, 0.1, 0.5, 1.0)


def dry_run(
    config: Config, run_dir: Path, *, ranks: int, samples: int | None, console: Console
) -> None:
    """Prints what a run on `ranks` ranks would do, and runs one rank's share of a step here.

    Args:
        samples: Size of the training set, if it does not exist yet.

    Raises:
        ValueError: settings, data or the model folder cannot be used, or a launcher started this
            process as one of several ranks.
    """
    if "RANK" in os.environ:
        raise ValueError("--dry-run runs in one process: omit `tvr launch`, and give --ranks")
    data, train = config.data, config.train
    deepspeed_config(train, ranks)  # raises for settings that do not fit together
    check_settings(config)
    sets = dict(_data_sets(data))
    samples = _training_samples(data, sets, samples)
    tokenizer = build_tokenizer(config.model, config.data)
    model = build_meta_model(config.model, config.loss, tokenizer, num_frames=data.num_frames)
    needs = rank_memory(config, tokenizer, ranks)
    for title, header, rows in (
        ("data", ("samples", "captions", "shards"), _data_rows(data, sets)),
        (f"batches on {ranks} ranks", ("",), _batch_rows(data, train, ranks, samples)),
        *_set_tables(data, train, sets),
        ("learning rate at step", ("heads", "towers"), _rate_rows(train)),
        ("parameters", ("tensors", "numbers", "peak rate", "decay"), _group_rows(train, model)),
        (f"memory of one rank of {ranks}", ("MB",), needs.rows()),
        ("checkpoints", ("",), _checkpoint_rows(config.checkpoint, data, train, model)),
        ("problems that would stop a run on this machine", (), _refusals(config, run_dir, model)),
    ):
        console.print(_table(title, header, rows))
    console.print(_step(config, tokenizer, ranks))


def _data_sets(data: DataConfig) -> Iterator[tuple[str, Manifest | None]]:
    """Yields each configured data set by its field, with None for one that does not exist yet."""
    for name, url in _urls(data):
        try:
            manifest = read_manifest(url)
        except FileNotFoundError:
            manifest = None
        if manifest is not None and data.content_words:
            check_words(url, manifest, needed_by="data.content_words")
        yield name, manifest


def _urls(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yields the field and the address of each configured data set."""
    for each in training_sets(data):
        yield f"train_sets.{each.name}" if each.name else "train", each.url
    if data.test is not None:
        yield "test", data.test
    if data.test_exchanged is not None:
        yield "test_exchanged", data.test_exchanged


def _training_samples(
    data: DataConfig, sets: Mapping[str, Manifest | None], given: int | None
) -> int | None:
    if data.train_sets:
        if given is not None:
            raise ValueError(
                f"--samples {given} is the size of data.train, and this run has data.train_sets"
            )
        found = [sets[f"train_sets.{name}"] for name in data.train_sets]
        known = [manifest.num_samples for manifest in found if manifest is not None]
        return sum(known) if len(known) == len(found) else None
    train = sets["train"]
    if train is None:
        return given
    if given is not None:
        raise ValueError(
            f"--samples {given} is for a training set that does not exist, and {data.train} "
            f"holds {train.num_samples} samples"
        )
    return train.num_samples


def _data_rows(data: DataConfig, sets: dict[str, Manifest | None]) -> Iterator[Row]:
    urls = dict(_urls(data))
    for name, manifest in sets.items():
        title = f"data.{name}: {urls[name]}"
        if manifest is None:
            yield title, "missing", "", ""
        else:
            counts = (manifest.num_samples, manifest.num_captions, len(manifest.shards))
            yield title, *(f"{count:,}" for count in counts)


def _batch_rows(
    data: DataConfig, train: TrainConfig, ranks: int, samples: int | None
) -> Iterator[Row]:
    micro_steps = accumulation_steps(train, ranks)
    pairs = train.global_batch if train.gradient_cache else train.micro_batch * ranks
    yield (
        "pairs per step",
        f"{train.global_batch:,} = {train.micro_batch:,} per micro-batch x {ranks:,} ranks x "
        f"{micro_steps:,} micro-steps",
    )
    yield "pairs per loss", f"{pairs:,}: {pairs - 1:,} negatives for each caption"
    yield "frames per forward of a rank", f"{train.micro_batch * data.num_frames:,}"
    yield "steps", f"{train.steps:,}"
    if samples is None:
        hint = "" if data.train_sets else "; give its size by --samples N"
        yield "steps per epoch", f"unknown without the training set{hint}"
    else:
        yield "steps per epoch", f"{samples / train.global_batch:,.2f} ({samples:,} samples)"
        yield "epochs", f"{train.steps * train.global_batch / samples:,.2f}"


def _set_tables(
    data: DataConfig, train: TrainConfig, sets: Mapping[str, Manifest | None]
) -> Iterator[tuple[str, Row, Iterator[Row]]]:
    """Yields the table of several training sets: their shares and epochs."""
    mixture = training_mixture(data, train)
    if mixture is None:
        return
    found = {name: sets[f"train_sets.{name}"] for name in mixture.names}
    check_mixed_sets({name: each for name, each in found.items() if each is not None}, data, train)
    drawn = mixture.drawn(train.steps * train.global_batch)

    def rows() -> Iterator[Row]:
        for name, share in zip(mixture.names, mixture.shares, strict=True):
            manifest, pairs = found[name], train.global_batch * share
            epochs = steps = "unknown"
            if manifest is not None:
                epochs = f"{drawn[name] / manifest.num_samples:,.2f}"
                steps = f"{manifest.num_samples / pairs:,.2f}"
            yield name, f"{share:.2%}", f"{pairs:,.1f}", steps, epochs

    header = ("share", "pairs of a step", "steps per epoch", "epochs of the run")
    yield "training sets", header, rows()


def _rate_rows(train: TrainConfig) -> Iterator[Row]:
    for share in SHARES_OF_RUN:
        step = round(share * (train.steps - 1))
        factor = learning_rate_factor(step, warmup_steps=train.warmup_steps, steps=train.steps)
        rates = (train.learning_rate * factor, train.encoder_learning_rate * factor)
        yield f"{step + 1:,} ({share:.0%})", *(f"{rate:.3g}" for rate in rates)


def _group_rows(train: TrainConfig, model: TextVideoModel) -> Iterator[Row]:
    for group in parameter_groups(model, train):
        members = cast(list[Tensor], group["params"])
        yield (
            str(group["name"]),
            f"{len(members):,}",
            f"{sum(p.numel() for p in members):,}",
            f"{group['peak']:.3g}",
            f"{group['weight_decay']:.3g}",
        )


def _checkpoint_rows(
    rule: CheckpointConfig, data: DataConfig, train: TrainConfig, model: TextVideoModel
) -> Iterator[Row]:
    steps = train.steps
    size = checkpoint_bytes(model, train)
    saved = -(-steps // rule.every) if rule.every else 1
    kept = min(saved, rule.keep_last + (steps // rule.keep_every if rule.keep_every else 0))
    best = int(rule.keep_best and data.test is not None and kept < saved)
    yield "size of each", f"{size / 1e6:,.0f} MB"
    yield "saved", f"{saved:,}, every {rule.every or steps:,} steps"
    yield (
        "kept at most",
        f"{kept + best:,}: {(kept + best) * size / 1e9:,.1f} GB, and {size / 1e9:,.1f} GB while "
        "the next one is written",
    )


def _refusals(config: Config, run_dir: Path, model: TextVideoModel) -> Iterator[Row]:
    """Yields the problems that the checks before a run find on this machine."""
    alone, was_there = World(rank=0, world_size=1, device=torch.device("cpu")), run_dir.exists()
    found = []
    for check in (
        lambda: preflight(config, run_dir, alone),
        lambda: check_disk(config.checkpoint, config.train, run_dir, model, alone),
    ):
        try:
            check()
        except PreflightFailed as failed:
            found += failed.lines
    if not was_there:
        with suppress(OSError):  # the checks did not create it, or another run uses it
            run_dir.rmdir()
    yield from ((line,) for line in found or ["nothing"])


def _step(config: Config, tokenizer: Tokenizer, ranks: int) -> Table | str:
    """Runs one rank's share of a step here, or explains why it does not fit."""
    alone = single_rank_config(config, ranks)
    needed, free = rank_memory(alone, tokenizer, 1).total, free_bytes()
    if needed > free:
        return (
            f"No step was run: a single rank would need {needed / 1e6:,.0f} MB, and "
            f"{free / 1e6:,.0f} MB are free ({device_line()}). Reduce --train.micro-batch or "
            "--train.global-batch"
        )
    values = log_event(run_synthetic_step(alone, tokenizer))
    shown = ("loss", "similarity_loss", "tpm_cl_loss", "gradient_norm", "step_s")
    rows = [(name, f"{values[name]:.4g}") for name in shown if values[name] is not None]
    title = f"one step of {alone.train.global_batch:,} random pairs on a single rank"
    return _table(title, (device_line(),), rows)


def _table(title: str, header: Row, rows: Iterable[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for name in header:
        table.add_column(name, justify="right" if len(header) > 1 else "left")
    for row in rows:
        table.add_row(*row)
    return table
