"""The command line of `tvr compare`."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from tvr.data_prep.cli_errors import run_command

Runs: TypeAlias = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN [RUN ...]")
]


def compare(argv: Sequence[str]) -> int:
    """`tvr compare`."""

    def arguments(
        runs: Runs,
        /,
        *,
        seeds: bool = False,
        group: tuple[str, ...] = (),
        json: Path | None = None,
        html: Path | None = None,
        samples: int = 10_000,
        seed: int = 0,
    ) -> int:
        """Compares the results of several runs on one test set, all with the first.

        Each metric has a 95 % bootstrap interval over the videos. For each run after the first, it
        prints the queries won and lost, and the differences with their intervals and p values.

        Args:
            runs: Folders of runs, or files that `tvr evaluate --json` wrote.
            seeds: Also prints the mean, standard deviation and range over runs whose settings are
                equal except for train.seed.
            group: Names a group for each run, instead of --seeds: --group a a b.
            json: Also writes all numbers to this file.
            html: Also writes a page with the tables to this file.
            samples: Number of resamples.
            seed: Seed of the resamples.
        """
        from tvr.launchers.atomic_write import write_atomically
        from tvr.trainer.comparison.compare import compare_paths

        found = compare_paths(runs, by_seed=seeds, groups=group, samples=samples, seed=seed)
        print(found.table())
        if json is not None:
            write_atomically(json, json_format.dumps(found.to_json(), indent=1) + "\n")
        if html is not None:
            from tvr.trainer.comparison.page import comparison_page

            write_atomically(html, comparison_page(found))
        return 0

    return run_command(
        "tvr compare", lambda: tyro.cli(arguments, prog="tvr compare", args=list(argv))
    )
