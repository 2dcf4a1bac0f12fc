"""log.jsonl, the events of a run: rank 0 writes one JSON object a line, and the pages read them."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tvr.data_prep.records import Replacement
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.fencing import Attempt

if TYPE_CHECKING:
    # The pages read logs without importing torch.
    from tvr.trainer.distributed.world import World

LOG = "log.jsonl"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)

Event = Mapping[str, Any]


class LogWriter:
    """Appends events to run_dir/log.jsonl on rank 0, and every rank's keys to its own file.

    A process whose attempt was replaced by a newer one raises Fenced and writes nothing.
    """

    def __init__(self, run_dir: Path, attempt: Attempt, world: World) -> None:
        self._attempt = attempt
        self._log = _Lines(run_dir / LOG) if world.is_first else None
        self._keys = _Lines(run_dir / "keys" / f"rank-{world.rank:05d}.jsonl")
        self._world = world
        self._started = time.monotonic()

    def begin(self, step: int) -> None:
        """Continues after optimiser step `step`; removes later lines of earlier attempts."""
        files = [self._keys.path, *self._orphaned_keys()]
        if self._log is not None:
            files.append(self._log.path)
        for path in files:
            if path.exists():
                _keep_until(path, step)

    def _orphaned_keys(self) -> list[Path]:
        """On rank 0, the files of ranks that only an earlier, larger attempt had."""
        if not self._world.is_first:
            return []
        files = self._keys.path.parent.glob("rank-*.jsonl")
        return [path for path in files if int(path.stem[5:]) >= self._world.world_size]

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        if self._log is not None:
            self._attempt.check()
            elapsed = {"time_s": round(time.monotonic() - self._started, 3)}
            self._log.append({"event": event, **elapsed, **values})

    def warn(self, text: str) -> None:
        """Logs a warning to the job's output, on rank 0."""
        if self._log is not None:
            log.warning(text)

    def write_bad(
        self, event: Literal["replaced", "left_out"], step: int, bad: Sequence[Replacement]
    ) -> None:
        """Logs samples that training replaced, or that an evaluation left out."""
        for entry in bad:
            self.write(event, {"step": step, **asdict(entry)})

    def write_keys(self, step: int, keys: Sequence[str]) -> None:
        self._keys.append({"step": step, "keys": list(keys)})


class _Lines:
    """A file to which whole lines are appended; lines wait in memory while the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, line: Mapping[str, Any]) -> None:
        waited = bool(self._waiting)
        self._waiting.append(json.dumps(line).encode() + b"\n")
        try:
            self.path.parent.mkdir(exist_ok=True)
            _append(self.path, b"".join(self._waiting))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if not waited:
                log.warning("%s: the disk is full; new lines wait in memory: %s", self.path, error)
            return
        if waited:
            log.warning("%s: the waiting lines are written", self.path)
        self._waiting.clear()


def _append(path: Path, content: bytes) -> None:
    """Appends all of the content, or nothing if it raises OSError."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            file.truncate(end)
            raise


def _keep_until(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, AttributeError):
            continue  # cut off by the crash that ended the earlier attempt
    write_atomically(path, "".join(kept))


@dataclass
class RunLog:
    """The events of log.jsonl: steps and evaluations by step, others in the order of the file."""

    steps: list[Event] = field(default_factory=list)
    evaluations: list[Event] = field(default_factory=list)
    replaced: list[Event] = field(default_factory=list)
    """Bad samples that training replaced, once for each time they were drawn."""
    left_out: list[Event] = field(default_factory=list)
    """Bad samples that evaluations left out."""
    saves: list[Event] = field(default_factory=list)
    """Saves of checkpoints; one with `error` failed."""
    preempted: list[Event] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    settings_changed: list[Event] = field(default_factory=list)
    """Settings that differed from the checkpoint's when the run resumed."""
    unreadable_lines: int = 0


def read_log(text: str) -> RunLog:
    """Reads the events of log.jsonl. If a resumed run logs a step again, its last event counts.

    Lines that are no JSON objects (cut off by a crash) are counted; unknown events are ignored.
    """
    log = RunLog()
    steps: dict[int, Event] = {}
    evaluations: dict[int, Event] = {}
    for event, elapsed_s in _events(text, log):
        match event.get("event"):
            case "step":
                steps[event["step"]] = {**event, "elapsed_s": elapsed_s}
            case "evaluation":
                evaluations[event["step"]] = {**event, "elapsed_s": elapsed_s}
            case "replaced":
                log.replaced.append(event)
            case "left_out":
                log.left_out.append(event)
            case "saved" | "save_failed":
                log.saves.append({**event, "elapsed_s": elapsed_s})
            case "preempted":
                log.preempted.append(event)
            case "resumed":
                log.resumed_at.append(event["step"])
            case "settings_changed":
                log.settings_changed.append(event)
    log.steps = [steps[step] for step in sorted(steps)]
    log.evaluations = [evaluations[step] for step in sorted(evaluations)]
    return log


def _with_shared_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Interns the names: a long log has ten million of them, and a hundred different ones."""
    return {sys.intern(name): value for name, value in pairs}


def _events(text: str, log: RunLog) -> Iterator[tuple[Event, float]]:
    """Events with the seconds trained so far; the clock continues over restarts."""
    before_s = last_s = 0.0
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line, object_pairs_hook=_with_shared_names)
        except json.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            log.unreadable_lines += 1
            continue
        if "time_s" in event:
            # A restart is also recognised by its event: its start-up may take longer than the steps
            # that were kept.
            if event.get("event") == "resumed" or before_s + event["time_s"] < last_s:
                before_s = last_s
            last_s = before_s + event["time_s"]
        yield event, last_s
