"""Failed checks of a job's ranks, and the error that reports them run_on_all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvr.trainer.errors import PreflightFailed


@dataclass(frozen=True, slots=True)
class Finding:
    """A failed check on one rank."""

    rank: int
    text: str
    is_node_fault: bool
    """True if the node may be at fault, False if the settings are."""


def raise_findings(findings: Sequence[Finding], hosts: Sequence[str]) -> None:
    """Raises PreflightFailed if there are findings.

    Args:
        hosts: Host of every rank.
    """
    if not findings:
        return
    lines = [f"rank {found.rank} on {hosts[found.rank]}: {found.text}" for found in findings]
    # If settings are wrong as well, another node does not help.
    other_nodes_help = all(found.is_node_fault for found in findings)
    rank_at_fault = min(found.rank for found in findings) if other_nodes_help else None
    raise PreflightFailed(lines, rank_at_fault)
