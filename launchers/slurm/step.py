"""srun, beside which the batch shell stays: the notice passed on to ranks, and how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from tvr.launchers.job import Job
from tvr.launchers.monitoring.targets import Targets
from tvr.launchers.restart_policy import Ended
from tvr.launchers.run_status import read_progress, told_failure
from tvr.launchers.slurm import commands as slurm
from tvr.launchers.slurm.allocation import Allocation

LOOK_EVERY_S = 1.0
# A notice that came before the ranks were there must come once more.
REMIND_EVERY_S = 10.0


def ended_as(
    bad: slurm.TaskEnd | None,
    *,
    code: int,
    said: str | None,
    blamed: str | None,
    noticed: bool,
    saved_step: int,
) -> Ended:
    """What srun's exit code and words mean; `said` are the failing rank's own, and `blamed` is
    its node, if it is known."""
    # Of a node that failed srun speaks, and ends with 0.
    if code == 0 and bad is None:
        return Ended(code=EXIT_DONE, reason="done", node=None, saved_step=saved_step)
    if bad is None:
        reason = said or f"srun ended with exit code {code}"
        return Ended(code=EXIT_FAILED, reason=reason, node=None, saved_step=saved_step)
    job_code = bad.exit_code if bad.exit_code in (EXIT_USAGE, EXIT_PREEMPTED) else EXIT_FAILED
    if noticed and bad.what.startswith("User defined signal"):
        job_code = EXIT_PREEMPTED  # it ran something that does not listen
    if bad.what.startswith("Terminated") and blamed is None:
        # Nobody but SLURM sends SIGTERM before a rank has failed: its nodes are to be another's.
        job_code = EXIT_PREEMPTED
    who = f"node {bad.node}" if bad.rank is None else f"rank {bad.rank} on {bad.node}"
    reason = said if said and bad.exit_code is not None else f"{who}: {bad.what}"
    node = None
    if job_code == EXIT_FAILED:
        # Ranks that end because another one failed may be gone before it.
        node = blamed if blamed and bad.exit_code is not None else bad.node
    return Ended(code=job_code, reason=reason, node=node, saved_step=saved_step)


class Ranks:
    """srun, while it runs."""

    def __init__(self, job: Job, here: Allocation, targets: Targets | None, began_s: float) -> None:
        self._job, self._here, self._targets, self._began_s = job, here, targets, began_s
        self._process: subprocess.Popen[str] | None = None
        self._words: list[str] = []
        self._noticed = False
        self._reminded_s = 0.0
        self._sizes = {path: path.stat().st_size for path in job.folder.glob("*.log")}

    def run(self, line: Sequence[str]) -> Ended:
        signal.signal(signal.SIGUSR1, self._notice)
        # The ranks get it from SLURM themselves; how they end is still to be seen.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        address = slurm.node_field(self._here.nodes[0], "NodeAddr")
        environment = os.environ | {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(self._here.port),
        }
        self._process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
        listener = threading.Thread(target=self._listen, name="srun")
        listener.start()
        while (code := self._look()) is None:
            pass
        listener.join()
        self._refresh_targets()
        return self._ended(code)

    def _look(self) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            self._refresh_targets()
            if self._noticed and time.monotonic() - self._reminded_s >= REMIND_EVERY_S:
                self._pass_on()
            return None

    def _notice(self, number: int, frame: object) -> None:
        self._noticed = True
        if self._process is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        assert self._process is not None
        self._reminded_s = time.monotonic()
        self._process.send_signal(signal.SIGUSR1)

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for words in self._process.stderr:
            sys.stderr.write(words)
            sys.stderr.flush()
            self._words.append(words)

    def _refresh_targets(self) -> None:
        if self._targets is None:
            return
        try:
            self._targets.refresh()
        except OSError as error:
            say(f"Prometheus does not find this job: {error}")
            self._targets = None

    def _ended(self, code: int) -> Ended:
        words = "".join(self._words)
        bad = slurm.first_bad_end(words)
        said = blamed = None
        if bad is None:
            said = _last_line(words)
        elif bad.rank is not None:
            told = told_failure(Path(self._job.run_dir), self._began_s)
            said = told.reason if told else self._last_words(bad.rank)
            # SLURM gives ranks to nodes in their order, as many to each.
            blamed = self._here.nodes[told.of // self._job.ranks_per_node] if told else None
        return ended_as(
            bad,
            code=code,
            said=said,
            blamed=blamed,
            noticed=self._noticed,
            saved_step=read_progress(Path(self._job.run_dir)).saved_step,
        )

    def _last_words(self, rank: int) -> str | None:
        path = self._job.folder / f"{self._here.job_id}.rank-{rank:05d}.log"
        if not path.exists():
            return None
        with path.open(errors="replace") as file:
            file.seek(self._sizes.get(path, 0))
            return _last_line(file.read())


def _last_line(text: str) -> str | None:
    """The last line that is not SLURM's own."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line and "slurmstepd" not in line), None)


def say(text: str) -> None:
    """Into the job's output."""
    print(f"tvr launch: {text}", file=sys.stderr, flush=True)
