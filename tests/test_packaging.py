"""The wheel holds what the folders hold; imports work from it, from the root, from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "kernels", "launchers", "trainer")
# One module of each folder, cheap to import.
SAMPLES = (
    "tvr.data_prep.records",
    "tvr.kernels.similarity",
    "tvr.launchers.cli",
    "tvr.trainer.monitoring.run_log",
)


def package_files() -> set[str]:
    """Every file of the four folders as the wheel should name it; caches are no files of ours."""
    return {
        f"tvr/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy: the build writes beside the sources.
    source = tmp_path_factory.mktemp("source")
    wanted = [*package_files(), "tvr/pyproject.toml", "tvr/README.md", "tvr/LICENSE"]
    for name in wanted:
        copy = source / name.removeprefix("tvr/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name.removeprefix("tvr/")).read_bytes())
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    ended = subprocess.run(
        [*line, str(source)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_folders_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    described = {name for name in names if ".dist-info/" in name}
    assert names - described == package_files()
    assert any(name.endswith("licenses/LICENSE") for name in described)


def test_package_files_include_types_and_the_template() -> None:
    # Guards the comparison above against an empty listing.
    assert {f"tvr/{folder}/py.typed" for folder in FOLDERS} <= package_files()
    assert {
        "tvr/trainer/pages/report.html.jinja",
        "tvr/data_prep/page.css.jinja",
    } <= package_files()


def test_imports_come_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    # -S leaves out the editable install's finder; the dependencies are then listed explicitly.
    places = [str(unpacked), *(place for place in sys.path if place.endswith("-packages"))]
    code = (
        "import importlib, sys\n"
        f"sys.path[:0] = {places!r}\n"
        f"for name in {SAMPLES!r}:\n"
        "    print(importlib.import_module(name).__file__)\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = run_python("-S", "-c", code, cwd=elsewhere).split()
    assert files == [str(unpacked / f"{name.replace('.', '/')}.py") for name in SAMPLES]


def test_bench_in_the_wheel_refers_to_the_source_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    places = [str(tmp_path), *(place for place in sys.path if place.endswith("-packages"))]
    code = (
        "import sys\n"
        f"sys.path[:0] = {places!r}\n"
        "from tvr.launchers.cli import main\n"
        "sys.exit(main(['bench', 'kernels']))\n"
    )
    line = [sys.executable, "-S", "-c", code]
    ended = subprocess.run(line, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "part of the source checkout" in ended.stderr


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["root", "elsewhere"])
def test_installed_modules_import_from_anywhere(cwd: Path) -> None:
    lines = "\n".join(f"import {name}" for name in SAMPLES)
    run_python("-c", lines, cwd=cwd)


def test_transformers_imports_beside_our_folder_named_kernels() -> None:
    code = "import tvr.kernels.similarity, transformers\nfrom transformers import CLIPModel"
    run_python("-c", code, cwd=ROOT)


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="tvr")
    assert command.value == "tvr.launchers.cli:main"


def run_python(*argv: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
