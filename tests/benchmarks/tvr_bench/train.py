"""`tvr bench train` and `tvr bench save`: real training steps on ranks of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass
from tvr_bench.harness import (
    MeasurementFailed,
    bench_folder,
    child_environment,
    machine,
    versions,
    write_result,
)
from tvr_bench.rank_task import RankTask
from tvr_bench.train_report import HOW_SAVE, HOW_TRAIN, rows, save_row, save_table, table

from tvr.data_prep.cli_errors import STRICT
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.launchers.host_limits import host_cpus
from tvr.trainer.config import (
    Config,
    NotNegative,
    Positive,
    TowersConfig,
    merged,
    read_overrides,
    to_json,
)
from tvr.trainer.demo import DemoPaths, prepare_demo
from tvr.trainer.recipes.recipes import recipe


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainArguments:
    """The parts of a training step, and its time on more ranks at a fixed global batch.

    Without --config the demo's towers train on clips that are rendered and packed first.
    """

    config: Path | None = None
    """JSON file with (some) settings over the demo's recipe; its `data.train` must exist.
    `train.micro_batch` is that of the largest of --ranks. Fewer ranks get larger micro-batches, so
    that the losses are the same."""
    ranks: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2)
    """Numbers of ranks to measure, one after another."""
    steps: Positive = 10
    """Measured steps for each number of ranks, after a warm-up step."""
    save_every: NotNegative = 5
    """Steps between checkpoints, written to a temporary folder; 0: none."""
    threads: Positive | None = None
    """Threads of a rank for every number of ranks; default: cores / largest of --ranks."""
    clips: Positive = 128
    """Clips to render, without --config."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SaveArguments:
    """How long a training step waits for a background checkpoint and for a synchronous one.

    Both kinds take turns in one run, which continues training. Its towers start from scratch.
    """

    ranks: Positive = 1
    saves: Positive = 5
    """Saves of each kind, after a warm-up save."""
    width: Positive = 512
    """Width of both towers, a multiple of 64; it sets the checkpoint's size with --layers."""
    layers: Positive = 6
    """Layers of each tower."""
    out: Path | None = None
    """Existing folder on the disk to measure; default: the system's temporary folder."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_train(argv: Sequence[str]) -> int:
    """Times training steps, prints the table, writes the JSON; returns the exit code."""
    arguments = tyro.cli(TrainArguments, prog="tvr bench train", args=list(argv))
    most = max(arguments.ranks)
    threads = arguments.threads or max(1, host_cpus().usable // most)
    answers = {}
    with bench_folder(None, "bench train") as (folder, report):
        config = with_data(arguments.config, arguments.clips, folder, report)
        for ranks in arguments.ranks:
            report(f"{ranks} ranks")
            task = RankTask(
                what="steps",
                config=to_json(with_same_losses(config, ranks, most)),
                folder=str(folder / f"ranks-{ranks}"),
                count=arguments.steps,
                save_every=arguments.save_every,
            )
            answers[ranks] = run_on_ranks(task, ranks, threads)
    measured = rows(answers, config.train.global_batch)
    sizes = {"global_batch": config.train.global_batch, "steps": arguments.steps}
    sizes |= {"save_every": arguments.save_every, "threads": threads}
    model = asdict(config.model)
    del model["tokenizer"]  # a temporary folder, on which no size depends
    sizes |= common_values(answers.values()) | {"model": model}
    result = result_of("train", HOW_TRAIN, sizes, measured)
    write_result(arguments.json, table(measured, sizes), result)
    return EXIT_DONE


def bench_save(argv: Sequence[str]) -> int:
    """Times checkpoints, prints the table, writes the JSON; returns the exit code."""
    arguments = tyro.cli(SaveArguments, prog="tvr bench save", args=list(argv))
    if arguments.width % 64:
        raise ValueError(f"--width {arguments.width} must be a multiple of 64")
    with bench_folder(arguments.out, "bench save") as (folder, report):
        base = with_data(None, 16, folder, report)
        towers = TowersConfig(
            width=arguments.width,
            layers=arguments.layers,
            heads=arguments.width // 64,
            embed_width=arguments.width,
            image_size=base.model.towers.image_size,
        )
        train = replace(base.train, global_batch=4 * arguments.ranks, micro_batch=4)
        config = replace(base, model=replace(base.model, towers=towers), train=train)
        report(f"{arguments.saves} saves of each kind")
        task = RankTask(
            what="saves",
            config=to_json(config),
            folder=str(folder / "saves"),
            count=arguments.saves,
        )
        threads = max(1, host_cpus().usable // arguments.ranks)
        answer = run_on_ranks(task, arguments.ranks, threads)
    row = save_row(answer)
    sizes = {"ranks": arguments.ranks, "saves": arguments.saves, **common_values([answer])}
    result = result_of("save", HOW_SAVE, sizes, [row])
    write_result(arguments.json, save_table(row, sizes), result)
    return EXIT_DONE


def with_same_losses(config: Config, ranks: int, most: int) -> Config:
    """Scales `train.micro_batch`, set for `most` ranks, so that `ranks` compute the same losses.

    Raises:
        ValueError: The pairs of a loss cannot be split evenly over `ranks`.
    """
    train = config.train
    if train.gradient_cache:  # one loss over the global batch, for every micro_batch
        return config
    if train.micro_batch * most % ranks:
        raise ValueError(
            f"--ranks {ranks}: cannot split the {train.micro_batch * most} pairs of a loss"
            f" (train.micro_batch={train.micro_batch} on {most} ranks)"
        )
    return replace(config, train=replace(train, micro_batch=train.micro_batch * most // ranks))


def run_on_ranks(task: RankTask, ranks: int, threads: int) -> dict[str, Any]:
    """Runs the task on ranks of this machine, with `threads` each; returns their result.

    Raises:
        MeasurementFailed: A rank failed; the message gives its error.
    """
    folder = Path(task.folder)
    folder.mkdir(parents=True)
    file = folder / "task.json"
    file.write_text(json.dumps(asdict(task)))
    launch = [sys.executable, "-m", "tvr.launchers.cli", "launch", "local", "--ranks", str(ranks)]
    ended = subprocess.run(
        [*launch, "--", sys.executable, "-m", "tvr_bench.rank_task", str(file)],
        env=child_environment(os.environ, OMP_NUM_THREADS=str(threads)),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise MeasurementFailed(f"on {ranks} ranks: {_cause(ended.stderr)}")
    return json.loads((folder / "answer.json").read_text())


def _cause(stderr: str) -> str:
    """The first line that names a rank's error, which comes before torchrun's own errors."""
    lines = [line.split("]:")[-1].strip() for line in stderr.splitlines()]
    named = [x for x in lines if x and x.split(":")[0].endswith(("Error", "Loss", "Samples"))]
    return named[0] if named else (lines or ["no message"])[-1]


def with_data(file: Path | None, clips: int, folder: Path, report: Callable[[str], None]) -> Config:
    """The settings in `file`, or the demo's with `clips` clips rendered and packed in `folder`."""
    base = recipe("demo")
    if file is not None:
        return merged(base, read_overrides(file), where=f"--config {file}")
    report("rendering clips")
    paths = DemoPaths(folder / "demo")
    prepare_demo(
        paths,
        train_clips=max(16, clips),
        test_clips=4,
        num_frames=base.data.num_frames,
        image_size=base.model.towers.image_size,
        max_words=base.data.max_words,
        workers=host_cpus().usable,
        log=lambda text: None,
    )
    paths_of_data = {"train": str(paths.data("train")), "test": None, "test_exchanged": None}
    data = replace(base.data, **paths_of_data)
    return replace(base, data=data, model=replace(base.model, tokenizer=str(paths.tokenizer)))


def common_values(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Model size and device, which all answers share."""
    answer = next(iter(answers))
    return {name: answer[name] for name in ("parameters", "device")}


def result_of(
    name: str, how: str, sizes: dict[str, Any], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON of a benchmark of training steps."""
    result = {"benchmark": name, "sizes": sizes, "how": how, "versions": versions()}
    return result | {"machine": machine(), "rows": measured}
