"""The parts of the kit, and how one runs: in a process of its own, within a budget of time.

A part announces its cases and writes each one to a file as soon as it is done. So nothing is lost
if the part crashes or its time is up, and the cases that are missing can be named.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOTAL_BUDGET_S = 465.0
"""Under 8 minutes, with the time to print and to end processes."""
POLL_S = 0.1
# Of a part that had to be ended.
LOG_LINES = 12
# A CPU that runs other tests too is slow, and no number depends on it.
SHRUNK_BUDGET_FACTOR = 4
# A part stops by itself this long before its process would be ended.
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the kit."""

    function: str
    """`module:function`, called with a dict of settings and a `Recorder`."""
    budget_s: float
    title: str


PARTS = {
    "tests": Part("gpu_kit.gpu_tests:gpu_tests", 75, "tests marked gpu"),
    "parity": Part("gpu_kit.parity:parity", 45, "every backend against the reference in float64"),
    "step": Part("gpu_kit.step:training_steps", 150, "training steps"),
    "kernels": Part("gpu_kit.kernel_blocks:kernel_blocks", 145, "similarity and loss, B x G"),
    "slice": Part("gpu_kit.shared_slice:shared_slice", 50, "late interaction's shared slice"),
}


def run_part(
    name: str,
    part: Part,
    settings: dict[str, Any],
    *,
    budget_s: float,
    scratch: Path,
    environment: dict[str, str],
) -> dict[str, Any]:
    """Runs a part; prints its cases while they come.

    Returns:
        `status` ("done", "not run" or "failed") with its `reason`, the `seconds`, the `cases`, and
        `cut`: the cases that there was no time for.
    """
    print(f"[{name}] {part.title}, at most {max(0.0, budget_s):.0f} s", flush=True)
    started = time.monotonic()
    if budget_s <= 2 * GRACE_S:
        reason = f"no time: {max(0.0, budget_s):.0f} s of the whole budget are left"
        print(f"[{name}] not run: {reason}", flush=True)
        return {"status": "not run", "reason": reason, "seconds": 0.0, "cases": [], "cut": []}
    records, log = scratch / f"{name}.jsonl", scratch / f"{name}.log"
    records.touch()
    task = {
        "function": part.function,
        "settings": settings,
        "records": str(records),
        "budget_s": budget_s - GRACE_S,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_kit.child", json.dumps(task)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # compilers that it starts end with it
        )
    reader, timed_out = _Reader(name, records), False
    try:
        while process.poll() is None:
            reader.read()
            timed_out = time.monotonic() - started > budget_s
            if timed_out:
                break
            time.sleep(POLL_S)
    finally:
        # Also ends what the process left behind, and all of it if this one is interrupted.
        _end_group(process)
    reader.read()
    ended = reader.ended
    if timed_out:
        ended = {"status": "done" if reader.cases else "failed", "reason": "its time was up"}
        print("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]), flush=True)
    elif ended is None:
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = f"exit code {process.returncode}: {lines[-1] if lines else 'no message'}"
        ended = {"status": "failed", "reason": reason}
    seconds = time.monotonic() - started
    done = {case["case"] for case in reader.cases}
    cut = [] if ended["status"] == "not run" else [x for x in reader.planned if x not in done]
    print(f"[{name}] {ended['status']}: {ended['reason'] or f'{seconds:.0f} s'}", flush=True)
    if cut:
        print(f"[{name}] cut: {', '.join(cut)}", flush=True)
    return {**ended, "seconds": round(seconds, 1), "cases": reader.cases, "cut": cut}


class _Reader:
    """Reads the records of a part as they are written."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self._path, self._position = name, path, 0
        self.planned: list[str] = []
        self.cases: list[dict[str, Any]] = []
        self.ended: dict[str, Any] | None = None

    def read(self) -> None:
        text = self._path.read_bytes()[self._position :]
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            self._add(json.loads(line))

    def _add(self, record: dict[str, Any]) -> None:
        if "planned" in record:
            self.planned += record["planned"]
        elif "ended" in record:
            self.ended = record["ended"]
        else:
            self.cases.append(record)
            reason = record.get("reason")
            print(f"[{self._name}]   {record['case']}{f': {reason}' if reason else ''}", flush=True)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
