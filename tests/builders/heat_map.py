"""Clips in which an object is visible in a part of the frames, and the marks of a heat map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np

from tvr.data_prep.demo_clips import NUM_FRAMES, Scene, render, scene_captions


@dataclass(frozen=True, slots=True)
class PartClip:
    """A clip that lacks one of its objects in some frames."""

    caption: str
    shape: str
    """The object that is hidden in some frames."""
    other: str
    """The object that is in all frames."""
    frames: np.ndarray
    """(12, 64, 64, 3) uint8."""
    visible: np.ndarray
    """(12,) True for frames with the object."""


def part_clips(
    scenes: Sequence[Scene], shape: str, *, count: int, share: float, seed: int
) -> Iterator[PartClip]:
    """The first `count` scenes with an object of this shape, each visible for a while only.

    Args:
        share: Share of the frames with the object; they lie side by side, at a random place.
    """
    draw = np.random.default_rng(seed)
    length = round(share * NUM_FRAMES)
    found = 0
    for number, scene in enumerate(scenes):
        shapes = (scene.first.shape, scene.second.shape)
        if shape not in shapes or found == count:
            continue
        found += 1
        place = shapes.index(shape)
        # Even places: a frame of the model stands for two of the clip.
        start = 2 * int(draw.integers((NUM_FRAMES - length) // 2 + 1))
        shown = np.ones((NUM_FRAMES, 2), bool)
        shown[:, place] = False
        shown[start : start + length, place] = True
        captions = scene_captions(scene)
        yield PartClip(
            caption=captions[number % len(captions)],
            shape=shape,
            other=shapes[1 - place],
            frames=render(scene, seed * 1_000_003 + number, shown=shown),
            visible=shown[:, place],
        )
    if found < count:
        raise ValueError(f"only {found} of {count} scenes have a {shape}")


class HeatMap(HTMLParser):
    """Reads the heat map of an explanation's page: its rows, and the frame marked in each."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, list[set[str]]]] = []
        """(token, the classes of each cell) from top to bottom; the first is the sentence."""
        self._in_head = self._in_body = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        self._in_body |= tag == "tbody"
        if self._in_body and tag == "th":
            self.rows.append(("", []))
            self._in_head = True
        elif self._in_body and tag == "td" and "cell" in classes:
            self.rows[-1][1].append(classes)

    def handle_endtag(self, tag: str) -> None:
        self._in_body &= tag != "tbody"
        self._in_head &= tag != "th"

    def handle_data(self, data: str) -> None:
        if self._in_head:
            name, cells = self.rows[-1]
            self.rows[-1] = (name + data, cells)

    def marked(self, token: str, mark: str = "best") -> int:
        """The frame with this mark in the first row of the token, from 0."""
        cells = next(cells for name, cells in self.rows if name == token)
        return next(frame for frame, classes in enumerate(cells) if mark in classes)
