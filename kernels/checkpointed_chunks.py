"""Work that each matched pair needs by itself, done a few pairs at a time in bounded memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Pieces of this many feature entries (16 MiB in float32) keep matrix products large enough to run
# at full speed, and a few copies of them are all the scratch that is ever alive.
ENTRIES_PER_PIECE = 2**22


def chunk_size(chunk: int | None, entries_per_pair: int) -> int:
    """`chunk`, or for None the most pairs with at most `ENTRIES_PER_PIECE` entries; at least 1.

    Raises:
        ValueError: a chunk below 1.
    """
    if chunk is None:
        return max(1, ENTRIES_PER_PIECE // max(1, entries_per_pair))
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 pair per piece, or None to choose one")
    return chunk


def in_pieces(
    function: Callable[..., tuple[Tensor, ...]], pairs: Sequence[Tensor | None], chunk: int
) -> tuple[Tensor, ...]:
    """`function(*pairs)` by pieces of `chunk` pairs, whose insides are recomputed in the backward.

    The first dimension of every tensor, given and returned, runs over the pairs, and a result may
    depend on its own pair only. Between forward and backward nothing but the given tensors and
    the results stays alive. `function` must draw no random numbers; it may use parameters.
    """
    num_pairs = next(len(x) for x in pairs if x is not None)
    if num_pairs <= chunk:
        # One piece must be alive in the backward anyway: computing it twice would save nothing.
        return function(*pairs)
    # split, not slices: the backward of a slice fills a zero tensor of the whole size for every
    # piece, that of a split joins the pieces once.
    num_pieces = -(-num_pairs // chunk)
    split = [[None] * num_pieces if x is None else x.split(chunk) for x in pairs]
    results = [
        checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(*split, strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
