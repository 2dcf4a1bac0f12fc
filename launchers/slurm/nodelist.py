"""Expands SLURM's node lists: `gpu[08-10,12],login` are five nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

# A name alternates between text and brackets. A comma outside of brackets ends it.
NODE_NAME = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
NAME_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
NUMBER_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_nodes(nodelist: str) -> list[str]:
    """Returns the nodes in the order of the list; the last bracket of a name varies fastest.

    Raises:
        ValueError: the text is not a node list.
    """
    without_spaces = re.sub(" *, *", ",", nodelist.strip(" "))
    names = NODE_NAME.findall(without_spaces)
    if not names or ",".join(names) != without_spaces:
        raise ValueError(f"node list {nodelist!r} must be names such as gpu[08-10,12],login")
    return [node for name in names for node in _expand(name)]


def _expand(name: str) -> Iterator[str]:
    parts = [
        [text] if text else [number for item in inner.split(",") for number in _numbers(item, name)]
        for inner, text in NAME_PART.findall(name)
    ]
    return map("".join, product(*parts))


def _numbers(item: str, name: str) -> list[str]:
    """Expands `08-10` to 08, 09 and 10: every number is as wide as the first one."""
    match = NUMBER_RANGE.fullmatch(item)
    if match is None:
        raise ValueError(f"node list: [{item}] in {name!r} must be a number or a range such as 1-4")
    first, last = match[1], match[2] or match[1]
    if int(last) < int(first):
        raise ValueError(f"node list: the range {item} in {name!r} is descending")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
