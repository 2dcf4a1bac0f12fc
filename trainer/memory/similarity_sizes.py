"""Sizes of the similarity and its loss on one rank, from which their memory follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tvr.kernels.backends.torch_dense import CPU_SCORES_PER_TILE
from tvr.kernels.backends.torch_tiles import SCORES_PER_TILE, VIDEOS_PER_TEXT
from tvr.kernels.row_loss.stored_loss import SCORES_PER_CHUNK
from tvr.kernels.similarity import PAIRS_PER_TILE


@dataclass(frozen=True, kw_only=True, slots=True)
class SimilaritySizes:
    """Sizes and settings that determine the memory of the similarity on one rank."""

    texts: int
    """B, the texts of this rank."""
    videos: int
    """G, the videos of all ranks."""
    words: int
    frames: int
    width: int
    interaction: str = "att_wti"
    matching: str = "two_way"
    neighbour_frames: bool = True
    backend: str = "compiled"
    """ "compiled", "torch", "dense", or "naive" (the reference)."""
    exchange: str = "none"
    """ "gather", "ring", or "none" if all videos are this rank's own."""
    streamed: bool = False
    """Whether `streamed_loss` computes the scores in tiles."""
    keep_scores: bool = False
    """Whether `streamed_loss` keeps the scores for its backward."""
    chunk: int | None = None
    """Texts in a tile; None: the backend's own choice."""
    bytes_per_number: int = 4
    """Bytes of a number of the features."""
    word_share: float = 1.0
    """Share of word slots that hold a word; at 1 the compiled kernels need no packed copy."""
    device: str = "cpu"
    scores_per_tile: int = CPU_SCORES_PER_TILE
    """Token-frame scores in a tile of the dense backend."""

    @property
    def has_words(self) -> bool:
        """Whether words interact with frames, beside the sentence."""
        return self.interaction.startswith("att_")

    @property
    def both_ways(self) -> bool:
        """Whether frames choose words, too."""
        return self.matching == "two_way"

    @property
    def is_padded(self) -> bool:
        return self.word_share < 1

    @property
    def is_upcast(self) -> bool:
        """Whether the features are first copied to float32."""
        return self.bytes_per_number < 4

    @property
    def ranks(self) -> int:
        return 1 if self.exchange == "none" else -(-self.videos // self.texts)

    @property
    def own_videos(self) -> int:
        return self.videos if self.exchange == "none" else self.texts

    @property
    def exchanged_videos(self) -> int:
        """Videos of one piece of the exchange."""
        return self.texts if self.exchange == "ring" else self.videos

    @property
    def input_bytes(self) -> int:
        """Bytes of features, logits and masks, which exist before the forward."""
        of_text = self.bytes_per_number * (self.width + self.words * (self.width + 1))
        of_video = self.bytes_per_number * self.frames * (self.width + self.both_ways)
        masks = 8 * (self.texts * self.words + self.own_videos * self.frames)
        return self.texts * of_text + self.own_videos * of_video + masks

    @property
    def tile(self) -> tuple[int, int]:
        """Texts and videos of a tile of the torch and dense backends or of the streamed loss."""
        return self.tile_of(self.words if self.has_words else 1)

    def tile_of(self, slots: int) -> tuple[int, int]:
        """`tile` of a token set; only the dense backend has tiles of its own for each."""
        chunk = self.chunk
        if chunk is None and self.backend == "compiled":
            chunk = math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
        elif chunk is None:
            dense = self.backend == "dense"
            slots = slots if dense or not self.has_words else self.words
            scores = self.scores_per_tile if dense else SCORES_PER_TILE
            chunk = max(1, math.isqrt(scores // (VIDEOS_PER_TEXT * slots * self.frames)))
        return min(chunk, self.texts), min(VIDEOS_PER_TEXT * chunk, self.exchanged_videos)

    @property
    def loss_chunk(self) -> int:
        """Scores of the whole rows that the loss processes at a time."""
        scores = SCORES_PER_CHUNK if self.device == "cpu" else 16 * SCORES_PER_CHUNK
        return min(self.texts, max(1, scores // self.videos)) * self.videos

    @property
    def frame_sides(self) -> int:
        """Gradients of the frames in the backward of a tile: one more with neighbour frames."""
        return 2 if self.neighbour_frames else 1

    def word_bytes(self, texts: int) -> int:
        """Bytes of float32 sentences and, if they interact with frames, words."""
        return 4 * texts * (1 + self.words * self.has_words) * self.width

    def frame_bytes(self, videos: int) -> int:
        return 4 * videos * self.frames * self.width

    def packed_bytes(self, texts: int) -> int:
        """Bytes of a copy of the words without padding; 0 if there is no padding."""
        return int(self.word_share * self.word_bytes(texts)) if self.is_padded else 0

    def maxima_bytes(self, pairs: int) -> int:
        """One byte for the sentence's best frame, each word's best frame, each frame's word."""
        of_words = int(self.word_share * self.words * pairs)
        of_words += self.frames * pairs * self.both_ways
        return pairs + (of_words if self.has_words else 0)


def with_exchange(
    sizes: SimilaritySizes, exchange: Literal["gather", "ring"], scores: Literal["keep", "stream"]
) -> SimilaritySizes:
    """The sizes under `train.exchange` and `train.scores`; one rank has nothing to exchange."""
    return replace(
        sizes,
        exchange=exchange if sizes.videos > sizes.texts else "none",
        streamed=exchange == "ring" or scores == "stream",
        keep_scores=scores == "keep",
    )
