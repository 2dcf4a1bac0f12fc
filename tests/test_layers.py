"""Allowed imports between packages, read from the source and held to the READMEs' layout tables.

Each package's README has a table with a row for every sub-package: its door, the other modules that
may be imported from outside, and what it holds. These tables are the rules that are checked here.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "kernels", "launchers", "trainer")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# Standard library only: the contract between the command line and its launchers, and helpers.
SHARED = (
    "tvr.launchers.exit_codes",
    "tvr.launchers.atomic_write",
    "tvr.launchers.host_limits",
    "tvr.launchers.process",
)
# Written in terms of the optional package ffcv; the loader imports them only for an FFCV data set.
PLUGIN = "tvr.data_prep.ffcv"
NEEDS_FFCV = {f"{PLUGIN}.field", f"{PLUGIN}.loader"}
MAX_LINES, MAX_MODULES = 350, 15


def module_name(file: Path) -> str:
    return "tvr." + ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def imported(file: Path) -> frozenset[str]:
    """All that a file imports, in functions too; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import; the folders have no __init__.py"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


# ---------------------------------------------------------------- packages


def kernels_may(name: str) -> bool:
    if is_within(name, "torch.distributed"):
        return False
    return is_standard(name) or is_within(name, "torch", "jaxtyping", "tvr.kernels")


def data_prep_may(name: str) -> bool:
    if is_within(name, "torch.distributed", "deepspeed", "transformers"):
        return False
    return not is_within(name, "tvr") or is_within(name, "tvr.data_prep", *SHARED)


def launchers_may(name: str) -> bool:
    return is_standard(name) or is_within(name, "tvr.launchers")


def trainer_may(name: str) -> bool:
    return not is_within(name, "tvr.launchers") or is_within(name, *SHARED)


ALLOWED: dict[str, Callable[[str], bool]] = {
    "data_prep": data_prep_may,
    "kernels": kernels_may,
    "launchers": launchers_may,
    "trainer": trainer_may,
}


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_what_they_may(name: str) -> None:
    allowed = ALLOWED[name.split(".")[1]]
    # `from tvr import kernels` would hide the package behind the bare name `tvr`.
    wrong = sorted(name for name in imported(MODULES[name]) if name == "tvr" or not allowed(name))
    assert wrong == []


def test_deepspeed_is_imported_in_one_file() -> None:
    files = [file for file in FILES if any(is_within(name, "deepspeed") for name in imported(file))]
    assert files == [ROOT / "trainer/engine/engine.py"]


def test_torch_distributed_is_imported_in_three_files_at_most() -> None:
    users = [
        file.name
        for file in FILES
        if any(is_within(name, "torch.distributed") for name in imported(file))
    ]
    assert 1 <= len(users) <= 3


def test_the_reference_stands_alone() -> None:
    # A fault in code that a fast path shares with it would be on both sides of every parity test.
    reference = "tvr.kernels.reference"
    assert not [name for name in imported(MODULES[reference]) if is_within(name, "tvr")]
    assert not [name for name, file in MODULES.items() if reference in imported(file)]


# ------------------------------------------------------------ sub-packages


class SubPackage(NamedTuple):
    door: str
    others: frozenset[str]


def layout_tables() -> dict[str, SubPackage]:
    """The sub-packages that the READMEs name, such as tvr.trainer.engine."""
    found = {}
    for folder in FOLDERS:
        for line in (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            first = re.match(r"`(\w+)/`", cells[0]) if len(cells) == 4 else None
            if first:
                (door,) = re.findall(r"`(\w+)`", cells[1])
                others = frozenset(re.findall(r"`(\w+)`", cells[2]))
                found[f"tvr.{folder}.{first[1]}"] = SubPackage(door, others)
    return found


TABLES = layout_tables()
SUB_PACKAGES = sorted({module_name(file.parent) for file in FILES if file.parent.parent != ROOT})


def part_of(module: str) -> str:
    """The sub-package of a module; a module that lies in no sub-package is a part of its own."""
    return ".".join(module.split(".")[:3])


def our_imports(module: str) -> set[str]:
    return {name for name in imported(MODULES[module]) if name in MODULES}


def test_each_sub_package_has_a_row_with_a_door() -> None:
    assert sorted(TABLES) == SUB_PACKAGES
    for name, row in TABLES.items():
        assert {f"{name}.{module}" for module in (row.door, *row.others)} <= set(MODULES)


@pytest.mark.parametrize("name", SUB_PACKAGES)
def test_a_sub_package_is_entered_by_its_door(name: str) -> None:
    row = TABLES[name]
    entered = defaultdict(set)
    for module in MODULES:
        if part_of(module) != name:
            for target in our_imports(module):
                if part_of(target) == name:
                    entered[target.rpartition(".")[2]].add(module)
    allowed = {row.door, *row.others}
    assert {
        target: importers for target, importers in entered.items() if target not in allowed
    } == {}
    # Every import that a row allows is in use; doors also serve the command line and users.
    assert row.others - set(entered) - {"cli"} == set()


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Some circle of a graph; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_modules_import_each_other_in_no_circle() -> None:
    assert circle({module: our_imports(module) for module in MODULES}) == []


def arrows() -> dict[str, set[str]]:
    """Imports of each sub-package and of each module beside them, without the lazy plugin's."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        targets = {part_of(target) for target in our_imports(module)} - {part_of(module)}
        graph[part_of(module)] |= targets - ({PLUGIN} if "reading" in module else set())
    return graph


def test_sub_packages_import_each_other_in_no_circle() -> None:
    assert circle(arrows()) == []


# --------------------------------------------------------------- the house


def test_modules_and_folders_are_small() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    modules = Counter(file.parent.relative_to(ROOT).as_posix() for file in FILES)
    assert {name: count for name, count in modules.items() if count > MAX_MODULES} == {}


def test_public_classes_have_names_of_their_own() -> None:
    named = defaultdict(list)
    for name, file in MODULES.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named[node.name].append(name)
    assert {name: where for name, where in named.items() if len(where) > 1} == {}


def test_folders_have_no_init() -> None:
    # With an __init__.py, `import kernels`, which transformers probes for, would import ours.
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    assert found == []


def test_importing_prints_nothing_and_starts_no_thread() -> None:
    code = (
        "import importlib, json, sys, threading\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    names = [thread.name for thread in threading.enumerate()]\n"
        "    assert names == ['MainThread'], (name, names)\n"
    )
    names = [name for name in MODULES if find_spec("ffcv") or name not in NEEDS_FFCV]
    line = [sys.executable, "-W", "ignore", "-c", code, json.dumps(names)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
