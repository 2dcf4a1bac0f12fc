"""The sizes that the memory of the similarity and its loss depends on, on one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvr.kernels.backends.torch_tiles import SCORES_PER_TILE, VIDEOS_PER_TEXT
from tvr.kernels.similarity import PAIRS_PER_TILE


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What memory depends on: B `texts` of this rank, G `videos` of all ranks, and the ways taken.

    `backend` is "compiled", "torch", or "naive" (the reference). `exchange` is "gather", "ring", or
    "none" where all videos are this rank's own. `streamed` is `kernels.stream`, with `keep_scores`.
    `bytes_per_number` is that of the features. `word_share` is the part of the word slots that
    holds a word; 1: no padding at all, so that the compiled kernels need not pack the words.
    """

    texts: int
    videos: int
    words: int
    frames: int
    width: int
    interaction: str = "att_wti"
    neighbour_frames: bool = True
    backend: str = "compiled"
    exchange: str = "none"
    streamed: bool = False
    keep_scores: bool = False
    chunk: int | None = None
    bytes_per_number: int = 4
    word_share: float = 1.0
    device: str = "cpu"

    @property
    def has_words(self) -> bool:
        """Whether words meet the frames, beside the sentence."""
        return self.interaction.startswith("att_")

    @property
    def padded(self) -> bool:
        return self.word_share < 1

    @property
    def raised(self) -> bool:
        """Whether the features are copied to float32 first."""
        return self.bytes_per_number < 4

    @property
    def ranks(self) -> int:
        return 1 if self.exchange == "none" else -(-self.videos // self.texts)

    @property
    def own_videos(self) -> int:
        return self.videos if self.exchange == "none" else self.texts

    @property
    def videos_at_once(self) -> int:
        """Of a piece of the exchange."""
        return self.texts if self.exchange == "ring" else self.videos

    @property
    def inputs(self) -> int:
        """Bytes of features, logits and masks, which are there before."""
        of_text = self.bytes_per_number * (self.width + self.words * (self.width + 1))
        of_video = self.bytes_per_number * self.frames * (self.width + 1)
        masks = 8 * (self.texts * self.words + self.own_videos * self.frames)
        return self.texts * of_text + self.own_videos * of_video + masks

    @property
    def tile(self) -> tuple[int, int]:
        """Texts and videos of a tile, of the torch backend or of streamed scores."""
        chunk = self.chunk
        if chunk is None and self.backend == "compiled":
            chunk = math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
        elif chunk is None:
            slots = self.words if self.has_words else 1
            chunk = max(1, math.isqrt(SCORES_PER_TILE // (VIDEOS_PER_TEXT * slots * self.frames)))
        return min(chunk, self.texts), min(VIDEOS_PER_TEXT * chunk, self.videos_at_once)

    def words_of(self, texts: int) -> int:
        """Bytes in float32 of the sentence and, where they meet frames, of the words."""
        return 4 * texts * (1 + self.words * self.has_words) * self.width

    def frames_of(self, videos: int) -> int:
        return 4 * videos * self.frames * self.width

    def packed(self, texts: int) -> int:
        """Bytes of a copy of the words without padding; none where there is no padding."""
        return int(self.word_share * self.words_of(texts)) if self.padded else 0

    def maxima(self, pairs: int) -> int:
        """A byte for each maximum: the sentence's best frame, each word's, each frame's word."""
        of_words = int(self.word_share * self.words * pairs) + self.frames * pairs
        return pairs + (of_words if self.has_words else 0)
