"""Sizes of every part: full for a GPU, shrunk for a test on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

Block = tuple[int, int, int, int, int]
"""Texts, videos, words, frames, width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of all parts."""

    parity: tuple[Block, ...]
    """Small blocks in all interactions, and one of several tiles."""
    recipes: tuple[str, ...]
    steps: int
    """Timed training steps."""
    small_model: bool
    """Shrinks the recipes' towers, frames and batch."""
    rows: int
    """B: texts of the rank that is timed."""
    pairs: tuple[int, ...]
    """G: videos of all ranks."""
    tokens: tuple[int, int, int]
    """Words, frames and width of these blocks."""
    compiled_pairs: tuple[int, ...]
    """G at which torch.compile of the naive definition is timed; each takes long to compile."""
    slice_tokens: tuple[int, int, int]
    """Words, frames and width of the slice that late-interaction kernels share."""
    slice_forward: int
    """Texts, and as many videos, of its forward."""
    slice_backward: int
    """Texts, and as many videos, of its forward and backward."""
    repeats: int
    case_s: float
    """Seconds for the timed calls of one case."""


FULL = Sizes(
    parity=((5, 4, 6, 4, 8), (70, 70, 9, 7, 24), (256, 1024, 32, 12, 512)),
    recipes=("msrvtt_b32", "msrvtt_b16"),
    steps=10,
    small_model=False,
    rows=256,
    pairs=(4_096, 16_384, 65_536),
    tokens=(32, 12, 512),
    compiled_pairs=(4_096, 16_384),
    slice_tokens=(32, 300, 128),
    slice_forward=128,
    slice_backward=256,
    repeats=20,
    case_s=1.5,
)
SHRUNK = Sizes(
    parity=((5, 4, 6, 4, 8), (24, 40, 9, 7, 24)),
    recipes=("msrvtt_b32", "msrvtt_b16"),
    steps=2,
    small_model=True,
    rows=4,
    pairs=(16, 48),
    tokens=(5, 3, 16),
    compiled_pairs=(16,),
    slice_tokens=(5, 7, 16),
    slice_forward=6,
    slice_backward=8,
    repeats=3,
    case_s=0.2,
)


def sizes_of(settings: dict[str, object]) -> Sizes:
    """The sizes that a part was started with."""
    return SHRUNK if settings["shrunk"] else FULL
