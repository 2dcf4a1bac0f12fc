"""Finds the plan of a packing in its output folder, waits for the task that makes it, or makes it.

One of many tasks reads the annotations while the others wait. A note in the work folder says how
far the planning task is, and changes while that task lives. No clocks are compared: a task that
waits looks whether the note changes. Two tasks that plan at the same time write the same files, so
a note that is lost or late costs time only.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tvr.data_prep.annotations.clip_source import ClipSource
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.output_files import WORK_FOLDER, OutputFiles
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.packing.plan_build import BuiltPlan, OnPlan, build_plan

# A task notes its progress this often, and one that waits looks this often.
BEAT_S = 5.0
# A note that did not change over so many looks was left by a task that ended.
STALE_LOOKS = 24

LEASE_NAME = f"{WORK_FOLDER}/planning.json"


class PlannedElsewhere(Exception):
    """Another task makes the same plan."""


class PlanLease:
    """The note about planning at `name`."""

    def __init__(
        self,
        files: OutputFiles,
        name: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._name = name
        self._sleep = sleep
        self._now = now
        self._owner = uuid.uuid4().hex
        self._last_beat_s = now()
        self._stale: bytes | None = None
        self._is_held = False

    def wait(self, is_planned: Callable[[], bool], on_wait: OnPlan) -> bool:
        """Waits while another task plans.

        Returns:
            True once `is_planned` returns True; False if this task is to plan.
        """
        last, looks = self._stale, 0
        while True:
            if is_planned():
                return True
            note = self._files.read(self._name)
            if note is None or note == self._stale:
                return False
            looks = looks + 1 if note == last else 0
            if looks >= STALE_LOOKS:
                self._stale = note
                return False
            last = note
            on_wait("waiting for the task that plans:", _done(note))
            self._sleep(BEAT_S)

    def beat(self, done: int) -> None:
        """Notes the progress of this task from time to time.

        Raises:
            PlannedElsewhere: another task notes its progress, too.
        """
        if self._now() - self._last_beat_s < BEAT_S:
            return
        note = self._files.read(self._name)
        if note is not None and note != self._stale and _owner(note) != self._owner:
            self._is_held = False  # the note is the other task's
            raise PlannedElsewhere
        content = {"owner": self._owner, "clips": done, "beat": uuid.uuid4().hex}
        self._files.write(self._name, json.dumps(content).encode())
        self._is_held, self._stale = True, None
        self._last_beat_s = self._now()

    def release(self) -> None:
        """Removes the note of this task."""
        if self._is_held:
            self._files.remove([self._name])
            self._is_held = False


def _owner(note: bytes) -> str:
    try:
        return str(json.loads(note)["owner"])
    except (ValueError, KeyError, TypeError):
        return ""


def _done(note: bytes) -> int:
    try:
        return int(json.loads(note)["clips"])
    except (ValueError, KeyError, TypeError):
        return 0


def claim_plan(
    source: ClipSource,
    settings: PackSettings,
    output: OutputDir,
    folder: Path,
    *,
    is_shared: bool,
    on_plan: OnPlan,
    check: Callable[[BuiltPlan], None],
    max_bad: int,
) -> bool:
    """Makes `output` join or start the packing of a source.

    Args:
        folder: Local folder for the files of a new plan.
        is_shared: Other tasks may need the same plan at this moment: one makes it, others wait.
        on_plan: Receives the progress of planning and waiting.
        check: Called with a new plan before the output is touched.
        max_bad: Rows of the source that may be no clips.

    Returns:
        True if the data set is already complete.

    Raises as `build_plan` and `OutputDir.claim`.
    """
    identity = source.identity()
    lease = PlanLease(output.files, LEASE_NAME) if is_shared and identity is not None else None
    state = output.join(identity, settings)

    def is_planned() -> bool:
        nonlocal state
        state = output.join(identity, settings)
        return state != "absent"

    def report(step: str, done: int) -> None:
        # A source that also depends on the names of videos is not known again: nobody waits for it.
        if lease is not None and source.identity() is not None:
            lease.beat(done)
        on_plan(step, done)

    while state == "absent":
        if lease is not None and lease.wait(is_planned, on_plan):
            break
        try:
            built = build_plan(source, settings, folder, report, max_bad=max_bad)
            check(built)
            # Equal names mean equal clips only if the file did not change while it was read.
            state = output.claim(built, identity if source.identity() == identity else None)
        except PlannedElsewhere:
            continue
        finally:
            if lease is not None:
                lease.release()
    return state == "complete"
