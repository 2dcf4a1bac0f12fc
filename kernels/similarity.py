"""The similarity that the rest of the project calls: the reference, in tiles of bounded memory.

Two backends, equal to rounding. `compiled` (float32 and float64 on a CPU): one operator with a
hand-written backward, which keeps per pair the score and one byte for each of its L + F maxima.
`torch`: checkpointed tiles of the reference, on every device.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.packed import hindrance, packed_similarity
from tvr.kernels.reference import (
    FrameSet,
    TokenSet,
    block_similarity,
    full_precision,
    prepare,
)
from tvr.kernels.tiles import VIDEOS_PER_TEXT, chunk_size, tiled_similarity

# A tile of the compiled kernels (some 130 MiB with all that its backward needs): large enough that
# laying out its videos costs little beside scoring them.
PAIRS_PER_TILE = 2**20

BACKENDS = ("compiled", "torch")


def dmae_similarity(
    sentence: Float[Tensor, "A D"] | None,
    words: Float[Tensor, "A T D"] | None,
    frames: Float[Tensor, "C F D"],
    word_mask: Int[Tensor, "A T"],
    frame_mask: Int[Tensor, "C F"],
    *,
    interaction: str = "att_wti",
    neighbour_frames: bool = True,
    word_logits: Float[Tensor, "A T"] | None = None,
    frame_logits: Float[Tensor, "C F"] | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Float[Tensor, "A C"]:
    """Unscaled similarity of every text with every video; `reference.dmae_similarity` defines it.

    `backend` None takes "compiled" for features on a CPU with at most 255 words and frames where
    the kernels can be compiled (`compiled.backend` says why not), else "torch". "compiled" keeps
    L + F bytes for each pair and token set for its backward, which is not differentiable again.

    "torch" computes tiles of `chunk` texts x 4 `chunk` videos, whose insides are computed anew in
    the backward: memory grows as A x C and never as A x T x C x F, and the result is the same for
    every `chunk`. None takes the largest chunk whose tiles hold at most 2**23 token-frame scores.
    A `chunk` is a wish about these tiles: with it, `backend` None is "torch".

    Raises:
        ValueError: as the reference; for a chunk below 1; for an unknown backend, or "compiled"
            where it cannot be had.
    """
    _check_options(chunk, backend)
    with full_precision(frames.device):
        texts, videos = prepare(
            sentence,
            words,
            frames,
            word_mask,
            frame_mask,
            interaction=interaction,
            neighbour_frames=neighbour_frames,
            word_logits=word_logits,
            frame_logits=frame_logits,
        )
        if backend is None:
            backend = "torch" if chunk else chosen_backend(texts, videos)
        elif backend == "compiled" and (reason := hindrance(texts, videos)):
            raise ValueError(f"backend='compiled' cannot serve here: {reason}")
        if backend == "compiled":
            return packed_similarity(texts, videos)
        return tiled_similarity(texts, videos, chunk or chunk_size(texts, videos))


def _check_options(chunk: int | None, backend: str | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 text per tile, or None to choose one")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend == "compiled" and chunk is not None:
        raise ValueError(f"chunk={chunk} is for backend='torch': the compiled tiles fit the cache")


def chosen_backend(texts: tuple[TokenSet, ...], videos: FrameSet) -> str:
    """What serves where nothing else is asked for."""
    return "torch" if hindrance(texts, videos) else "compiled"


def tile_similarity(texts: tuple[TokenSet, ...], videos: FrameSet) -> Float[Tensor, "A C"]:
    """The similarity of sets that `reference.prepare` returned, small enough for one tile."""
    if chosen_backend(texts, videos) == "compiled":
        return packed_similarity(texts, videos)
    return block_similarity(texts, videos)


def tile_chunk(texts: tuple[TokenSet, ...], videos: FrameSet) -> int:
    """Texts per tile (videos: 4 times as many) for `tile_similarity`."""
    if chosen_backend(texts, videos) == "compiled":
        return math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
    return chunk_size(texts, videos)
