"""The command line of `tvr metrics`: the table, for a person or as the documentation."""

from __future__ import annotations

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.table import Table

from tvr.data_prep.cli_errors import run_command
from tvr.trainer.monitoring.metrics import METRICS

ABOUT = """\
# Metrics

What `tvr train` and `tvr pack --metrics-port` export, as `tvr metrics --markdown` prints it. Series
per run are told by rank 0 alone, series per node are sums over its ranks, and series per rank have
the label `rank`. Labels take the values listed here and no others; Prometheus adds `run`, the last
two parts of the folder's path (`demo/run`), and `host`. A gauge that does not apply, or is not
known, is absent; counters begin at 0 with each start of a run.

"""
COLUMNS = ("name", "type", "unit", "labels", "per", "meaning")


def metrics(argv: Sequence[str]) -> int:
    """`tvr metrics`."""

    def arguments(*, markdown: bool = False) -> int:
        """Prints every metric that a run or a packing job may export, and what it means.

        Args:
            markdown: As trainer/METRICS.md.
        """
        if markdown:
            print(markdown_page(), end="")
        else:
            table = Table(*COLUMNS, show_lines=True)
            for row in rows():
                table.add_row(*row)
            Console().print(table)
        return 0

    return run_command(
        "tvr metrics", lambda: tyro.cli(arguments, prog="tvr metrics", args=list(argv))
    )


def rows() -> list[tuple[str, ...]]:
    """The table in words, in the order of COLUMNS."""
    return [
        (
            metric.name,
            metric.kind,
            metric.unit,
            "; ".join(f"{name}: {', '.join(values)}" for name, values in metric.labels.items()),
            metric.per,
            metric.meaning,
        )
        for metric in METRICS
    ]


def markdown_page() -> str:
    """trainer/METRICS.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(f"`{name}`", *rest) for name, *rest in rows()]
    return ABOUT + "".join(f"| {' | '.join(line)} |\n" for line in lines)
