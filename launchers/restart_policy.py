"""Decides whether a job starts again after an attempt, within a restart budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE

MAX_BACK_OFF_S = 600.0
# Exclude a node after this many failures.
MAX_NODE_FAILURES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Restart budget of a job."""

    max_failures: int = 3
    """Consecutive failures without a new checkpoint after which the job stops."""
    max_restarts: int = 100
    """All restarts, including those after a preemption."""
    back_off_s: float = 30.0
    """Wait before the first restart after a failure. It doubles with each further failure."""

    def __post_init__(self) -> None:
        if self.max_failures < 1 or self.max_restarts < 0 or self.back_off_s < 0:
            raise ValueError(
                f"max_failures={self.max_failures} must be at least 1, max_restarts="
                f"{self.max_restarts} and back_off_s={self.back_off_s} at least 0"
            )


NO_RESTARTS = RestartPolicy(max_failures=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnd:
    """How one attempt of a job ended."""

    code: int
    """Exit code: 0 done, 2 bad usage, 3 failed, 75 preempted."""
    reason: str
    node: str | None
    """Node on which the failure began; None if unknown."""
    saved_step: int
    """Step of the newest checkpoint when the attempt ended; 0 without a checkpoint."""
    superseded: bool = False
    """True if another job has started on the same run folder since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartDecision:
    """Whether a job starts again, and how."""

    restart: bool
    code: int
    """Exit code of the job if it does not restart."""
    message: str
    wait_s: float = 0.0
    exclude: tuple[str, ...] = ()
    """Nodes that have failed `MAX_NODE_FAILURES` times or more."""


def decide_restart(attempts: Sequence[AttemptEnd], policy: RestartPolicy) -> RestartDecision:
    """Decides whether a job restarts, from the ends of its attempts.

    A finished job, a usage error and a superseded job never restart. A failure restarts after an
    exponential back-off, until `max_failures` failures share the same newest checkpoint. A
    preemption restarts at once. `max_restarts` bounds the restarts of both kinds.

    Args:
        attempts: Ends of all attempts so far in order; at least one.
        policy: Restart budget.
    """
    last, restarts = attempts[-1], len(attempts) - 1
    if last.code == EXIT_DONE:
        return RestartDecision(restart=False, code=EXIT_DONE, message="done")
    if last.code == EXIT_USAGE:
        message = f"{last.reason}; no restart: the same command would fail in the same way"
        return RestartDecision(restart=False, code=EXIT_USAGE, message=message)
    if last.superseded:
        message = f"{last.reason}; no restart: another job has taken over the run"
        return RestartDecision(restart=False, code=EXIT_FAILED, message=message)
    failed = [attempt for attempt in attempts if attempt.code != EXIT_PREEMPTED]
    without_progress = sum(attempt.saved_step == last.saved_step for attempt in failed)
    if last.code != EXIT_PREEMPTED and without_progress >= policy.max_failures:
        message = (
            f"{last.reason}; stopped after {without_progress} failures without a new checkpoint"
            " (--max-failures)"
        )
        return RestartDecision(restart=False, code=EXIT_FAILED, message=message)
    if restarts >= policy.max_restarts:
        message = f"{last.reason}; stopped after {restarts} restarts (--max-restarts)"
        return RestartDecision(restart=False, code=last.code, message=message)
    wait_s = 0.0
    if last.code != EXIT_PREEMPTED:
        wait_s = min(MAX_BACK_OFF_S, policy.back_off_s * 2 ** (without_progress - 1))
    failures = Counter(attempt.node for attempt in failed)
    exclude = sorted(node for node, n in failures.items() if node and n >= MAX_NODE_FAILURES)
    return RestartDecision(
        restart=True,
        code=last.code,
        message=f"{last.reason}; restarting" + (f" in {wait_s:.0f} s" if wait_s else ""),
        wait_s=wait_s,
        exclude=tuple(exclude),
    )
