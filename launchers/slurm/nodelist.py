"""SLURM's short form of node names, written out: `gpu[08-10,12],login` are five nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

# A name is pieces of text and brackets in turn; a comma outside brackets ends it.
NAME = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_nodes(nodelist: str) -> list[str]:
    """The nodes in the order in which they stand; the last bracket of a name turns fastest.

    Raises:
        ValueError: it is no node list.
    """
    names = NAME.findall(nodelist)
    if not names or ",".join(names) != nodelist:
        raise ValueError(f"node list {nodelist!r}: names such as gpu[08-10,12],login are expected")
    return [node for name in names for node in _expand(name)]


def _expand(name: str) -> Iterator[str]:
    pieces = [
        [text] if text else [number for part in inner.split(",") for number in _numbers(part, name)]
        for inner, text in PIECE.findall(name)
    ]
    return map("".join, product(*pieces))


def _numbers(part: str, name: str) -> list[str]:
    """`08-10` are 08, 09 and 10: as many digits as the first one has."""
    match = RANGE.fullmatch(part)
    if match is None:
        raise ValueError(f"node list: [{part}] in {name!r} must be a number or a range such as 1-4")
    first, last = match[1], match[2] or match[1]
    if int(last) < int(first):
        raise ValueError(f"node list: the range {part} in {name!r} goes backwards")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
