"""The record of an explanation: arrays of one caption and one video; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NOTHING = -1
"""In place of an index: a padded slot, whose similarity counts as 0, won the maximum."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """Why a video has its similarity to a caption: the maxima of DMAE and their weights.

    T counts the tokens of the caption and F the frames of the video, both without padding. All
    `..._terms` together add up to `score`.
    """

    caption: str
    model: str
    """Readable name of the model."""
    interaction: str
    """`ti` and `wti` compare the sentence with the frames; `att_ti` and `att_wti` words, too."""
    matching: str = "two_way"
    """`words_to_frames`: the frames' choices are no part of the score, and their weights and terms
    are 0."""
    words: tuple[str, ...]
    """T tokens as text. Start, end and padding are "[start]", "[end]" and "[pad]"."""
    is_special: tuple[bool, ...]
    """(T,) True for the tokens that stand for no text."""
    continues_word: tuple[bool, ...]
    """(T,) True for a piece of the word that the token before it began."""
    similarity: np.ndarray
    """(T, F) float32 cosines of words and frames."""
    best_frame: np.ndarray
    """(T,) the frame that each word chose; NOTHING if all its similarities are negative and the
    video is padded."""
    neighbour_frame: np.ndarray
    """(F,) the other frame most similar to each frame; NOTHING if none has a positive one."""
    neighbour_weight: np.ndarray
    """(F,) 0.5 x that similarity: a word that chose this frame adds so much of its similarity with
    the neighbour. 0 without neighbour frames."""
    best_word: np.ndarray
    """(F,) the word that each frame chose; NOTHING as in `best_frame`. No part of the score with
    `words_to_frames`."""
    word_weights: np.ndarray
    """(T,) weights of the words in the similarity; 0 if the interaction does not read words."""
    frame_weights: np.ndarray
    """(F,) weights of the frames."""
    word_terms: np.ndarray
    """(T,) part of the score from each word's best frame and its neighbour."""
    neighbour_terms: np.ndarray
    """(T,) the neighbour's share of `word_terms`."""
    frame_terms: np.ndarray
    """(F,) part of the score from each frame's best word."""
    sentence_similarity: np.ndarray
    """(F,) cosines of the sentence and the frames."""
    sentence_frame: int
    """The frame that the sentence chose, or NOTHING."""
    sentence_term: float
    """Part of the score from the sentence's best frame and its neighbour."""
    sentence_neighbour_term: float
    """The neighbour's share of `sentence_term`."""
    sentence_frame_terms: np.ndarray
    """(F,) part of the score from each frame's similarity with the sentence."""
    masked_words: np.ndarray | None
    """(T,) words that TPM-CL's selector removes from this pair. That happens in training only. None
    for a model without its predictors."""
    masked_frames: np.ndarray | None
    """(F,) frames that TPM-CL's selector removes from this pair; None as above."""
    score: float
    """The similarity of caption and video, unscaled; see `dmae_similarity`."""
    frame_times: np.ndarray
    """(F,) seconds from the start of the video; not a number where unknown."""

    @property
    def reads_words(self) -> bool:
        """True if words are a part of the score."""
        return self.interaction.startswith("att_")

    @property
    def frames_choose(self) -> bool:
        """True if the best word of each frame is a part of the score."""
        return self.matching == "two_way"

    @property
    def parts(self) -> dict[str, float]:
        """The sums of the kinds of terms, up to four, which add up to the score."""
        found = {"sentence": self.sentence_term}
        if self.frames_choose:
            found["frames_of_sentence"] = float(self.sentence_frame_terms.sum())
        if self.reads_words:
            found["words"] = float(self.word_terms.sum())
        if self.reads_words and self.frames_choose:
            found["frames_of_words"] = float(self.frame_terms.sum())
        return found

    def to_json(self) -> dict[str, Any]:
        """The fields as plain lists and finite numbers; unknown times are None."""
        found: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            found[name] = list(value) if isinstance(value, tuple) else value
        found["frame_times"] = [x if math.isfinite(x) else None for x in found["frame_times"]]
        return found | {"parts": self.parts}
