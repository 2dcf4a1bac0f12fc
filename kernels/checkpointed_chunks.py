"""Runs a function of matched pairs chunk by chunk, with activation checkpointing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# 16 MiB in float32: large enough for matrix products at full speed, and only a few copies of one
# chunk are allocated at a time.
ENTRIES_PER_CHUNK = 2**22


def pairs_per_chunk(chunk: int | None, entries_per_pair: int) -> int:
    """Number of pairs per chunk: `chunk`, or as many as fit in `ENTRIES_PER_CHUNK` feature entries.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk is None:
        return max(1, ENTRIES_PER_CHUNK // max(1, entries_per_pair))
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 pair, or None to choose the number")
    return chunk


def run_in_chunks(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], chunk: int
) -> tuple[Tensor, ...]:
    """Computes `function(*inputs)` in chunks of `chunk` pairs and recomputes them in the backward.

    Only the inputs and the results stay in memory between forward and backward.

    Args:
        function: May use parameters, but no random numbers. Each result may depend on its own pair
            only.
        inputs: Tensors whose first dimension is the pairs, as in the results; None is passed on.
        chunk: Pairs per chunk.
    """
    num_pairs = next(len(x) for x in inputs if x is not None)
    if num_pairs <= chunk:
        # The backward needs one chunk's activations anyway: a checkpoint would save nothing.
        return function(*inputs)
    # split, not slices: the backward of each slice fills a zero tensor of the full size, the
    # backward of split concatenates once.
    num_chunks = -(-num_pairs // chunk)
    split = [[None] * num_chunks if x is None else x.split(chunk) for x in inputs]
    results = [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*split, strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
