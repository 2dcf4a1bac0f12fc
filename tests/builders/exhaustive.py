"""The mark `exhaustive`: further variants of what another test of the same file proves already.

`make test` leaves these tests out and says so. `TVR_CI=1 make test`, which `.ci/run` calls, runs
everything; a test that is named by its id runs, too, and so do those of `-m exhaustive`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

MARK = "exhaustive"
VARIABLE = "TVR_EXHAUSTIVE"
"""Set while further variants run, so that processes of a test know it, too."""

Value = TypeVar("Value")


def further(*values: object) -> list[Any]:
    """Marks these parameters, each a value or a tuple of values, as further variants."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive
        )
        for value in values
    ]


def principal_and_further(values: Iterable[Value], principal: Sequence[Value]) -> list[Any]:
    """Parameters in their order, of which all but the principal ones are further variants."""
    ordered = list(values)
    assert all(value in ordered for value in principal), principal
    return [value if value in principal else further(value)[0] for value in ordered]


def everything() -> bool:
    """True where further variants run; a fixture that tests share then prepares all of them."""
    return "1" in (os.environ.get("TVR_CI"), os.environ.get(VARIABLE))


def examples(number: int) -> int:
    """Random examples that a test draws: all of them, or a quarter where variants are left out."""
    return number if everything() else max(1, number // 4)


def is_collected(request: pytest.FixtureRequest, test: str) -> bool:
    """True if a test of this module is to run: a fixture need not prepare what none asks for."""
    own = request.module.__name__
    return any(
        getattr(item, "originalname", None) == test and item.module.__name__ == own  # type: ignore[attr-defined]
        for item in request.session.items
    )


def collected_values(request: pytest.FixtureRequest, *names: str) -> list[tuple[object, ...]]:
    """The values of parameters in the tests of this module that are to run."""
    found = []
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if item.module is request.module and set(names) <= set(parameters):  # type: ignore[attr-defined]
            values = tuple(parameters[name] for name in names)
            if values not in found:
                found.append(values)
    return found


def split_off(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Divides tests into those that `make test` runs and further variants.

    Raises:
        pytest.UsageError: a file has further variants only, so that `make test` would prove nothing
            of it.
    """
    kept = [item for item in items if item.get_closest_marker(MARK) is None]
    left_out = [item for item in items if item.get_closest_marker(MARK) is not None]
    bare = sorted({str(item.path) for item in left_out} - {str(item.path) for item in kept})
    if bare:
        names = ", ".join(Path(path).name for path in bare)
        raise pytest.UsageError(f"each test of {names} is marked {MARK}: unmark the principal one")
    return kept, left_out


class ExhaustiveMark:
    """Plugin that leaves further variants out, and counts them over all workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._left_out = 0
        # Tests that are named by their id run, and so do those of `-m exhaustive`.
        asked = any("::" in argument for argument in config.args)
        if asked or MARK in config.option.markexpr:
            os.environ[VARIABLE] = "1"
        self._named = asked

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if self._named:
            return
        kept, left_out = split_off(items)
        if everything():
            return
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)
        self._left_out = len(left_out)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # a worker of pytest-xdist: each collects all tests
            output[MARK] = self._left_out

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        found = getattr(node, "workeroutput", {}).get(MARK, 0)
        self._left_out = max(self._left_out, found)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if number := self._left_out:
            terminalreporter.write_line(
                f"left out {number:,} further variants (mark {MARK}): TVR_CI=1 make test runs all"
            )
