"""Who may import whom, read from the source, and that importing does nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "kernels", "launchers", "trainer")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# Written in terms of an optional package: imported only once that was found (with_ffcv.py).
WITH_FFCV = {"tvr.data_prep.ffcv.field", "tvr.data_prep.ffcv.loader"}
MODULES = ["tvr." + ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]


def imported(file: Path) -> set[str]:
    """All that a file imports, in functions too; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import; the folders have no __init__.py"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def kernels_may(name: str) -> bool:
    if is_within(name, "torch.distributed"):
        return False
    return is_standard(name) or is_within(name, "torch", "jaxtyping", "tvr.kernels")


# Standard library only: the contract between the command line and its launchers, and one helper.
SHARED = ("tvr.launchers.exit_codes", "tvr.launchers.atomic_write")


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_arrows(file: Path) -> None:
    allowed = ALLOWED[file.relative_to(ROOT).parts[0]]
    # `from tvr import kernels` would hide the package behind the bare name `tvr`.
    wrong = sorted(name for name in imported(file) if name == "tvr" or not allowed(name))
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


def test_folders_have_no_init() -> None:
    # With an __init__.py, `import kernels`, which transformers probes for, would import ours.
    found = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert found == []


def test_importing_prints_nothing_and_starts_no_thread() -> None:
    code = (
        "import importlib, json, sys, threading\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    names = [thread.name for thread in threading.enumerate()]\n"
        "    assert names == ['MainThread'], (name, names)\n"
    )
    names = [name for name in MODULES if find_spec("ffcv") or name not in WITH_FFCV]
    line = [sys.executable, "-W", "ignore", "-c", code, json.dumps(names)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
