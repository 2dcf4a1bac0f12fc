"""Several vectors of a frame: a grid of cells of an image tower's patches (`tokens_per_frame`)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def cell_means(patches: Tensor, side: int) -> Tensor:
    """Means (N, side x side, W) of the patches (N, P, W) of each cell, row by row.

    That is adaptive average pooling, as a matrix product: torch's own backward adds in no fixed
    order on a GPU.

    Raises:
        ValueError: as `cells`.
    """
    rows = patch_rows(patches)
    share = torch.zeros(side, rows, dtype=patches.dtype)
    for number, part in enumerate(cells(rows, side)):
        share[number, part.start : part.stop] = 1 / len(part)
    share = share.to(patches.device)
    grid = patches.unflatten(1, (rows, rows))
    return torch.einsum("gr,hc,nrcw->nghw", share, share, grid).flatten(1, 2)


def cell_patches(patches: Tensor, side: int) -> Tensor:
    """The patches (N, side x side, Q, W) of each cell, out of (N, P, W), row by row.

    Raises:
        ValueError: as `cells` of equal size.
    """
    rows = patch_rows(patches)
    parts = cells(rows, side, equal=True)
    index = [[y * rows + x for y in up for x in along] for up in parts for along in parts]
    return patches[:, torch.tensor(index, device=patches.device)]


def patch_rows(patches: Tensor) -> int:
    """Patches in a row of a square grid, of patches (N, P, W).

    Raises:
        ValueError: the grid is not square.
    """
    count = patches.shape[1]
    rows = math.isqrt(count)
    if rows * rows != count:
        raise ValueError(
            f"model.tokens_per_frame needs a square grid of patches; the tower has {count}"
        )
    return rows


@cache
def cells(rows: int, side: int, *, equal: bool = False) -> tuple[range, ...]:
    """Rows of patches of each row of cells. Neighbouring cells share one where it is needed.

    Raises:
        ValueError: there are more cells than patches; or, with `equal`, cells of unequal size.
    """
    if side > rows:
        raise ValueError(
            f"model.tokens_per_frame={side * side} exceeds the {rows} x {rows} patches of a frame"
        )
    found = tuple(range(n * rows // side, -(-(n + 1) * rows // side)) for n in range(side))
    if equal and len({len(part) for part in found}) > 1:
        raise ValueError(
            f"model.tokens_per_frame={side * side}: a grid of {rows} x {rows} patches has no"
            f" {side} x {side} cells of equal size"
        )
    return found
