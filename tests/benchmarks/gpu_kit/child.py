"""The process of one part: python -m gpu_kit.child TASK."""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Recorder:
    """Writes the cases of a part, and knows how much time is left."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self._path, self._deadline = path, time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        """Seconds until the part must have stopped."""
        return self._deadline - time.monotonic()

    def plan(self, names: Iterable[str]) -> None:
        """Announces cases, so that those without a record can be named as cut."""
        self._write({"planned": list(names)})

    def case(self, name: str, /, **values: Any) -> None:
        """Records a case that ran."""
        self._write({"case": name, "status": "done", **values})

    def not_run(self, name: str, reason: str) -> None:
        """Records a case that cannot run here."""
        self._write({"case": name, "status": "not run", "reason": reason})

    def failed(self, name: str, reason: str, /, **values: Any) -> None:
        """Records a case that ran and is wrong."""
        self._write({"case": name, "status": "failed", "reason": reason, **values})

    def ended(self, status: str, reason: str | None) -> None:
        """Records the end of the part."""
        self._write({"ended": {"status": status, "reason": reason}})

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def main(task: dict[str, Any]) -> int:
    """Runs the part; a missing package is no failure."""
    recorder = Recorder(Path(task["records"]), task["budget_s"])
    module, _, function = task["function"].partition(":")
    # If the process must be ended, its log says where it was.
    faulthandler.dump_traceback_later(task["budget_s"], exit=False)
    try:
        getattr(importlib.import_module(module), function)(task["settings"], recorder)
    except ModuleNotFoundError as error:
        recorder.ended("not run", f"no module {error.name}")
        return 0
    except Exception as error:
        traceback.print_exc()
        message = str(error).strip().splitlines() or [""]
        recorder.ended("failed", f"{type(error).__name__}: {message[0]}")
        return 1
    recorder.ended("done", None)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
