"""The command line of `tvr reproduce`.

Exit codes: 0 the published number is reached; 1 all steps are done, and it is not; 2 bad usage or
input; 3 a step failed; 75 a step was preempted, or trainings wait for SLURM: start it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from tvr.data_prep.annotations.benchmarks import read_benchmark
from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_DONE, EXIT_NOT_REACHED, EXIT_USAGE
from tvr.trainer.exit_reporting import run_training_command
from tvr.trainer.reproduction.packs import Benchmark, Towers, other_towers
from tvr.trainer.reproduction.plan import ReproductionOptions, ReproductionPlan, plan_reproduction
from tvr.trainer.reproduction.steps import RunCommand, is_done, run_as_child, run_steps

TABLE, DOCUMENT = "reproduction.md", "reproduction.json"

Name: TypeAlias = Annotated[
    Benchmark, tyro.conf.Positional, tyro.conf.arg(metavar="{msrvtt,msvd,didemo,activitynet}")
]


def reproduce(argv: Sequence[str], run: RunCommand = run_as_child) -> int:
    """Runs `tvr reproduce` and returns the exit code; `run` runs the command of a step."""

    def arguments(
        benchmark: Name,
        /,
        *,
        videos: str,
        annotations: str,
        pretrained: Path,
        out: Path,
        towers: Towers = "b32",
        seeds: int = 3,
        ranks: int | None = None,
        config: Path | None = None,
        short_side: int = 224,
        max_bad: int = 0,
        dual_softmax: float = 0.01,
        slurm: str | None = None,
        dry_run: bool = False,
    ) -> int:
        """Reproduces a published benchmark: packs, trains several seeds, evaluates, compares.

        It runs other `tvr` commands, each of which it prints. The same command again skips what is
        finished. It ends with 0 if the 95 % interval of R@1 reaches the published number, with 1 if
        it does not.

        Args:
            benchmark: The benchmark.
            videos: Folder or URL of its videos.
            annotations: Folder or URL of its published files.
            pretrained: Folder of the CLIP to start from, whose zero-shot row is the first.
            out: Folder for data sets, runs, results and the table.
            towers: Size of the CLIP, ViT-B/32 or ViT-B/16 (msrvtt only): chooses the recipe.
            seeds: Number of trainings, with the seeds 0, 1, ...
            ranks: Processes that train on this machine. None: one for each GPU of the recipe.
            config: JSON file with settings that differ from the recipe's.
            short_side: Pixels of the shorter side of the packed frames.
            max_bad: Bad clips of a split that packing leaves out. A smaller test split reaches no
                published number.
            dual_softmax: Temperature of the rows by dual softmax.
            slurm: Options of `tvr launch slurm`, as in --slurm="--nodes 1 --time 8:00:00". Commands
                to submit the trainings are then printed; start this command again when the jobs
                are done.
            dry_run: Reads the annotations, prints every command, and runs and writes nothing.
        """
        options = ReproductionOptions(
            benchmark=benchmark,
            annotations=annotations,
            videos=videos,
            pretrained=pretrained,
            out=out,
            towers=towers,
            seeds=seeds,
            ranks=ranks,
            config=config,
            short_side=short_side,
            max_bad=max_bad,
            dual_softmax=dual_softmax,
            slurm=slurm,
        )
        plan = plan_reproduction(options)
        if dry_run:
            return _show(plan)
        _check_inputs(plan)
        code = run_steps(plan, run, lambda text: print(text, flush=True))
        return code if code != EXIT_DONE else _conclude(plan)

    return run_training_command(
        "reproduce", lambda: tyro.cli(arguments, prog="tvr reproduce", args=list(argv))
    )


def _check_inputs(plan: ReproductionPlan) -> None:
    """Reads the annotations of splits that are not packed, before hours of work.

    Raises:
        ValueError, OSError: the towers, a folder or an annotation file is missing or malformed.
    """
    problems = [
        *_pretrained_problems(plan.options.pretrained),
        *(text for split in _open_splits(plan) for text in _split_lines(plan, split)[1]),
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _show(plan: ReproductionPlan) -> int:
    """Prints the plan. Returns 2 if the inputs would stop it."""
    options = plan.options
    goal = plan.pack.goal(options.towers)
    print(f"{plan.pack.title}, recipe {plan.pack.recipes[options.towers]}")
    recalls = ", ".join(
        f"{way} {found[1]}"
        for way, found in (
            ("text to video", goal.text_to_video),
            ("video to text", goal.video_to_text),
        )
        if 1 in found
    )
    print(f"goal: R@1 {recalls} of {goal.method} ({goal.source})")
    train = plan.config.train
    print(f"{options.seeds} x {train.steps:,} steps of {train.global_batch} pairs\n")
    problems = _pretrained_problems(options.pretrained)
    for split in plan.pack.splits:
        lines, wrong = _split_lines(plan, split)
        problems += wrong
        if lines:
            print("\n".join(lines))
    print()
    for number, step in enumerate(plan.steps, start=1):
        state = "complete" if is_done(options.out, step) else "to do"
        print(f"[{number}/{len(plan.steps)}] {step.name} ({state})\n    {step.line}")
    print(f"\ntable: {options.out / TABLE}, {options.out / DOCUMENT}")
    if (options.pretrained / "config.json").is_file():
        if (note := other_towers(options.pretrained, options.towers)) is not None:
            print(f"note: {note}")
    for problem in problems:
        print(f"problem: {problem}")
    return EXIT_USAGE if problems else EXIT_DONE


def _open_splits(plan: ReproductionPlan) -> list[str]:
    steps = {step.name: step for step in plan.steps}
    out = plan.options.out
    return [name for name in plan.pack.splits if not is_done(out, steps[f"pack-{name}"])]


def _pretrained_problems(folder: Path) -> list[str]:
    if (folder / "config.json").is_file():
        return []
    return [f"--pretrained {folder} has no config.json: give the folder of a Hugging Face CLIP"]


def _split_lines(plan: ReproductionPlan, split: str) -> tuple[list[str], list[str]]:
    """The size of a split as `tvr pack` will read it, and what would stop packing."""
    options = plan.options
    try:
        found = read_benchmark(
            plan.pack.dataset, split, annotations=options.annotations, videos=options.videos
        )
    except (ValueError, OSError) as error:
        return [], [f"{plan.pack.dataset} {split}: {error}"]
    problems = []
    if (bad := len(found.without_file) + len(found.refused)) > options.max_bad:
        problems.append(
            f"{found.name}: {bad:,} bad clips or rows, more than --max-bad {options.max_bad}:"
            f" {len(found.without_file):,} without a video file, {len(found.refused):,} bad rows"
        )
    return found.summary(), problems


def _conclude(plan: ReproductionPlan) -> int:
    """Writes and prints the table."""
    from tvr.trainer.reproduction.table import read_table

    table = read_table(plan)
    text, out = table.markdown(), plan.options.out
    write_atomically(out / DOCUMENT, json.dumps(table.document(), indent=1) + "\n")
    write_atomically(out / TABLE, text)
    print(text)
    print(f"written: {out / TABLE}, {out / DOCUMENT}")
    return EXIT_DONE if table.is_reached else EXIT_NOT_REACHED
