"""The public similarity: equal to `reference.dmae_similarity`, in bounded memory.

Two backends give the same result up to rounding: `compiled` (float32 and float64 on a CPU) and
`torch` (tiles, on every device). Both keep, per pair, the score and about one byte for each of its
L + F maxima.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends.cpu import CpuBackend, unsupported_reason
from tvr.kernels.backends.protocol import SimilarityBackend, mean_similarity
from tvr.kernels.backends.torch_tiles import VIDEOS_PER_TEXT, TorchTiles, texts_per_tile
from tvr.kernels.numerics import no_autocast
from tvr.kernels.token_sets import FrameSet, TokenSet, prepare

# Pairs in a tile that the compiled kernels score for `streamed_loss` (about 130 MiB with all that
# its backward needs): large enough that scoring takes much longer than laying out the videos.
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
    """Computes the unscaled similarity of every text with every video.

    `reference.dmae_similarity` defines the result. Memory grows as A x C, never as A x T x C x F:
    for the backward, the index of each of the L + F maxima of a pair is saved. The result is
    differentiable once.

    Args:
        sentence: Features of unit length (`numerics.unit`). Read by all interactions; None with
            `att_ti` or `att_wti` leaves the word part alone.
        words: Read by `att_ti` and `att_wti`.
        word_mask: 0 for padding, 1 for a word, 2 for a word of double weight. The first slot is
            also the sentence's mask.
        frame_mask: 0 for padding, 1 for a frame.
        interaction: One of `ti`, `wti`, `att_ti`, `att_wti`.
        neighbour_frames: Adds the frame most similar to each best frame.
        word_logits: Outputs of `weight_layers.TokenWeightLayer`; read by `att_wti`.
        frame_logits: Outputs of such a layer for frames; read by `wti` and `att_wti`.
        chunk: Texts per tile of the torch backend; a tile has 4 times as many videos. None chooses
            the largest with at most `torch_tiles.SCORES_PER_TILE` token-frame scores. The result
            does not depend on it. A number selects the torch backend.
        backend: `compiled` or `torch`. None selects `compiled` for features on a CPU with at most
            255 words and frames if the kernels can be built (`cpu_build.available_backend`).
        fast: Rounds the features to bfloat16 for the token-frame products; a CPU also rounds the
            products. At temperature 0.01, a logit is then off by 0.01 on a GPU and by 0.2 on a CPU.
            The gradients follow the maxima found this way, in full precision.

    Returns:
        Scores in float32, or float64 if an input is, also under autocast.

    Raises:
        ValueError: as the reference; `chunk` below 1; an unknown backend, or `compiled` where it is
            not available.
    """
    _check_options(chunk, backend)
    with no_autocast(frames.device):
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
        return mean_similarity(texts, videos, _select_backend(texts, videos, chunk, backend, fast))


def tile_backend(
    texts: tuple[TokenSet, ...], videos: FrameSet, chunk: int | None, fast: bool
) -> tuple[SimilarityBackend, int]:
    """Selects the backend for a caller that iterates over tiles itself.

    Returns:
        The backend, and the number of texts per tile (a tile has 4 times as many videos).

    Raises:
        ValueError: `chunk` is below 1.
    """
    _check_options(chunk, None)
    if unsupported_reason(texts, videos) is None:
        return CpuBackend(fast), chunk or math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
    size = chunk or texts_per_tile(texts, videos)
    return TorchTiles(size, fast), size


def _check_options(chunk: int | None, backend: str | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 text per tile, or None to choose one")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend == "compiled" and chunk is not None:
        raise ValueError(
            f"chunk={chunk} is for backend='torch'; the compiled kernels choose their own tiles"
        )


def _select_backend(
    texts: tuple[TokenSet, ...],
    videos: FrameSet,
    chunk: int | None,
    backend: str | None,
    fast: bool,
) -> SimilarityBackend:
    if backend == "torch" or (backend is None and chunk is not None):
        return TorchTiles(chunk or texts_per_tile(texts, videos), fast)
    reason = unsupported_reason(texts, videos)
    if reason and backend == "compiled":
        raise ValueError(f"backend='compiled' is not available: {reason}")
    return TorchTiles(texts_per_tile(texts, videos), fast) if reason else CpuBackend(fast)
