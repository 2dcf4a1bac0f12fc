"""`make test` leaves out further variants and says so; continuous integration runs everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A conftest as ours, without what ours imports.
CONFTEST = """
import sys
sys.path.insert(0, {folder!r})
from builders.exhaustive import ExhaustiveMark

def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: a further variant")
    config.pluginmanager.register(ExhaustiveMark(config))
"""
FILE = """
import pytest
from builders.exhaustive import (
    collected_values, everything, is_collected, principal_and_further
)

EVERY = everything()

@pytest.fixture(scope="module")
def prepared(request):
    return collected_values(request, "number"), is_collected(request, "test_long"), EVERY

@pytest.mark.parametrize("number", principal_and_further(range(4), [1]))
def test_number(prepared, number):
    print("prepared", prepared)

@pytest.mark.exhaustive
def test_long(prepared):
    pass
"""


def run(folder: Path, *arguments: str, everything: bool = False) -> str:
    """Output of pytest in a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TVR_CI"}
    # The plugins that are installed for other tests take seconds to import.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", *arguments]
    ended = subprocess.run(
        line,
        cwd=folder,
        env=environment | ({"TVR_CI": "1"} if everything else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stdout + ended.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(folder=str(ROOT / "tests")))
    (tmp_path / "test_some.py").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "1", "--dist", "loadfile")])
def test_further_variants_are_left_out_with_one_line(
    folder: Path, workers: tuple[str, ...]
) -> None:
    printed = run(folder, *workers)
    assert re.search(r"\b1 passed", printed), printed
    line = "left out 4 further variants (mark exhaustive): TVR_CI=1 make test runs all"
    assert printed.count(line) == 1
    if not workers:
        assert "prepared ([(1,)], False, False)" in printed


def test_continuous_integration_a_named_test_and_an_expression_run_them(folder: Path) -> None:
    printed = run(folder, everything=True)
    assert "5 passed" in printed, printed
    assert "left out" not in printed
    assert "prepared ([(0,), (1,), (2,), (3,)], True, True)" in printed
    assert "1 passed" in run(folder, "test_some.py::test_long")
    assert "prepared ([(0,)], False, True)" in run(folder, "test_some.py::test_number[0]")
    assert "4 passed, 1 deselected" in run(folder, "-m", "exhaustive")


def test_a_file_of_further_variants_alone_is_refused(folder: Path) -> None:
    (folder / "test_bare.py").write_text(FILE.replace("[1]))", "[]))"))
    for everything in (False, True):
        printed = run(folder, everything=everything)
        assert "each test of test_bare.py is marked exhaustive" in printed


def test_ci_runs_everything() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines.index("export TVR_CI=1") < lines.index("exec make test </dev/null")
    assert "-m" not in re.findall(r"^TEST_ARGS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[0]
