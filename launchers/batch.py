"""The batch shell's part of a job: it stays beside srun on the first node, and decides at the end.

It tells ranks where they meet, passes the notice to leave on to them, writes down how the attempt
ended, and queues the job again where its budget allows that. Where the system itself queued it
again, since a node failed, the next attempt writes down what it sees of the one before.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvr.launchers import slurm
from tvr.launchers.attempts import Attempts
from tvr.launchers.job import Job, read_record
from tvr.launchers.nodelist import expand_nodes
from tvr.launchers.progress import read_progress, told_failure
from tvr.launchers.restarts import DONE, FAILED, PREEMPTED, USAGE, Decision, Ended, decide
from tvr.launchers.targets import Targets

LOOK_EVERY_S = 1.0
# A notice that came before the ranks were there must come once more.
REMIND_EVERY_S = 10.0
# Below the ports that systems give out by themselves.
FIRST_PORT, NUM_PORTS = 20000, 12000
NOT_RESPONDING = re.compile(r"DOWN|FAIL|\*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What SLURM gave this attempt."""

    job_id: str
    name: str
    """What SLURM's commands call it: the number of an array is that of one of its tasks, too."""
    restart: int
    nodes: tuple[str, ...]

    @property
    def port(self) -> int:
        """Of the meeting place; another one for each restart, since an orphan may hold the old."""
        return FIRST_PORT + (int(self.job_id) + 101 * self.restart) % NUM_PORTS


def allocation(environment: Mapping[str, str]) -> Allocation:
    """From SLURM's variables."""
    job_id, name = environment["SLURM_JOB_ID"], "{SLURM_JOB_ID}"
    if "SLURM_ARRAY_JOB_ID" in environment:
        name = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}"
    return Allocation(
        job_id=job_id,
        name=name.format_map(environment),
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(expand_nodes(environment["SLURM_JOB_NODELIST"])),
    )


def run_batch(record: Path, line: Sequence[str]) -> int:
    """Runs `line`, which is srun's, for the job of the record; its exit code."""
    job, here = read_record(record), allocation(os.environ)
    attempts = Attempts(job.folder, here.job_id)
    decision = _after_earlier(job, here, attempts)
    if decision and (not decision.again or set(decision.exclude) & set(here.nodes)):
        return _act(decision, job, here)
    began_s = time.time()
    attempts.begin(here.restart, list(here.nodes), began_s)
    targets = Targets(Path(job.targets), Path(job.run_dir), began_s) if job.targets else None
    ended = _Ranks(job, here, targets, began_s).run(line)
    if ended.code == FAILED and not _is_ours(here):
        # Ranks that SLURM ends, to give their nodes to another job, have not failed.
        ended = _taken_away(here.nodes, job)
    attempts.end(here.restart, ended)
    if targets and ended.code in (DONE, PREEMPTED):
        targets.remove()
    return _act(_decide(attempts, job), job, here)


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
        return Ended(code=DONE, reason="done", node=None, saved_step=saved_step)
    if bad is None:
        reason = said or f"srun ended with exit code {code}"
        return Ended(code=FAILED, reason=reason, node=None, saved_step=saved_step)
    job_code = bad.exit_code if bad.exit_code in (USAGE, PREEMPTED) else FAILED
    if noticed and bad.what.startswith("User defined signal"):
        job_code = PREEMPTED  # it ran something that does not listen
    who = f"node {bad.node}" if bad.rank is None else f"rank {bad.rank} on {bad.node}"
    reason = said if said and bad.exit_code is not None else f"{who}: {bad.what}"
    node = None
    if job_code == FAILED:
        # Ranks that end because another one failed may be gone before it.
        node = blamed if blamed and bad.exit_code is not None else bad.node
    return Ended(code=job_code, reason=reason, node=node, saved_step=saved_step)


def _after_earlier(job: Job, here: Allocation, attempts: Attempts) -> Decision | None:
    """What follows from the attempts before; none: this is the first."""
    for attempt in attempts.read():
        if attempt.ended is None and attempt.restart < here.restart:
            attempts.end(attempt.restart, _taken_away(attempt.nodes, job))
    return _decide(attempts, job) if here.restart else None


def _taken_away(nodes: Sequence[str], job: Job) -> Ended:
    """How an attempt ended whose batch shell has not said so."""
    saved_step = read_progress(Path(job.run_dir)).saved_step
    for node in nodes:
        if NOT_RESPONDING.search(slurm.node_field(node, "State")):
            reason = f"node {node} failed"
            return Ended(code=FAILED, reason=reason, node=node, saved_step=saved_step)
    reason = "SLURM took it off its nodes"
    return Ended(code=PREEMPTED, reason=reason, node=None, saved_step=saved_step)


def _is_ours(here: Allocation) -> bool:
    """Whether SLURM still has this attempt running."""
    (state,) = slurm.job_states(here.name)
    return (state.state, state.restarts) == ("RUNNING", here.restart)


def _decide(attempts: Attempts, job: Job) -> Decision | None:
    ends = [attempt.ended for attempt in attempts.read() if attempt.ended is not None]
    return decide(ends, job.policy) if ends else None


def _act(decision: Decision | None, job: Job, here: Allocation) -> int:
    assert decision is not None, "an attempt has ended"
    if not decision.again:
        _say(decision.text)
        return decision.code
    (state,) = slurm.job_states(here.name)
    # A shell that outlived its node's daemon leaves the job alone, and so does one that ends
    # because the job is cancelled.
    if (state.state, state.restarts) != ("RUNNING", here.restart):
        _say(f"job {here.name} is {state.state}: not queued again from here")
        return decision.code
    _say(decision.text)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # comes with the requeue
    slurm.requeue(here.name, decision.wait_s, dict.fromkeys((*job.exclude, *decision.exclude)))
    return decision.code


class _Ranks:
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
            _say(f"Prometheus does not find this job: {error}")
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


def _say(text: str) -> None:
    print(f"tvr launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_batch(Path(sys.argv[1]), sys.argv[2:]))
