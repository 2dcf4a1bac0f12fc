"""Results of `tvr bench train` and `tvr bench save`: rows for the JSON, tables to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich.table import Table
from tvr_bench.harness import result_table

from tvr.trainer.monitoring.step_record import PARTS

HOW_TRAIN = (
    "Step: median over steps of the mean over ranks. Parts: their shares of all steps' time. "
    "Gather: includes waiting for slower ranks. Efficiency: ranks x step of the first row / "
    "(ranks x step), at the same threads of a rank."
)
HOW_SAVE = (
    "A step waits: median time that steps wait for a save; for a background save, its copy and "
    "the ranks' agreements. Training is later by: median delay of training by the save's end, "
    "slower steps included. Both kinds take turns in one run, which trains during background saves."
)

Answer = Mapping[str, Any]


def rows(answers: Mapping[int, Answer], global_batch: int) -> list[dict[str, Any]]:
    """One row for each number of ranks; `answers` are those of `rank_task` by number of ranks."""
    result: list[dict[str, Any]] = []
    for ranks, answer in answers.items():
        by_rank = answer["by_rank"]
        steps = [
            fmean(sum(parts.values()) for parts in step) for step in zip(*by_rank, strict=True)
        ]
        total = sum(steps) * ranks
        shares = {
            part: sum(step.get(part, 0.0) for mine in by_rank for step in mine) / total
            for part in PARTS
        }
        step_s = median(steps)
        row = {"ranks": ranks, "step_s": step_s, "fastest_s": min(steps), "slowest_s": max(steps)}
        first = result[0] if result else row
        efficiency = first["ranks"] * first["step_s"] / (ranks * step_s)
        row |= {"pairs_per_s": global_batch / step_s, "efficiency": efficiency, "shares": shares}
        result.append(row)
    return result


def save_row(answer: Answer) -> dict[str, Any]:
    """The cost of both kinds of save, each on its slowest rank.

    Returns:
        `background_s`, `synchronous_s` and their `ratio`: median seconds that steps wait for a
        save. `background_later_s`, `synchronous_later_s` and `later_ratio`: median delay of
        training, which is the time to the save's end minus that of as many steps without a save
        (`step_s`, a median).
    """
    by_rank = answer["by_rank"]
    step_s = median(seconds for mine in by_rank for seconds in mine["step_s"])
    kinds = ("background", "synchronous")
    row: dict[str, Any] = {"checkpoint_bytes": answer["checkpoint_bytes"], "step_s": step_s}
    for kind in kinds:
        saves = list(zip(*(mine[kind] for mine in by_rank), strict=True))
        row[kind] = [max(mine["waited_s"] for mine in save) for save in saves]
        late = [max(mine["seconds"] - mine["steps"] * step_s for mine in save) for save in saves]
        row |= {f"{kind}_later": late, f"{kind}_steps": [save[0]["steps"] for save in saves]}
        row |= {f"{kind}_s": median(row[kind]), f"{kind}_later_s": median(late)}
    for name, end in (("ratio", "s"), ("later_ratio", "later_s")):
        row[name] = row[f"background_{end}"] / row[f"synchronous_{end}"]
    return row


def table(measured: Sequence[Mapping[str, Any]], sizes: Mapping[str, Any]) -> Table:
    """Milliseconds and share of each part (rows) for each number of ranks (columns)."""
    threads = sizes["threads"]
    result = result_table(
        f"{sizes['global_batch']} pairs a step, {sizes['parameters'] / 1e6:.1f} million"
        f" parameters, {sizes['device']}, {threads} thread{'s' if threads > 1 else ''} a rank",
        HOW_TRAIN,
    )
    result.add_column("")
    for row in measured:
        result.add_column(f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}", justify="right")
        result.add_column("", justify="right")
    for part in PARTS:
        cells = [(row["shares"][part] * row["step_s"], row["shares"][part]) for row in measured]
        if any(share for _, share in cells):
            result.add_row(part, *(x for s, y in cells for x in (_ms(s), f"{y:.1%}")))
    result.add_section()
    result.add_row("step", *(x for row in measured for x in (_ms(row["step_s"]), "")))
    result.add_row("pairs/s", *(x for row in measured for x in (f"{row['pairs_per_s']:.0f}", "")))
    result.add_row("efficiency", *(x for row in measured for x in (f"{row['efficiency']:.2f}", "")))
    return result


def save_table(row: Mapping[str, Any], sizes: Mapping[str, Any]) -> Table:
    """One line for each kind of save."""
    result = result_table(
        f"{row['checkpoint_bytes'] / 1e6:.0f} MB from {sizes['ranks']} ranks,"
        f" {sizes['saves']} saves of each kind",
        HOW_SAVE,
    )
    for name in ("save", "a step waits", "fastest", "slowest", "training is later by"):
        result.add_column(name, justify="left" if name == "save" else "right")
    for kind in ("background", "synchronous"):
        waits = row[kind]
        shown = (row[f"{kind}_s"], min(waits), max(waits), row[f"{kind}_later_s"])
        result.add_row(kind, *map(_ms, shown))
    result.add_row("ratio", f"{row['ratio']:.3f}", "", "", f"{row['later_ratio']:.2f}")
    return result


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
