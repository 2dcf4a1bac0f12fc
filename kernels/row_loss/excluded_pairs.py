"""Pairs of the global batch that are no negatives, although they are not matched.

A caption also describes another copy of its video, and every video that has the same caption. The
pairs are found by ids. Each tile compares the ids of its rows with those of its columns, so that no
(B, G) mask exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.row_loss.online_softmax import TilePosition

# An odd number (2^64 divided by the golden ratio), as a signed one: times it, ids stay distinct.
SPREAD = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True)
class ExcludedPairs:
    """Pairs that are not matched and share an id; ids of a kind that is not compared are None."""

    video_ids: Int[Tensor, " G"] | None
    caption_ids: Int[Tensor, " G"] | None

    def of_tile(
        self, position: TilePosition, tile: Float[Tensor, "n m"]
    ) -> Bool[Tensor, "n m"] | None:
        """Marks the excluded pairs of a tile; None if nothing is compared."""
        first_row = position.row_offset + position.row
        excluded = None
        for ids in (self.video_ids, self.caption_ids):
            if ids is None:
                continue
            row_ids = ids[first_row : first_row + tile.shape[0]]
            column_ids = ids[position.column : position.column + tile.shape[1]]
            equal = row_ids[:, None] == column_ids
            excluded = equal if excluded is None else excluded.logical_or_(equal)
        if excluded is not None:
            position.diagonal(excluded)[0].fill_(False)
        return excluded

    def by_caption_alone(self, rows: slice) -> Int[Tensor, " B"] | None:
        """Number of pairs of each row that are excluded for their caption and not for their video.

        None if captions are not compared. The numbers come from sorted ids: O(G log G).
        """
        if self.caption_ids is None:
            return None
        found = _copies(self.caption_ids)
        if self.video_ids is None:
            found = found - 1  # the matched pair
        else:
            found = found - _copies(self.video_ids * SPREAD + self.caption_ids)
        return found[rows]


def compared_ids(
    name: str,
    ids: Tensor | None,
    num_pairs: int,
    *,
    mask: bool | None,
    setting: str,
    by_default: bool,
) -> Tensor | None:
    """Returns the ids if their pairs are excluded, else None.

    Args:
        name: Name of the ids in messages.
        ids: Ids of all G pairs, or None.
        num_pairs: G.
        mask: True or False decides; None excludes pairs if ids are given and `by_default` is True.
        setting: Name of `mask` in messages.
        by_default: Whether the loss excludes these pairs unless told otherwise.

    Raises:
        ValueError: `mask` is True without ids, or the ids have another length.
    """
    if ids is None:
        if mask:
            raise ValueError(f"{setting}=True needs {name} of all G pairs, not None")
        return None
    if ids.shape != (num_pairs,):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)} but must hold the ids of all {num_pairs} pairs of"
            " the global batch"
        )
    return ids if (by_default if mask is None else mask) else None


def _copies(ids: Int[Tensor, " G"]) -> Int[Tensor, " G"]:
    """Number of entries equal to each entry, itself included."""
    ordered, ids = ids.sort().values, ids.contiguous()
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
