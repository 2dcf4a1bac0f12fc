"""The command lines of `tvr bench train` and `tvr bench save`. Exit codes as `tvr bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console, RenderableType

from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED
from tvr_bench.kernels_report import machine, versions
from tvr_bench.train_report import (
    HOW_SAVE,
    HOW_TRAIN,
    rows,
    save_row,
    save_table,
    table,
)
from tvr_bench.kernels_process import MeasurementFailed
from tvr_bench.rank_task import Task
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
    """Where the time of a training step goes, and how it falls with ranks at a fixed global batch.

    Without --config the demo's towers train on clips that are rendered and packed for it.
    """

    config: Path | None = None
    """JSON file with (some) settings over the demo's recipe; `data.train` is then taken as it is.
    `train.micro_batch` holds for the greatest of --ranks; fewer take more pairs each, so that the
    losses are the same."""
    ranks: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2)
    """Numbers of ranks, one after another."""
    steps: Positive = 10
    """Measured steps of each, after one that is not counted."""
    save_every: NotNegative = 5
    """Steps between checkpoints, written in a temporary folder; 0: none."""
    threads: Positive | None = None
    """Of a rank, whatever the number of ranks; default: the cores over the greatest of --ranks."""
    clips: Positive = 128
    """To render, without --config."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SaveArguments:
    """How long a step waits for a checkpoint in the background, against one that is not.

    Both kinds in turn in one run that goes on training, of towers from scratch.
    """

    ranks: Positive = 1
    saves: Positive = 5
    """Of each kind, after one that is not counted."""
    width: Positive = 512
    """Of both towers, a multiple of 64; with the layers it sets the size of the state."""
    layers: Positive = 6
    """Of each tower."""
    out: Path | None = None
    """Existing folder, on the disk to measure; default: the system's for temporary files."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_train(argv: Sequence[str]) -> int:
    """`tvr bench train`: returns the exit code."""
    return bench_reported(
        "train", lambda p: _train(tyro.cli(TrainArguments, prog=p, args=list(argv)))
    )


def bench_save(argv: Sequence[str]) -> int:
    """`tvr bench save`: returns the exit code."""
    return bench_reported("save", lambda p: _save(tyro.cli(SaveArguments, prog=p, args=list(argv))))


def _train(arguments: TrainArguments) -> int:
    most = max(arguments.ranks)
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)) // most)
    answers = {}
    with bench_folder(None, "bench train") as (folder, tell):
        config = with_data(arguments.config, arguments.clips, folder, tell)
        for ranks in arguments.ranks:
            tell(f"{ranks} ranks")
            task = Task(
                what="steps",
                config=to_json(shared_out(config, ranks, most)),
                folder=str(folder / f"ranks-{ranks}"),
                count=arguments.steps,
                save_every=arguments.save_every,
            )
            answers[ranks] = run_on_ranks(task, ranks, threads)
    found = rows(answers, config.train.global_batch)
    sizes = {"global_batch": config.train.global_batch, "steps": arguments.steps}
    sizes |= {"save_every": arguments.save_every, "threads": threads}
    model = asdict(config.model)
    del model["tokenizer"]  # a folder that no size depends on, and that is gone by now
    sizes |= of_any(answers.values()) | {"model": model}
    return say(arguments.json, "train", HOW_TRAIN, sizes, found, table(found, sizes))


def _save(arguments: SaveArguments) -> int:
    if arguments.width % 64:
        raise ValueError(f"--width {arguments.width} must be a multiple of 64")
    with bench_folder(arguments.out, "bench save") as (folder, tell):
        base = with_data(None, 16, folder, tell)
        towers = TowersConfig(
            width=arguments.width,
            layers=arguments.layers,
            heads=arguments.width // 64,
            embed_width=arguments.width,
            image_size=base.model.towers.image_size,
        )
        train = replace(base.train, global_batch=4 * arguments.ranks, micro_batch=4)
        config = replace(base, model=replace(base.model, towers=towers), train=train)
        tell(f"{arguments.saves} saves of each kind")
        task = Task(
            what="saves",
            config=to_json(config),
            folder=str(folder / "saves"),
            count=arguments.saves,
        )
        threads = max(1, len(os.sched_getaffinity(0)) // arguments.ranks)
        answer = run_on_ranks(task, arguments.ranks, threads)
    found = [save_row(answer)]
    sizes = {"ranks": arguments.ranks, "saves": arguments.saves, **of_any([answer])}
    return say(arguments.json, "save", HOW_SAVE, sizes, found, save_table(found[0], sizes))


def shared_out(config: Config, ranks: int, most: int) -> Config:
    """The same losses on fewer ranks: what `train.micro_batch` is on `most` ranks, shared out.

    Raises:
        ValueError: it cannot be.
    """
    train = config.train
    if train.gradient_cache:  # one loss of the global batch, whatever is encoded at once
        return config
    if train.micro_batch * most % ranks:
        raise ValueError(
            f"--ranks {ranks}: cannot share out the {train.micro_batch * most} pairs of a loss"
            f" (train.micro_batch={train.micro_batch} on {most} ranks)"
        )
    return replace(config, train=replace(train, micro_batch=train.micro_batch * most // ranks))


def run_on_ranks(task: Task, ranks: int, threads: int) -> dict[str, Any]:
    """Runs the task on ranks of this machine.

    Raises:
        MeasurementFailed: some rank did.
    """
    folder = Path(task.folder)
    folder.mkdir(parents=True)
    file = folder / "task.json"
    file.write_text(json.dumps(asdict(task)))
    launch = [sys.executable, "-m", "tvr.launchers.cli", "launch", "local", "--ranks", str(ranks)]
    ended = subprocess.run(
        [*launch, "--", sys.executable, "-m", "tvr_bench.rank_task", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise MeasurementFailed(f"on {ranks} ranks: {_cause(ended.stderr)}")
    return json.loads((folder / "answer.json").read_text())


def _cause(stderr: str) -> str:
    """The line of a rank's traceback that names the error, before torchrun's own."""
    lines = [line.split("]:")[-1].strip() for line in stderr.splitlines()]
    named = [x for x in lines if x and x.split(":")[0].endswith(("Error", "Loss", "Samples"))]
    return named[0] if named else (lines or ["no message"])[-1]


def with_data(file: Path | None, clips: int, folder: Path, tell: Callable[[str], None]) -> Config:
    """The settings with a data set in them: the user's own, or one made in `folder`."""
    base = recipe("demo")
    if file is not None:
        return merged(base, read_overrides(file), where=f"--config {file}")
    tell("rendering clips")
    paths = DemoPaths(folder / "demo")
    prepare_demo(
        paths,
        train_clips=max(16, clips),
        test_clips=4,
        num_frames=base.data.num_frames,
        image_size=base.model.towers.image_size,
        max_words=base.data.max_words,
        workers=len(os.sched_getaffinity(0)),
        log=lambda text: None,
    )
    places = {"train": str(paths.data("train")), "test": None, "test_exchanged": None}
    data = replace(base.data, **places)
    return replace(base, data=data, model=replace(base.model, tokenizer=str(paths.tokenizer)))


@contextmanager
def bench_folder(place: Path | None, name: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A temporary folder, and a line on the terminal to tell what is done."""
    with tempfile.TemporaryDirectory(prefix="tvr-bench-", dir=place) as folder:
        with Console(stderr=True).status(name) as line:
            yield Path(folder), lambda text: line.update(f"{name}: {text}")


def of_any(answers: Any) -> dict[str, Any]:
    answer = next(iter(answers))
    return {name: answer[name] for name in ("parameters", "device")}


def say(
    file: str | None,
    name: str,
    how: str,
    sizes: dict[str, Any],
    found: list[dict[str, Any]],
    shown: RenderableType,
) -> int:
    Console(stderr=file == "-").print(shown)
    line = {"benchmark": name, "sizes": sizes, "how": how, "versions": versions()}
    text = json.dumps(line | {"machine": machine(), "rows": found})
    if file == "-":
        print(text)
    elif file is not None:
        Path(file).write_text(text + "\n")
    return EXIT_DONE


def bench_reported(name: str, action: Callable[[str], int]) -> int:
    prog = f"tvr bench {name}"

    def guarded() -> int:
        try:
            return action(prog)
        except MeasurementFailed as failure:
            print(f"{prog}: {failure}", file=sys.stderr)
            return EXIT_FAILED

    return run_command(prog, guarded)
