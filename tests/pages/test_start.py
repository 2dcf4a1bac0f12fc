"""Commands that only read a run start without the libraries of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders.run_logs import step_event, write_run

PROGRAM = """
import sys
from tvr.launchers.cli import main
code = main(sys.argv[1:])
loaded = {"torch", "transformers", "deepspeed"} & sys.modules.keys()
assert not loaded, loaded
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["dashboard", "metrics", "report"])
def test_pages_import_no_torch(command: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", step_event(1), data={"test": None})
    arguments = {"dashboard": [str(run)], "metrics": [], "report": ["--run-dir", str(run)]}
    line = [sys.executable, "-c", PROGRAM, command, *arguments[command]]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
