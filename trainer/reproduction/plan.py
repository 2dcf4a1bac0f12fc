"""The commands of a reproduction, in their order. Nothing is run or written here."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tvr.trainer.config import Config, merged, read_overrides
from tvr.trainer.recipes.recipes import recipe
from tvr.trainer.reproduction.packs import PACKS, Benchmark, BenchmarkPack, Towers

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionOptions:
    """What the user gives to `tvr reproduce`."""

    benchmark: Benchmark
    annotations: str
    videos: str
    pretrained: Path
    out: Path
    towers: Towers = "b32"
    seeds: int = 3
    ranks: int | None = None
    config: Path | None = None
    short_side: int = 224
    max_bad: int = 0
    dual_softmax: float = 0.01
    slurm: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("short_side", 1), ("max_bad", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)} must be at least {least}")
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"--ranks {self.ranks} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionStep:
    """One command, which may be repeated at any time: it goes on where it was stopped."""

    name: str
    kind: Literal["pack", "zero-shot", "train", "evaluate"]
    command: tuple[str, ...]
    product: Path
    """The file that the finished command has written."""
    identity: tuple[str, ...]
    """What the product depends on. If it differs from that of a finished step, the product is of
    other settings."""

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionPlan:
    """All steps, and where their results are."""

    options: ReproductionOptions
    pack: BenchmarkPack
    config: Config
    """Settings of the trained runs, but for the seed."""
    steps: tuple[ReproductionStep, ...]
    zero_shot: Path
    """File of `tvr evaluate --json`."""
    trained: Mapping[int, Path]
    """The same for each seed."""


def plan_reproduction(options: ReproductionOptions) -> ReproductionPlan:
    """Plans the steps: pack, zero-shot row, and for each seed training and evaluation.

    Raises:
        ValueError: an option or a setting is out of range, the global batch cannot be divided
            among the ranks, or there is no recipe for these towers.
    """
    pack = PACKS[options.benchmark]
    pack.goal(options.towers)  # refuses towers without a recipe
    name = pack.recipes[options.towers]
    overrides: Mapping[str, Any] = {} if options.config is None else read_overrides(options.config)
    config = merged(recipe(name), overrides, where=f"--config {options.config}")
    ranks = options.ranks or pack.ranks
    # One loss over the whole batch, as the recipe has it, on any number of ranks.
    divided: tuple[str, ...] = ()
    if "micro_batch" not in overrides.get("train", {}):
        if config.train.global_batch % ranks:
            raise ValueError(
                f"--ranks {ranks} must divide train.global_batch={config.train.global_batch};"
                " or set train.micro_batch in the --config file"
            )
        divided = ("--train.micro-batch", str(config.train.global_batch // ranks))
    packs = {
        split: _pack_step(options, pack, split, config.data.num_frames) for split in pack.splits
    }
    steps = list(packs.values())
    test = str(_data(options, pack.test))
    scored = ("--data", test, "--dual-softmax", f"{options.dual_softmax:g}")
    zero_shot = options.out / "results" / f"{ZERO_SHOT}.json"
    steps.append(
        _step(
            ZERO_SHOT,
            "zero-shot",
            (
                *("tvr", "evaluate", "--model", str(options.pretrained)),
                *("--num-frames", str(config.data.num_frames)),
                *(*scored, "--json", str(zero_shot)),
            ),
            zero_shot,
            after=packs[pack.test].identity,
        )
    )
    trained = {}
    for seed in range(options.seeds):
        run = options.out / "runs" / f"seed-{seed}"
        train, identity = _train_command(options, pack, name, run, seed)
        for split in dict.fromkeys((pack.train, pack.choose)):
            identity += packs[split].identity
        steps.append(
            ReproductionStep(
                name=f"train-seed-{seed}",
                kind="train",
                command=(*_launcher(options, ranks), *train, *divided),
                product=run / "evaluation.json",
                identity=identity,
            )
        )
        trained[seed] = options.out / "results" / f"seed-{seed}.json"
        steps.append(
            _step(
                f"evaluate-seed-{seed}",
                "evaluate",
                (
                    *("tvr", "evaluate", "--run-dir", str(run), "--checkpoint", "best"),
                    *(*scored, "--json", str(trained[seed])),
                ),
                trained[seed],
                after=identity + packs[pack.test].identity,
            )
        )
    return ReproductionPlan(
        options=options,
        pack=pack,
        config=config,
        steps=tuple(steps),
        zero_shot=zero_shot,
        trained=trained,
    )


def _step(
    name: str,
    kind: Literal["pack", "zero-shot", "evaluate"],
    command: tuple[str, ...],
    product: Path,
    after: tuple[str, ...] = (),
) -> ReproductionStep:
    """A step whose product depends on its command, and on the identities of steps before it."""
    return ReproductionStep(
        name=name, kind=kind, command=command, product=product, identity=command + after
    )


def _data(options: ReproductionOptions, split: str) -> Path:
    return options.out / "data" / split


def _pack_step(
    options: ReproductionOptions, pack: BenchmarkPack, split: str, num_frames: int
) -> ReproductionStep:
    out = _data(options, split)
    command = (
        *("tvr", "pack", "--dataset", pack.dataset, "--split", split),
        *("--annotations", options.annotations, "--videos", options.videos, "--out", str(out)),
        *("--layout", "frames", "--num-frames", str(num_frames)),
        *("--short-side", str(options.short_side), "--max-bad", str(options.max_bad)),
    )
    return _step(f"pack-{split}", "pack", command, out / "manifest.json")


def _train_command(
    options: ReproductionOptions, pack: BenchmarkPack, name: str, run: Path, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`tvr train` of a seed, and what its result depends on."""
    file, content = options.config, ()
    if file is not None:
        content = (hashlib.sha256(file.read_bytes()).hexdigest(),)
    command = (
        *("tvr", "train", "--recipe", name, "--run-dir", str(run)),
        *(() if file is None else ("--config", str(file))),
        *("--data.train", str(_data(options, pack.train))),
        *("--data.test", str(_data(options, pack.choose))),
        *("--model.pretrained", str(options.pretrained), "--train.seed", str(seed)),
    )
    return command, (*command, *content)


def _launcher(options: ReproductionOptions, ranks: int) -> tuple[str, ...]:
    if options.slurm is not None:
        return ("tvr", "launch", "slurm", *shlex.split(options.slurm), "--")
    # One rank needs no launcher.
    return () if ranks == 1 else ("tvr", "launch", "local", "--ranks", str(ranks), "--")
