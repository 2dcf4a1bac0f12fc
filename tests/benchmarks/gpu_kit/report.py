"""The kit's table: short, plain text, one section for each part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = Sequence[str]
GIB = 2**30


def failures(document: dict[str, Any]) -> list[str]:
    """Parts and cases that failed; what could not run or was cut is none."""
    found = []
    for name, part in document["parts"].items():
        if part["status"] == "failed":
            found.append(f"{name}: {part['reason']}")
        bad = (case for case in part["cases"] if case["status"] == "failed")
        found += [f"{name}, {case['case']}: {case['reason']}" for case in bad]
    return found


def report(document: dict[str, Any], path: Path | None) -> str:
    """The table as text."""
    lines = ["", _machine_line(document["machine"])]
    if document["shrunk"]:
        lines.append("small shapes on the CPU: these numbers say nothing about a GPU")
    for name, rows in SECTIONS.items():
        if name in document["parts"]:
            part = document["parts"][name]
            lines += ["", *_section(name, part, rows(part["cases"]))]
    lines.append("")
    lines += [f"FAILED {line}" for line in failures(document)]
    where = f"; all numbers: {path}" if path is not None else ""
    lines.append(f"{document['seconds']:.0f} s{where}")
    return "\n".join(lines)


def _section(name: str, part: dict[str, Any], rows: Iterable[Row]) -> Iterator[str]:
    status = part["status"] if part["reason"] is None else f"{part['status']}, {part['reason']}"
    yield f"== {name}: {status} ({part['seconds']:.0f} s)"
    done = list(rows)
    if len(done) > 1:
        yield from _aligned(done)
    others: dict[str, list[str]] = {}
    for case in part["cases"]:
        if case["status"] == "not run":
            others.setdefault(case["reason"], []).append(case["case"])
    for reason, cases in others.items():
        yield f"not run ({reason}): {_few(cases)}"
    if part["cut"]:
        yield f"cut for time: {_few(part['cut'])}"


def _tests(cases: list[dict[str, Any]]) -> Iterator[Row]:
    yield "file", "passed", "failed", "skipped"
    for case in cases:
        if case["status"] != "not run":
            counts = (str(case[key]) for key in ("passed", "failed", "skipped"))
            yield case["case"], *counts


def _parity(cases: list[dict[str, Any]]) -> Iterator[Row]:
    yield "largest relative error", "value", "bound", "gradients", "bound", "pairs compared"
    for case in cases:
        if case["status"] != "not run":
            errors = dict(case["errors"])
            value, bounds = errors.pop("similarity"), case["bounds"]
            broken = value is None or None in errors.values()
            largest = None if broken else max(errors.values())
            share = case.get("pairs_compared")
            yield (
                case["case"],
                _error(value),
                _error(bounds["similarity"]),
                _error(largest),
                _error(bounds["gradients"]),
                "all" if share is None else f"{share:.0%}",
            )


def _steps(cases: list[dict[str, Any]]) -> Iterator[Row]:
    yield "recipe, engine", "samples/s", "step", "MFU", "peak", "estimate", "host reads"
    for case in cases:
        if case["status"] == "done":
            yield (
                case["case"],
                f"{case['samples_per_s']:,.0f}",
                f"{case['step_ms']:,.1f} ms",
                "unknown" if case["mfu"] is None else f"{case['mfu']:.1%}",
                f"{case['peak_bytes'] / GIB:.2f} GiB",
                f"{case['estimated_bytes'] / GIB:.2f} GiB",
                str(case["host_reads"]),
            )


def _kernels(cases: list[dict[str, Any]]) -> Iterator[Row]:
    yield "G", "implementation", "forward", "TFLOP/s", "B/pair", "+ backward", "TFLOP/s", "B/pair"
    lines: dict[tuple[int, str], dict[bool, dict[str, Any]]] = {}
    for case in cases:
        if case["status"] == "done":
            name = case["case"].partition(",")[0]
            lines.setdefault((case["G"], name), {})[case["backward"]] = case
    for (pairs, name), found in sorted(lines.items(), key=lambda line: line[0][0]):
        cells = []
        for backward in (False, True):
            case = found.get(backward)
            if case is None:
                cells += ["", "", ""]
                continue
            size = case["bytes_per_pair"]
            memory = "" if size is None else f"{size:,.0f}"
            cells += [f"{case['ms']:,.2f} ms", f"{case['tflops_per_s']:,.1f}", memory]
        yield f"{pairs:,}", name, *cells


def _slice(cases: list[dict[str, Any]]) -> Iterator[Row]:
    yield "implementation", "pairs", "direction", "time", "memory", "measured by"
    order = sorted(cases, key=lambda case: (case.get("backward", False), case["case"]))
    for case in order:
        if case["status"] == "done":
            size = case.get("peak_bytes")
            yield (
                case["name"],
                f"{case['pairs']} x {case['pairs']}",
                "forward + backward" if case["backward"] else "forward",
                f"{case['ms']:.3f} ms",
                "" if size is None else f"{size / 1e6:,.0f} MB",
                "others, on an H100" if case["published"] else "this run",
            )


SECTIONS = {
    "tests": _tests,
    "parity": _parity,
    "step": _steps,
    "kernels": _kernels,
    "slice": _slice,
}


def _machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    card = machine["card"]
    if card is None:
        return f"{machine['cpu']}, {machine['cores']} cores; {versions}"
    return f"{card['name']}, driver {card['driver_version'] or 'unknown'}; {versions}"


def _aligned(rows: list[Row]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = [
        not any(cell[:1].isdigit() for cell in column) for column in zip(*rows[1:], strict=True)
    ]
    for row in rows:
        cells = zip(row, widths, texts, strict=True)
        yield "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width) for cell, width, is_text in cells
        ).rstrip()


def _error(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.1e}"


def _few(names: list[str]) -> str:
    return "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
