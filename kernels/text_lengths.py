"""Lengths of texts as plain numbers of the host, by which tiles are cut.

Masks come from the host. Their lengths are taken there, before the masks move to the device:
`host_lengths` also checks the masks, so that nothing needs to read them on the device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tvr.kernels.checks import check_mask


class TextLengths(NamedTuple):
    """Lengths of A texts."""

    ends: tuple[int, ...]
    """Number of slots of each text up to its last valid one."""
    counts: tuple[int, ...]
    """Number of valid slots; below `ends` if a masked slot lies between valid ones."""

    def part(self, rows: slice) -> TextLengths:
        """The lengths of some of the texts."""
        return TextLengths(self.ends[rows], self.counts[rows])


def host_lengths(word_mask: Tensor, frame_mask: Tensor, *, sentence: bool = True) -> TextLengths:
    """Checks the masks of texts and videos, which lie on the host; returns the texts' lengths.

    Args:
        word_mask: (A, T) 0 for padding, 1 for a word, 2 for a word of double weight.
        frame_mask: (C, F) 0 for padding, 1 for a frame.
        sentence: True if the first slot is also the sentence's mask.

    Raises:
        ValueError: a value out of range, or a row without a valid slot.
    """
    check_mask("word_mask", word_mask, largest=2, sentence=sentence)
    check_mask("frame_mask", frame_mask, largest=1, sentence=False)
    return lengths_of(word_mask)


def lengths_of(valid: Tensor) -> TextLengths:
    """The lengths of texts whose mask (A, L), 0 for padding, lies on the host."""
    filled = valid.numpy() > 0
    num_texts, slots = filled.shape
    if slots == 0:
        return TextLengths((0,) * num_texts, (0,) * num_texts)
    # The first valid slot from the right; a text without any ends at 0.
    ends = (slots - filled[:, ::-1].argmax(axis=1)) * filled.any(axis=1)
    return TextLengths(tuple(ends.tolist()), tuple(filled.sum(axis=1).tolist()))
