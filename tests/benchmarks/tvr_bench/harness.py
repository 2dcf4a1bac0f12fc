"""Helpers of all benchmarks: temporary folders, results as table and JSON, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# rich is imported where it is used: measuring processes run where it is not installed.
if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


class MeasurementFailed(Exception):
    """A measuring process ended without a result; the message gives its error."""


def versions() -> dict[str, str]:
    """Versions of Python, torch and tvr."""
    return {"python": platform.python_version()} | {x: version(x) for x in ("torch", "tvr")}


def machine() -> dict[str, str]:
    """The processor's name, if Linux reports it, and the system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": names[0] if names else platform.machine(), "system": system}


def write_result(destination: str | None, table: RenderableType, result: Mapping[str, Any]) -> None:
    """Prints the table and writes the result as one line of JSON.

    Args:
        destination: File for the JSON. `-` writes it to stdout, and the table to stderr. None
            writes no JSON.
    """
    from rich.console import Console

    Console(stderr=destination == "-").print(table)
    text = json.dumps(result)
    if destination == "-":
        print(text)
    elif destination is not None:
        Path(destination).write_text(text + "\n")


def result_table(title: str, caption: str | None) -> Table:
    """An empty table in the form that all benchmarks share."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )


@contextmanager
def bench_folder(parent: Path | None, name: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A temporary folder, and a function that shows the present phase on the terminal."""
    from rich.console import Console

    with tempfile.TemporaryDirectory(prefix="tvr-bench-", dir=parent) as folder:
        with Console(stderr=True).status(name) as line:
            yield Path(folder), lambda text: line.update(f"{name}: {text}")


def child_environment(base: Mapping[str, str], **variables: str) -> dict[str, str]:
    """An environment in which `python -m tvr_bench.MODULE` finds this folder."""
    folders = [str(Path(__file__).resolve().parent.parent), base.get("PYTHONPATH", "")]
    return {**base, "PYTHONPATH": os.pathsep.join(filter(None, folders)), **variables}
