"""SLURM's node lists are expanded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.launchers.slurm.nodelist import expand_nodes

TEXT = st.text("abcxyz-", min_size=1, max_size=4)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A bracket and the numbers it stands for."""
    short, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, 120))
        last = first + draw(st.integers(0, 12))
        width = draw(st.integers(1, 4))
        texts = [str(number).zfill(width) for number in range(first, last + 1)]
        short.append(texts[0] if first == last else f"{texts[0]}-{last}")
        numbers += [text.zfill(len(texts[0])) for text in texts]
    return f"[{','.join(short)}]", numbers


@st.composite
def names(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A name with up to two brackets and the nodes it stands for."""
    short, nodes = draw(TEXT), [""]
    nodes = [short]
    for _ in range(draw(st.integers(0, 2))):
        bracket, numbers = draw(ranges())
        after = draw(TEXT)
        short += bracket + after
        nodes = [node + number + after for node in nodes for number in numbers]
    return short, nodes


@given(st.lists(names(), min_size=1, max_size=3))
def test_all_nodes_are_returned_in_order(listed: list[tuple[str, list[str]]]) -> None:
    expected = [node for _, nodes in listed for node in nodes]
    assert expand_nodes(",".join(short for short, _ in listed)) == expected


@given(names(), names())
def test_list_is_the_concatenation_of_its_names(
    one: tuple[str, list[str]], other: tuple[str, list[str]]
) -> None:
    both = expand_nodes(f"{one[0]},{other[0]}")
    assert both == expand_nodes(one[0]) + expand_nodes(other[0])


@pytest.mark.parametrize(
    ("nodelist", "nodes"),
    [
        ("n1", ["n1"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_examples(nodelist: str, nodes: list[str]) -> None:
    assert expand_nodes(nodelist) == nodes


@pytest.mark.parametrize(
    "text", ["n[1", "n]1", "n[]", "n[a]", "n[3-1]", "n1,,n2", "n1 n2", "", ","]
)
def test_invalid_node_lists_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        expand_nodes(text)
