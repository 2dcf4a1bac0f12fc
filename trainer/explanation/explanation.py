"""Explains a similarity: `explain` returns arrays, `explanation_page` draws them.

`hard_negatives` finds the captions of a test set that a wrong video beats.

The door of the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.records import Caption
from tvr.kernels.explanation import PairMaxima, pair_maxima
from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.explanation.hardest import HardNegative, Movement, hard_negatives, movements
from tvr.trainer.explanation.page import explanation_page
from tvr.trainer.explanation.record import NOTHING, Explanation
from tvr.trainer.explanation.tokens import token_texts
from tvr.trainer.explanation.videos import frames_of_file, sample_of
from tvr.trainer.model.model import Features

__all__ = [
    "NOTHING",
    "Explanation",
    "HardNegative",
    "Movement",
    "explain",
    "explanation_page",
    "frames_of_file",
    "hard_negatives",
    "movements",
    "sample_of",
]


def explain(
    source: SourceModel,
    caption: str | Caption,
    frames: np.ndarray | Features,
    *,
    frame_times: Sequence[float] | None = None,
) -> Explanation:
    """Computes why a video has its similarity to a caption.

    Args:
        source: The model, from `load_source`.
        caption: Text, cleaned as packing does and cut after `source.max_words` tokens. For a model
            that weights content words (`data.content_words`), they are found in a plain text; a
            `Caption` brings its own.
        frames: Frames of the video, (F, H, W, 3) uint8 with 1 to `source.num_frames` frames; or
            features of this one video by the same model.
        frame_times: Seconds of each frame from the start of the video; None if unknown. For a model
            that averages the frames, the explanation has one frame, with the mean of the times.

    Raises:
        ValueError: the model has several tokens a frame, no visible character in the caption,
            frames of another form, or features of not exactly one video.
    """
    if (cells := source.config.model.tokens_per_frame) > 1:
        raise ValueError(
            f"{source.name} was trained with model.tokens_per_frame={cells}; an explanation shows"
            " one vector a frame"
        )
    text = caption if isinstance(caption, Caption) else source.caption(caption)
    videos = frames if isinstance(frames, Features) else source.encode_frames([frames])
    if len(videos.frames) != 1:
        raise ValueError(f"features of {len(videos.frames)} videos; explain takes those of one")
    texts = source.encode_texts([text])
    logits = videos.frame_logits
    videos = videos._replace(
        frames=videos.frames.to(source.device),
        frame_mask=videos.frame_mask.to(source.device),
        frame_logits=None if logits is None else logits.to(source.device),
    )
    settings = source.config.model
    word_weights, frame_weights = _selector_weights(source, texts, videos)
    with torch.no_grad():
        found = pair_maxima(
            texts.sentence,
            texts.words,
            videos.frames,
            texts.word_mask,
            videos.frame_mask,
            interaction=settings.interaction,
            matching=settings.matching,
            neighbour_frames=settings.neighbour_frames,
            word_logits=texts.word_logits,
            frame_logits=videos.frame_logits,
            selector_word_weights=word_weights,
            selector_frame_weights=frame_weights,
            threshold=source.config.loss.mask_threshold,
        )
    return _record(
        source,
        text.text,
        found,
        np.flatnonzero(texts.word_mask[0].cpu().numpy()),
        np.flatnonzero(videos.frame_mask[0].cpu().numpy()),
        frame_times,
    )


def _selector_weights(
    source: SourceModel, texts: Features, videos: Features
) -> tuple[Tensor | None, Tensor | None]:
    """Outputs of TPM-CL's predictors for the pair, as in training; None where there are none.

    They are built for fixed numbers of words and frames, which an option may have changed.
    """
    model = source.model
    of_words, of_frames = model.word_predictor, model.frame_predictor
    if of_words is None or of_frames is None or source.mean_of_frames:
        return None, None
    slots = (videos.frames.shape[1], texts.words.shape[1])
    if slots != (of_words.mix.in_features, of_words.mix.out_features):
        return None, None
    hidden = source.config.loss.mask_padding_weights
    with torch.no_grad():
        return (
            of_words(videos.frames, texts.words, texts.word_mask if hidden else None),
            of_frames(
                texts.sentence[:, None], videos.frames, videos.frame_mask if hidden else None
            ),
        )


def _record(
    source: SourceModel,
    caption: str,
    found: PairMaxima,
    words: np.ndarray,
    frames: np.ndarray,
    frame_times: Sequence[float] | None,
) -> Explanation:
    """The record without padding: `words` and `frames` are the slots that hold something."""
    assert found.words is not None, "explain gives the words to every interaction"
    num_words, num_frames = found.words.similarity.shape
    word_of, frame_of = _places(words, num_words), _places(frames, num_frames)
    tokens = token_texts(source.tokenizer, caption)
    strength = found.neighbour_weight.numpy()[frames]
    neighbour = frame_of[found.neighbour.numpy()[frames]]

    def of_words(values: Tensor) -> np.ndarray:
        return values.numpy()[words].astype(np.float32)

    def of_frames(values: Tensor) -> np.ndarray:
        return values.numpy()[frames].astype(np.float32)

    return Explanation(
        caption=caption,
        model=source.name,
        interaction=source.config.model.interaction,
        matching=source.config.model.matching,
        words=tuple(tokens.texts[slot] for slot in words),
        is_special=tuple(tokens.is_special[slot] for slot in words),
        continues_word=tuple(tokens.continues_word[slot] for slot in words),
        similarity=found.words.similarity.numpy()[np.ix_(words, frames)].astype(np.float32),
        best_frame=frame_of[found.words.best_frame.numpy()[words]],
        neighbour_frame=np.where(strength > 0, neighbour, NOTHING),
        neighbour_weight=strength.astype(np.float32),
        best_word=word_of[found.words.best_token.numpy()[frames]],
        word_weights=of_words(found.words.weights),
        frame_weights=of_frames(found.frame_weights),
        word_terms=of_words(found.words.token_terms),
        neighbour_terms=of_words(found.words.neighbour_terms),
        frame_terms=of_frames(found.words.frame_terms),
        sentence_similarity=of_frames(found.sentence.similarity[0]),
        sentence_frame=int(frame_of[int(found.sentence.best_frame[0])]),
        sentence_term=float(found.sentence.token_terms[0]),
        sentence_neighbour_term=float(found.sentence.neighbour_terms[0]),
        sentence_frame_terms=of_frames(found.sentence.frame_terms),
        masked_words=None if found.removed_words is None else found.removed_words.numpy()[words],
        masked_frames=(
            None if found.removed_frames is None else found.removed_frames.numpy()[frames]
        ),
        score=float(found.score),
        frame_times=_times(source, frame_times, len(frames)),
    )


def _places(slots: np.ndarray, count: int) -> np.ndarray:
    """Place of each slot among those that hold something; NOTHING for padding."""
    places = np.full(count, NOTHING)
    places[slots] = np.arange(len(slots))
    return places


def _times(source: SourceModel, times: Sequence[float] | None, count: int) -> np.ndarray:
    if times is None:
        return np.full(count, np.nan)
    if source.mean_of_frames and len(times) > 1:
        times = [float(np.mean(np.asarray(times)))]
    # Stored times have as many slots as the model takes frames.
    found = np.asarray(times, np.float64)
    if len(found) < count or np.isfinite(found[count:]).any():
        raise ValueError(f"{len(found)} frame times for {count} frames; give as many")
    return found[:count]
