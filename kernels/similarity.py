"""The similarity that the rest of the project calls: the reference's, in bounded memory.

Two backends, equal to rounding: `compiled` (float32 and float64 on a CPU) and `torch` (tiles, on
every device). Both keep per pair the score and a byte or so for each of its L + F maxima.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends.cpu import Kernels, hindrance
from tvr.kernels.backends.protocol import Engine, mean_similarity
from tvr.kernels.backends.torch_tiles import VIDEOS_PER_TEXT, Tiles, chunk_size
from tvr.kernels.reference import FrameSet, TokenSet, full_precision, prepare

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
    fast: bool = False,
) -> Float[Tensor, "A C"]:
    """Unscaled similarity of every text with every video; `reference.dmae_similarity` defines it.

    `backend` None takes "compiled" for features on a CPU with at most 255 words and frames where
    the kernels can be compiled (`compiled.backend` says why not), else "torch", whose tiles are
    `chunk` texts x 4 `chunk` videos. The result is the same for every `chunk`; None takes the
    largest whose tiles hold at most `tiles.SCORES_PER_TILE` token-frame scores. A `chunk` is a wish
    about these tiles: with it, `backend` None is "torch".

    Memory grows as A x C, never as A x T x C x F: for the backward (which is not differentiable
    again) both keep the place of each of the L + F maxima of a pair and token set.

    `fast` rounds the features to bfloat16 where words meet frames; a CPU rounds the products too.
    At temperature 0.01 a logit is then off by 0.01 on a GPU and by 0.2 on a CPU. Gradients are
    those of the maxima that were found so, with features and sums as exact as ever.

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
        engine = _engine(texts, videos, chunk, backend, fast)
        return mean_similarity(texts, videos, engine)


def _check_options(chunk: int | None, backend: str | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 text per tile, or None to choose one")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend == "compiled" and chunk is not None:
        raise ValueError(f"chunk={chunk} is for backend='torch': the compiled tiles fit the cache")


def _engine(
    texts: tuple[TokenSet, ...],
    videos: FrameSet,
    chunk: int | None,
    backend: str | None,
    fast: bool,
) -> Engine:
    if backend == "torch" or (backend is None and chunk is not None):
        return Tiles(chunk or chunk_size(texts, videos), fast)
    reason = hindrance(texts, videos)
    if reason and backend == "compiled":
        raise ValueError(f"backend='compiled' cannot serve here: {reason}")
    return Tiles(chunk_size(texts, videos), fast) if reason else Kernels(fast)


def tile_engine(
    texts: tuple[TokenSet, ...], videos: FrameSet, chunk: int | None, fast: bool
) -> tuple[Engine, int]:
    """For a caller that goes through tiles itself: what scores one, and texts per tile.

    (Videos: 4 times as many.) Raises ValueError for a chunk below 1.
    """
    _check_options(chunk, None)
    if hindrance(texts, videos) is None:
        return Kernels(fast), chunk or math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
    size = chunk or chunk_size(texts, videos)
    return Tiles(size, fast), size
