"""Explanations of results, with the model and the frames of an index."""

from __future__ import annotations

import numpy as np

from tvr.data_prep.caption_text import clean_captions
from tvr.data_prep.records import Caption
from tvr.trainer.explanation.explanation import Explanation, explain
from tvr.trainer.service.records import SearchIndex


def explained(index: SearchIndex, text: str, video: int) -> tuple[Explanation, np.ndarray]:
    """Explains why a video fits a text.

    Returns:
        The explanation, and the video's frames (F, H, W, 3) uint8, which are its pictures.
    """
    frames = index.frames(video)
    times = index.features.frame_times(video)
    return explain(index.model, _tagged(index, text), frames, frame_times=times), frames


def _tagged(index: SearchIndex, text: str) -> Caption:
    """The text as a search reads it, with its words if the model weights them."""
    texts = clean_captions([text])
    if not texts:
        raise ValueError(f"the query {text!r:.100} has no visible character")
    if not index.model.tokenizer.content_words:
        return Caption(text=texts[0])
    from tvr.data_prep.packing.words import WordTagger

    (caption,) = WordTagger([]).tag(texts)
    return caption
