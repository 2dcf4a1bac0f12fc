"""Orders test files by their recorded duration, and marks the tests of slow files.

xdist's workers take whole files in the order of collection. With the longest files first, no worker
is left alone with a long file at the end. `pytest --record-seconds` writes the table anew.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS / "file_seconds.json"
SLOW_FILE_S = 8.0
"""Tests of a file that takes longer are marked `slow`: `make test-quick` leaves them out."""
UNKNOWN_S = 5.0
"""Assumed for a file that is not in the table."""


def recorded_seconds() -> dict[str, float]:
    """Seconds of each test file, by its path below tests/."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def order_and_mark(items: list[pytest.Item]) -> None:
    """Sorts the tests by their file's seconds, the longest first, and marks those of slow files."""
    seconds = recorded_seconds()

    def seconds_of(item: pytest.Item) -> float:
        return seconds.get(_name(item.path), UNKNOWN_S)

    # By name within equal seconds: the tests of a file stay together, in their own order.
    items.sort(key=lambda item: (-seconds_of(item), _name(item.path)))
    for item in items:
        if seconds_of(item) > SLOW_FILE_S:
            item.add_marker(pytest.mark.slow)


class SecondsRecorder:
    """Plugin that adds up the seconds of each file and writes the table at the end of a run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = self._root / report.nodeid.partition("::")[0]
        self._seconds[_name(file)] += report.duration

    def pytest_sessionfinish(self) -> None:
        table = {**recorded_seconds(), **self._seconds}
        exists = {name: s for name, s in table.items() if (TESTS / name).exists()}
        longest_first = sorted(exists.items(), key=lambda entry: -entry[1])
        rounded = {name: round(seconds, 1) for name, seconds in longest_first}
        TABLE.write_text(json.dumps(rounded, indent=1) + "\n")


def _name(file: Path) -> str:
    return file.relative_to(TESTS).as_posix() if file.is_relative_to(TESTS) else str(file)
