"""The public similarity: equal to `reference.dmae_similarity`, in bounded memory.

Three backends give the same result up to rounding:

    compiled   C++ kernels, for float32 and float64 on a CPU
    torch      tiles with sparse row sums in the backward, on every device
    dense      tiles with dense products in the backward, on every device

The first two keep, per pair, the score and about one byte for each of its L + F maxima. The third
keeps the score only, and finds the maxima again in the backward.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends.cpu import CpuBackend, unsupported_reason
from tvr.kernels.backends.protocol import SimilarityBackend, mean_similarity
from tvr.kernels.backends.torch_dense import DenseTiles, device_scores_per_tile
from tvr.kernels.backends.torch_tiles import VIDEOS_PER_TEXT, TorchTiles, texts_per_tile
from tvr.kernels.numerics import no_autocast
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import FrameSet, TokenSet, prepare

# Pairs in a tile that the compiled kernels score for `streamed_loss` (about 130 MiB with all that
# its backward needs): large enough that scoring takes much longer than laying out the videos.
PAIRS_PER_TILE = 2**20

BACKENDS = ("compiled", "torch", "dense")

# Not a measurement but an estimate: for 256 texts and 16,384 videos of 32 words, 12 frames and
# width 768, sparse row sums move about 1 TB a step, 0.3 s at the 3.35 TB/s of an H100. The dense
# form computes four products of 2.5e12 operations, each three times in bfloat16: 0.05 s at 600e12 a
# second, and passes over the tiles.
CUDA_BACKEND = "dense"


def dmae_similarity(
    sentence: Float[Tensor, "A D"] | None,
    words: Float[Tensor, "A T D"] | None,
    frames: Float[Tensor, "C F D"],
    word_mask: Int[Tensor, "A T"],
    frame_mask: Int[Tensor, "C F"],
    *,
    interaction: str = "att_wti",
    matching: str = "two_way",
    neighbour_frames: bool = True,
    word_logits: Float[Tensor, "A T"] | None = None,
    frame_logits: Float[Tensor, "C F"] | None = None,
    chunk: int | None = None,
    backend: str | None = None,
    fast: bool = False,
    compile_tiles: bool = False,
    lengths: TextLengths | None = None,
) -> Float[Tensor, "A C"]:
    """Computes the unscaled similarity of every text with every video.

    `reference.dmae_similarity` defines the result. Memory grows as A x C, never as A x T x C x F:
    for the backward, at most the index of each of the L + F maxima of a pair is saved. One token
    and one frame have no maxima: their similarity is one matrix product, without tiles, on every
    backend. The result is differentiable once.

    Args:
        sentence: Features of unit length (`numerics.unit`). Read by all interactions; None with
            `att_ti` or `att_wti` leaves the word part alone.
        words: Read by `att_ti` and `att_wti`.
        word_mask: 0 for padding, 1 for a word, 2 for a word of double weight. The first slot is
            also the sentence's mask.
        frame_mask: 0 for padding, 1 for a frame.
        interaction: One of `ti`, `wti`, `att_ti`, `att_wti`.
        matching: `two_way`; or `words_to_frames`, the best frame of each token without the best
            token of each frame, which is neither computed nor saved.
        neighbour_frames: Adds the frame most similar to each best frame.
        word_logits: Outputs of `weight_layers.TokenWeightLayer`; read by `att_wti`.
        frame_logits: Outputs of such a layer for frames; read by `wti` and `att_wti`, `two_way`.
        chunk: Texts per tile of `torch` or `dense`; a tile has 4 times as many videos. None chooses
            the largest with at most `torch_tiles.SCORES_PER_TILE` token-frame scores, or
            `torch_dense.device_scores_per_tile`. The result does not depend on it. A number without
            a backend selects `torch`.
        backend: `compiled`, `torch` or `dense`. None selects `dense` on a GPU; on a CPU `compiled`
            for at most 255 words and frames, if the kernels can be built
            (`cpu_build.available_backend`), else `torch`.
        fast: Rounds the features to bfloat16 for the token-frame products; a CPU also rounds the
            products. At temperature 0.01, a logit is then off by 0.01 on a GPU and by 0.2 on a CPU.
            The gradients follow the maxima found this way, in full precision. One token and one
            frame are never rounded.
        lengths: Of the texts, from `text_lengths.host_lengths`, which checks the masks on the host.
            None checks them here. On a GPU that reads them, and the host waits for its queue.
        compile_tiles: Compiles the operations on a tile of `dense` with torch.compile; if that
            fails, the reason is logged once (`tile_compiler.compile_failure`). The other backends
            have nothing to compile.

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
            matching=matching,
            neighbour_frames=neighbour_frames,
            word_logits=word_logits,
            frame_logits=frame_logits,
            lengths=lengths,
        )
        if backend is None and chunk is not None:
            backend = "torch"
        name = _selected(texts, videos, backend)
        selected, _ = _tile_backend(name, texts, videos, chunk, fast, compile_tiles)
        return mean_similarity(texts, videos, selected)


def tile_backend(
    texts: tuple[TokenSet, ...],
    videos: FrameSet,
    chunk: int | None,
    fast: bool,
    backend: str | None = None,
    compile_tiles: bool = False,
) -> tuple[SimilarityBackend, int]:
    """Selects the backend for a caller that iterates over tiles itself.

    Returns:
        The backend, and the number of texts per tile (a tile has 4 times as many videos).

    Raises:
        ValueError: `chunk` is below 1, or the backend is unknown or not available.
    """
    _check_options(chunk, None if backend == "compiled" else backend)
    name = _selected(texts, videos, backend)
    return _tile_backend(name, texts, videos, chunk, fast, compile_tiles)


def default_backend(device_type: str, compiled_failure: str | None) -> str:
    """The backend of a device where none is named.

    Args:
        compiled_failure: Why the compiled kernels cannot be used; None if they can.
    """
    if device_type == "cuda":
        return CUDA_BACKEND
    return "compiled" if compiled_failure is None else "torch"


def _check_options(chunk: int | None, backend: str | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 text per tile, or None to choose one")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend == "compiled" and chunk is not None:
        raise ValueError(
            f"chunk={chunk} is for backend='torch' and 'dense'; the compiled kernels choose their "
            "own tiles"
        )


def _selected(texts: tuple[TokenSet, ...], videos: FrameSet, backend: str | None) -> str:
    if backend in ("torch", "dense"):
        return backend
    reason = unsupported_reason(texts, videos)
    if reason and backend == "compiled":
        raise ValueError(f"backend='compiled' is not available: {reason}")
    return default_backend(videos.frames.device.type, reason)


def _tile_backend(
    name: str,
    texts: tuple[TokenSet, ...],
    videos: FrameSet,
    chunk: int | None,
    fast: bool,
    compile_tiles: bool,
) -> tuple[SimilarityBackend, int]:
    """The named backend and its texts per tile."""
    if name == "compiled":
        return CpuBackend(fast), chunk or math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
    if name == "torch":
        size = chunk or texts_per_tile(texts, videos)
        return TorchTiles(size, fast), size
    scores = device_scores_per_tile(videos.frames.device)
    # Without a chunk, each token set has tiles of its own: larger ones for the sentences.
    dense = DenseTiles(scores, chunk, fast, compile_tiles=compile_tiles)
    longest = max(text.weights.shape[1] for text in texts)
    return dense, dense.texts_per_tile(longest, videos.frames.shape[1])
