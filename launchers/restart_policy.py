"""Whether a job that ended is started again: from how its attempts ended, and a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE

LONGEST_WAIT_S = 600.0
# So often a node may be where it began to go wrong.
NODE_FAILURES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The budget."""

    max_failures: int = 3
    """Failures in a row without a new checkpoint between them, after which a job stops."""
    max_restarts: int = 100
    """Restarts in all, those after a preemption among them."""
    back_off_s: float = 30.0
    """Wait after a first failure; it doubles with each one that follows."""

    def __post_init__(self) -> None:
        if self.max_failures < 1 or self.max_restarts < 0 or self.back_off_s < 0:
            raise ValueError(
                f"max_failures={self.max_failures} must be at least 1, max_restarts="
                f"{self.max_restarts} and back_off_s={self.back_off_s} at least 0"
            )


ONCE = Policy(max_failures=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one attempt ended."""

    code: int
    """0 done, 2 bad usage, 3 failed, 75 preempted."""
    reason: str
    node: str | None
    """Where it began to go wrong, as far as that is known."""
    saved_step: int
    """Of the newest checkpoint there was then; 0: none."""
    over: bool = False
    """Whether a start of the run by another job has taken it over meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done."""

    again: bool
    code: int
    """Exit code of the job if it is not started again."""
    text: str
    wait_s: float = 0.0
    exclude: tuple[str, ...] = ()
    """Nodes that failed too often."""


def decide(attempts: Sequence[Ended], policy: Policy) -> Decision:
    """From all attempts of a job, the last one last: at least one."""
    last, restarts = attempts[-1], len(attempts) - 1
    if last.code == EXIT_DONE:
        return Decision(again=False, code=EXIT_DONE, text="done")
    if last.code == EXIT_USAGE:
        text = f"{last.reason}; not started again: the same line would fail in the same way"
        return Decision(again=False, code=EXIT_USAGE, text=text)
    if last.over:
        text = f"{last.reason}; not started again: another job has taken over the run"
        return Decision(again=False, code=EXIT_FAILED, text=text)
    failed = [attempt for attempt in attempts if attempt.code != EXIT_PREEMPTED]
    in_a_row = sum(attempt.saved_step == last.saved_step for attempt in failed)
    if last.code != EXIT_PREEMPTED and in_a_row >= policy.max_failures:
        text = f"{last.reason}; stopped after {in_a_row} failures without a new checkpoint"
        return Decision(again=False, code=EXIT_FAILED, text=f"{text} (--max-failures)")
    if restarts >= policy.max_restarts:
        text = f"{last.reason}; stopped after {restarts} restarts (--max-restarts)"
        return Decision(again=False, code=last.code, text=text)
    wait_s = 0.0
    if last.code != EXIT_PREEMPTED:
        wait_s = min(LONGEST_WAIT_S, policy.back_off_s * 2 ** (in_a_row - 1))
    blamed = Counter(attempt.node for attempt in failed)
    exclude = sorted(node for node, n in blamed.items() if node and n >= NODE_FAILURES)
    text = f"{last.reason}; starts again" + (f" in {wait_s:.0f} s" if wait_s else "")
    return Decision(again=True, code=last.code, text=text, wait_s=wait_s, exclude=tuple(exclude))
