"""The command line of `tvr metrics`: the metrics table for a terminal, or as METRICS.md."""

from __future__ import annotations

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.table import Table

from tvr.data_prep.cli_errors import run_command
from tvr.data_prep.exporter.metrics_table import Metric
from tvr.trainer.monitoring.metrics import METRICS

ABOUT = """\
# Metrics

`tvr train` and `tvr pack --metrics-port` export these metrics. `tvr metrics --markdown` writes this
page. Rank 0 exports the series per run. A series per node is the sum over the node's ranks. Series
per rank have the label `rank`. A label takes the listed values and no others; `data_set` takes the
names in `data.train_sets`, and its series exist only in a run that has them. Prometheus adds two
labels: `run`, the last two parts of the folder's path (`demo/run`), and `host`. A gauge is absent
if it does not apply or is not known. Counters begin at 0 with each start of a run.

A run on one machine serves its metrics on loopback, one on several machines on all interfaces, as
`metrics.address` says. `metrics.host` is the name under which Prometheus finds a node. The label
`__meta_tvr_host` of a target says by which rule that name was chosen; Prometheus does not store it.

"""
COLUMNS = ("name", "type", "unit", "labels", "per", "meaning")


def metrics(argv: Sequence[str]) -> int:
    """`tvr metrics`."""

    def arguments(*, markdown: bool = False) -> int:
        """Prints every metric that a run or a packing job exports, and its meaning.

        Args:
            markdown: Prints the page trainer/METRICS.md.
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


def rows(table: Sequence[Metric] = METRICS) -> list[tuple[str, ...]]:
    """The cells of the table, in the order of COLUMNS."""
    return [
        (
            metric.name,
            metric.kind,
            metric.unit,
            "; ".join(
                f"{name}: {', '.join(values)}" if values else name
                for name, values in metric.labels.items()
            ),
            metric.per,
            metric.meaning,
        )
        for metric in table
    ]


def markdown_page(table: Sequence[Metric] = METRICS) -> str:
    """The text of trainer/METRICS.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(f"`{name}`", *rest) for name, *rest in rows(table)]
    return ABOUT + "".join(f"| {' | '.join(line)} |\n" for line in lines)
