"""The ranks that the other ranks of a stalled job wait for, found from the positions of all ranks.

All ranks enter the collectives of a group in the same order. A rank that has entered fewer than the
other members is the one that they wait for, unless it waits for a third rank itself. Where the
ranks lie in their code decides nothing: on a GPU each rank blocks where it next reads a result.

If no rank is behind, no rank is named. A guess would cost a healthy node its place in the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["start", "checkpoint", "evaluation", "training"]
# The order of the phases that follow a step.
PHASE_ORDER: tuple[Phase, ...] = ("start", "checkpoint", "evaluation", "training")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """The position of a rank that has made no progress for too long."""

    rank: int
    host: str
    step: int
    """Number of finished steps."""
    phase: Phase
    line: str
    """The innermost line of this program in the main thread."""
    entered: Mapping[str, int]
    """Collectives that the rank has entered, by the name of their process group."""
    members: Mapping[str, Sequence[int]]
    """Ranks of these groups."""
    waiting: str | None
    """The collective that the rank is in, or since which its host has not waited for the device.
    None: it waits for no other rank."""

    @property
    def progress(self) -> tuple[int, int]:
        """Sort key: a rank with a smaller key has made less progress."""
        return self.step, PHASE_ORDER.index(self.phase)

    def text(self) -> str:
        """The position as messages show it."""
        since = f", waiting since {self.waiting}" if self.waiting else ""
        return f"in {self.phase} after step {self.step} ({self.line}{since})"


def find_stalled_ranks(
    known: Mapping[int, RankStatus], hosts: Sequence[str]
) -> tuple[list[int], str]:
    """Finds the ranks that the other ranks wait for.

    Args:
        known: Status by rank, of the ranks that have written one.
        hosts: Host of every rank.

    Returns:
        The ranks at fault, none if the positions show none, and a text about all ranks.
    """
    if silent := [rank for rank in range(len(hosts)) if rank not in known]:
        stalled = silent
        texts = [f"rank {r} on {hosts[r]} does not respond (suspended or dead)" for r in silent]
    elif len(hosts) == 1:
        return [0], f"rank 0 on {hosts[0]} is {known[0].text()}"
    else:
        stalled = _ranks_behind(known)
        texts = [f"rank {r} on {hosts[r]} is behind, {known[r].text()}" for r in stalled]
    others = _texts(known[rank] for rank in known if rank not in stalled)
    if not stalled:
        return [], (
            f"no rank is behind the others, so none is named as the cause and no node is excluded;"
            f" all ranks are {others}"
        )
    return stalled, f"{'; '.join(texts)}; the other ranks wait {others}"


def rank_at_fault(stalled: Sequence[int], hosts: Sequence[str]) -> int | None:
    """The rank whose node a launcher may exclude; None if no node or several nodes are at fault."""
    return min(stalled) if len({hosts[rank] for rank in stalled}) == 1 else None


def _ranks_behind(known: Mapping[int, RankStatus]) -> list[int]:
    """The ranks that are behind the others and do not wait themselves."""
    behind, ahead = set[int](), set[int]()
    groups = {name: ranks for status in known.values() for name, ranks in status.members.items()}
    for name, ranks in groups.items():
        counts = {rank: known[rank].entered.get(name, 0) for rank in ranks if rank in known}
        behind |= {rank for rank, count in counts.items() if count < max(counts.values())}
        ahead |= {rank for rank, count in counts.items() if count > min(counts.values())}
    if behind:
        # In a job of several groups, a rank can keep others waiting because it waits for a third.
        return sorted(r for r in behind if not (r in ahead and known[r].waiting))
    # The ranks have entered the same collectives of those that are counted. One that has finished
    # fewer steps, or has left the wait point where all others are, is behind in what is not.
    least = min(status.progress for status in known.values())
    slow = [rank for rank, status in sorted(known.items()) if status.progress == least]
    if len(slow) < len(known):
        return slow
    outside = [rank for rank, status in sorted(known.items()) if status.waiting is None]
    return outside if len(outside) < len(known) else []


def _texts(statuses: Iterable[RankStatus]) -> str:
    return "; ".join(sorted({status.text() for status in statuses}))
