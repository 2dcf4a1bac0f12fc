"""The similarity that the rest of the project calls: the reference, in tiles of bounded memory.

Two backends, equal to rounding. `compiled` (float32 and float64 on a CPU): one operator with a
hand-written backward, which keeps per pair the score and one byte for each of its L + F maxima.
`torch`: checkpointed tiles of the reference, on every device.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvr.kernels.packed import hindrance, packed_similarity
from tvr.kernels.reference import (
    FrameSet,
    TokenSet,
    block_similarity,
    full_precision,
    prepare,
)

# A tile of this many token-frame scores (32 MiB in float32) keeps matrix products large enough to
# run at full speed, and a few copies of it (scores, indices, gradients) are all that is ever alive.
SCORES_PER_TILE = 2**23
VIDEOS_PER_TEXT = 4
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
        return _tiled(texts, videos, chunk or chunk_size(texts, videos))


def chunk_size(texts: tuple[TokenSet, ...], videos: FrameSet) -> int:
    """Texts per tile such that chunk x 4 chunk pairs hold at most `SCORES_PER_TILE` scores."""
    scores_per_pair = max(tokens.weights.shape[1] for tokens in texts) * videos.weights.shape[1]
    return max(1, math.isqrt(SCORES_PER_TILE // (VIDEOS_PER_TEXT * scores_per_pair)))


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


def _tiled(texts: tuple[TokenSet, ...], videos: FrameSet, chunk: int) -> Float[Tensor, "A C"]:
    num_texts, num_videos = texts[0].weights.shape[0], videos.weights.shape[0]
    if num_texts <= chunk and num_videos <= VIDEOS_PER_TEXT * chunk:
        # One tile must be alive in the backward anyway: computing it twice would save nothing.
        return block_similarity(texts, videos)
    video_tiles = _split_videos(videos, VIDEOS_PER_TEXT * chunk)
    rows = []
    for text_tile in zip(*(_split_texts(tokens, chunk) for tokens in texts), strict=True):
        tiles = [
            checkpoint(
                block_similarity,
                text_tile,
                video_tile,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for video_tile in video_tiles
        ]
        rows.append(torch.cat(tiles, dim=1))
    return torch.cat(rows)


# split, not slices: the backward of a slice fills a zero tensor of the whole size for every tile,
# that of a split joins the parts once.
def _split_texts(texts: TokenSet, size: int) -> list[TokenSet]:
    return [TokenSet(*part) for part in zip(*(x.split(size) for x in texts), strict=True)]


def _split_videos(videos: FrameSet, size: int) -> list[FrameSet]:
    frames, weights = videos.frames.split(size), videos.weights.split(size)
    tables = [
        [None] * len(frames) if table is None else table.split(size)
        for table in (videos.strength, videos.neighbour)
    ]
    return [FrameSet(*part) for part in zip(frames, weights, *tables, strict=True)]
