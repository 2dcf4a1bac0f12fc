"""The command line of `tvr verify`.

Exit codes: 0 done; 2 bad usage or no data set to read; 3 verify found problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tvr.data_prep.cli import STRICT, reported
from tvr.data_prep.verify import verify_dataset


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class VerifyArguments:
    """Checks a packed data set against its manifest: every byte, every sample; exit code 3 for
    problems."""

    url: Annotated[str, tyro.conf.Positional]
    """Folder or fsspec URL of the data set."""
    decode: int = 32
    """Samples to decode as well, spread evenly; 0 = none."""
    max_shown: int = 50
    """Problems to list."""


def verify(argv: Sequence[str]) -> int:
    """`tvr verify`: returns the exit code."""
    return reported(
        "tvr verify", lambda: _verify(tyro.cli(VerifyArguments, prog="tvr verify", args=argv))
    )


def _verify(arguments: VerifyArguments) -> int:
    report = verify_dataset(arguments.url, decode=arguments.decode)
    print(
        f"{arguments.url}: {report.num_samples} samples in {report.num_shards} shards,"
        f" {report.num_bytes / 1e6:.1f} MB hashed, {report.num_decoded} samples decoded:"
        f" {len(report.problems) or 'no'} problems"
    )
    if not report.problems:
        return 0
    table = Table("where", "problem")
    for problem in report.problems[: arguments.max_shown]:
        table.add_row(Text(problem.where), Text(problem.what))
    Console().print(table)
    if len(report.problems) > arguments.max_shown:
        print(f"and {len(report.problems) - arguments.max_shown} more")
    return 3
