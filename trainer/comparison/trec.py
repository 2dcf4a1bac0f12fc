"""Writes the best videos of each caption as a run and qrels of TREC, which trec_eval reads.

A line of the run is `qid Q0 docid rank score tag`, one of the qrels `qid 0 docid 1`. A qid is q and
the number of the caption from 1, in the order of the queries of `tvr evaluate --json`; a docid is a
video's key. Only the direction from text to video is written.

trec_eval ignores the rank column. It sorts by score, in single precision, and equal scores by the
reverse order of the docids. In our evaluation a wrong video whose similarity equals that of a right
one, up to TIE_TOLERANCE, ranks first. So the lines are in that order, and a score that is not below
the one before is lowered to the next smaller number of single precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvr.kernels.ranking import TIE_TOLERANCE
from tvr.launchers.atomic_write import write_atomically

TAG = "tvr"
_NOT_IN_A_FIELD = re.compile(r"[\s%]")


def write_trec(
    queries: Sequence[Mapping[str, Any]],
    run: Path,
    depth: int,
    *,
    tag: str = TAG,
) -> Path:
    """Writes the run, and the qrels beside it with the suffix .qrels.

    Args:
        queries: As in evaluation.json: "key" of the right video, or "keys" if there are several,
            "rank" of the best of them, and "top" with "key" and "similarity" of the best videos.
        run: File of the run.
        depth: Largest number of videos that are written for a query.
        tag: Name of the system, the last field of each line.

    Returns:
        The file of the qrels.

    Raises:
        ValueError: there are no queries, a tag with spaces, or two videos of a query with one key.
    """
    if not queries:
        raise ValueError(f"{run}: there are no queries to write")
    if not tag or _NOT_IN_A_FIELD.search(tag):
        raise ValueError(f"tag {tag!r} must be one word")
    qrels = run.with_name(run.name + ".qrels")
    right = [list(dict.fromkeys(query.get("keys") or [query["key"]])) for query in queries]
    write_atomically(run, "".join(_run_lines(queries, right, depth, tag)))
    write_atomically(qrels, "".join(_qrels_lines(right)))
    return qrels


def _run_lines(
    queries: Sequence[Mapping[str, Any]], right: Sequence[Sequence[str]], depth: int, tag: str
) -> Iterator[str]:
    for number, (query, keys) in enumerate(zip(queries, right, strict=True), 1):
        previous = np.float32(np.inf)
        for place, (key, similarity) in enumerate(_ordered(query, set(keys), depth), 1):
            score = np.float32(similarity)
            if score >= previous:
                score = np.nextafter(previous, np.float32(-np.inf))
            previous = score
            yield f"q{number} Q0 {document(key)} {place} {score:.9g} {tag}\n"


def _qrels_lines(right: Sequence[Sequence[str]]) -> Iterator[str]:
    for number, keys in enumerate(right, 1):
        for key in keys:
            yield f"q{number} 0 {document(key)} 1\n"


def document(key: str) -> str:
    """A key as a field: white space and % are encoded as in a URL."""
    return _NOT_IN_A_FIELD.sub(
        lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), key
    )


def _ordered(query: Mapping[str, Any], right: set[str], depth: int) -> list[tuple[str, float]]:
    """The best videos of a query in the order of our ranks, at most `depth`."""
    found = [(entry["key"], float(entry["similarity"])) for entry in query["top"]]
    keys = [key for key, _ in found]
    if len(set(keys)) < len(keys):
        key = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"two videos have the key {key!r}; a run of TREC needs different ones")

    def place(entry: tuple[str, float]) -> tuple[float, bool]:
        is_right = entry[0] in right
        return entry[1] - (TIE_TOLERANCE if is_right else 0.0), not is_right

    ordered = sorted(found, key=place, reverse=True)
    first = next((at for at, (key, _) in enumerate(ordered) if key in right), None)
    if first is not None and first + 1 < query["rank"]:
        # Ties beyond the best videos that are known rank before it.
        ordered = [entry for entry in ordered if entry[0] not in right]
    return ordered[:depth]
