"""Runs srun beside the batch shell: forwards preemption notices, classifies how ranks ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from tvr.launchers.job import Job, task_run_dir
from tvr.launchers.monitoring.targets import TargetsFile
from tvr.launchers.restart_policy import AttemptEnd
from tvr.launchers.run_status import RunMark, read_progress, reported_failure
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.allocation import Allocation
from tvr.launchers.slurm.environment import step_environment

POLL_S = 1.0
# A notice that arrives before the ranks have started is lost, so it is repeated.
NOTICE_REPEAT_S = 10.0
MIN_REFRESH_S, FILES_PER_S = 4.0, 50


def attempt_end(
    failure: commands.StepFailure | None,
    *,
    code: int,
    message: str | None,
    reported: bool,
    failed_node: str | None,
    noticed: bool,
    saved_step: int,
) -> AttemptEnd:
    """Classifies the end of an attempt.

    Args:
        failure: First failed rank or node that srun reports.
        code: srun's exit code.
        message: The failed rank's own message, or srun's last line.
        reported: True if a rank reported the failure.
        failed_node: Node of the rank at fault in that report; None if it blames no rank.
        noticed: True if the ranks were notified of a preemption.
        saved_step: Step of the newest checkpoint.
    """
    # srun reports a failed node, but still exits with 0.
    if code == 0 and failure is None:
        return AttemptEnd(code=EXIT_DONE, reason="done", node=None, saved_step=saved_step)
    if failure is None:
        reason = message or f"srun exited with code {code}"
        return AttemptEnd(code=EXIT_FAILED, reason=reason, node=None, saved_step=saved_step)
    exit_code = failure.exit_code
    job_code = exit_code if exit_code in (EXIT_USAGE, EXIT_PREEMPTED) else EXIT_FAILED
    if noticed and failure.description.startswith("User defined signal"):
        job_code = EXIT_PREEMPTED  # the command has no handler for the notice
    if failure.description.startswith("Terminated") and not reported:
        # Before any rank fails, only SLURM sends SIGTERM: it takes the nodes for another job.
        job_code = EXIT_PREEMPTED
    where = f"node {failure.node}"
    if failure.rank is not None:
        where = f"rank {failure.rank} on {failure.node}"
    exited = exit_code is not None
    reason = message if message and exited else f"{where}: {failure.description}"
    node = None
    if job_code == EXIT_FAILED:
        # Ranks that exit because another rank failed may exit before it. A report that blames no
        # rank must not cost the node of the first rank that exits.
        node = failed_node if reported and exited else failure.node
    return AttemptEnd(code=job_code, reason=reason, node=node, saved_step=saved_step)


def refresh_interval_s(nodes: int) -> float:
    """Seconds between two looks at the nodes' metrics files: at most about 50 files a second."""
    return MIN_REFRESH_S + nodes / FILES_PER_S


def rendezvous_address(allocation: Allocation) -> str:
    """Address of the first node, on which rank 0 runs: as SLURM knows it, or else its name."""
    node = allocation.nodes[0]
    try:
        return commands.node_field(node, "NodeAddr")
    except ValueError as error:
        address = allocation.addresses.get(node, node)
        log(f"{error}; the ranks meet at {address}")
        return address


class SrunStep:
    """One run of srun, which runs all ranks of an attempt."""

    def __init__(
        self, job: Job, allocation: Allocation, targets: TargetsFile | None, mark: RunMark
    ) -> None:
        """Starts nothing yet.

        Args:
            job: The job.
            allocation: Its resources.
            targets: Target file of the job's metrics endpoints; None without one.
            mark: State of the run folder before the ranks start.
        """
        self._job, self._allocation = job, allocation
        self._targets, self._mark = targets, mark
        self._run_dir = task_run_dir(job, allocation.task)
        self._refresh_at_s = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._errors: list[str] = []
        self._noticed = False
        self._notified_s = 0.0
        # Earlier attempts have written to the same logs.
        self._log_sizes = {path: path.stat().st_size for path in job.launch_dir.glob("*.log")}

    def run(self, line: Sequence[str]) -> AttemptEnd:
        """Runs the command `line` and returns how the attempt ended."""
        signal.signal(signal.SIGUSR1, self._on_notice)
        # SLURM sends SIGTERM to the ranks, too; this process still has to see how they end.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        address = rendezvous_address(self._allocation)
        environment, dropped = step_environment(os.environ)
        if dropped:
            log(f"variables that would change srun are dropped: {', '.join(dropped)}")
        environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(self._allocation.port)}
        try:
            self._process = subprocess.Popen(
                line,
                env=environment,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                # Ranks may print text in any encoding.
                errors="replace",
            )
        except FileNotFoundError:
            raise ValueError(f"{line[0]} is not installed on {socket.gethostname()}") from None
        reader = threading.Thread(target=self._copy_errors, name="srun")
        reader.start()
        while (code := self._poll()) is None:
            pass
        reader.join()
        self._refresh_targets()
        return self._attempt_end(code)

    def _poll(self) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() >= self._refresh_at_s:
                self._refresh_targets()
                self._refresh_at_s = time.monotonic() + refresh_interval_s(self._job.nodes)
            if self._noticed and time.monotonic() - self._notified_s >= NOTICE_REPEAT_S:
                self._notify_ranks()
            return None

    def _on_notice(self, number: int, frame: object) -> None:
        self._noticed = True
        if self._process is not None:
            self._notify_ranks()

    def _notify_ranks(self) -> None:
        assert self._process is not None
        self._notified_s = time.monotonic()
        self._process.send_signal(signal.SIGUSR1)

    def _copy_errors(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            self._errors.append(line)

    def _refresh_targets(self) -> None:
        if self._targets is None:
            return
        try:
            self._targets.refresh()
        except OSError as error:
            log(f"Prometheus cannot find this job, its targets file is not writable: {error}")
            self._targets = None

    def _attempt_end(self, code: int) -> AttemptEnd:
        errors = "".join(self._errors)
        failure = commands.first_step_failure(errors)
        message = failed_node = report = None
        if failure is None:
            message = _last_line(errors)
        elif failure.rank is not None:
            report = reported_failure(self._run_dir, self._mark)
            message = report.reason if report else self._last_log_line(failure.rank)
            # SLURM assigns ranks to nodes in order, the same number to each.
            if report and report.rank is not None:
                failed_node = self._allocation.nodes[report.rank // self._job.ranks_per_node]
        return attempt_end(
            failure,
            code=code,
            message=message,
            reported=report is not None,
            failed_node=failed_node,
            noticed=self._noticed,
            saved_step=read_progress(self._run_dir).saved_step,
        )

    def _last_log_line(self, rank: int) -> str | None:
        path = self._job.launch_dir / f"{self._allocation.job_id}.rank-{rank:05d}.log"
        if not path.exists():
            return None
        with path.open(errors="replace") as file:
            file.seek(self._log_sizes.get(path, 0))
            return _last_line(file.read())


def _last_line(text: str) -> str | None:
    """The last line that slurmstepd has not written."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line and "slurmstepd" not in line), None)


def log(message: str) -> None:
    """Writes a line to the job's output."""
    print(f"tvr launch: {message}", file=sys.stderr, flush=True)
