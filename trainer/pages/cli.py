"""The command line of `tvr dashboard`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from tvr.data_prep.cli_errors import run_command

Runs: TypeAlias = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")
]


def dashboard(argv: Sequence[str]) -> int:
    """`tvr dashboard`."""

    def arguments(
        runs: Runs,
        /,
        *,
        out: Path | None = None,
        watch: bool = False,
    ) -> int:
        """Writes a page with the history of a run, or of several runs laid over one another.

        The page is one file that needs no server and no network. An open page loads new numbers
        when the file is rewritten, until its runs have finished.

        Args:
            runs: Folders of the runs.
            out: The file to write; default: dashboard.html in the first run's folder.
            watch: Rewrites the page whenever a run logs, until all runs have finished.
        """
        if not runs:
            raise ValueError("no RUN is given: name the folder of one run or more")
        from tvr.trainer.pages.dashboard import watch as keep_writing
        from tvr.trainer.pages.dashboard import write_dashboard

        path = out or runs[0] / "dashboard.html"
        write_dashboard(runs, path)
        print(f"dashboard: {path}", flush=True)
        if watch:
            keep_writing(runs, path)
        return 0

    return run_command(
        "tvr dashboard", lambda: tyro.cli(arguments, prog="tvr dashboard", args=list(argv))
    )
