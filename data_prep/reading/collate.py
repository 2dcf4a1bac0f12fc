"""Joins samples into a batch: padding, masks and token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.records import (
    Batch,
    Caption,
    Replacement,
    Sample,
    hash_caption,
    hash_video_id,
)

Tokenize = Callable[[Sequence[Caption]], tuple[Tensor, Tensor]]
"""Maps A captions to token ids (A, T) and a word_mask (A, T) with a fixed T. The mask is 0 for
padding, 1 for a token, and 2 for a token of a content word."""


def collate(
    samples: Sequence[Sample],
    captions_per_sample: Sequence[Sequence[Caption]],
    positions: Sequence[int],
    tokenize: Tokenize,
    num_frames: int,
    image_size: int,
    *,
    replaced: Sequence[Replacement] = (),
    buffer: Tensor | None = None,
) -> Batch:
    """Joins B samples, each with its chosen captions, into one `Batch`.

    A sample with fewer frames than `num_frames` is padded with zeros under frame_mask 0. No samples
    give a batch of 0 rows.

    Args:
        samples: B samples with frames (num_frames or fewer, image_size, image_size, 3).
        captions_per_sample: Captions to use of each sample.
        positions: Stream position (or manifest row) of each sample.
        tokenize: Tokeniser.
        num_frames: Frames per row of the batch.
        image_size: Height and width of the frames in pixels.
        replaced: Bad samples to report with the batch.
        buffer: (B, num_frames, image_size, image_size, 3) uint8. If it already holds the frames of
            all samples in this order, zero-padded, the batch uses it without a copy.

    Raises:
        ValueError: a sample without frames, with too many frames, or with frames of another size;
            a caption without a token.
    """
    captions = [caption for chosen in captions_per_sample for caption in chosen]
    rows = [row for row, chosen in enumerate(captions_per_sample) for _ in chosen]
    frames, frame_mask = _padded(samples, num_frames, image_size, buffer)
    token_ids, word_mask = _tokens(captions, rows, samples, tokenize)
    return Batch(
        positions=_long(np.array(positions, dtype=np.int64)),
        keys=tuple(sample.key for sample in samples),
        video_ids=_long(
            np.array([hash_video_id(sample.video_id) for sample in samples], dtype=np.int64)
        ),
        frames=frames.permute(0, 1, 4, 2, 3),
        frame_mask=_long(frame_mask),
        captions=tuple(caption.text for caption in captions),
        # Of the whole caption: the words that are dropped differ from one draw to the next.
        caption_ids=_long(
            np.array([hash_caption(caption.whole) for caption in captions], dtype=np.int64)
        ),
        token_ids=token_ids,
        word_mask=word_mask,
        caption_video=_long(np.array(rows, dtype=np.int64)),
        replaced=tuple(replaced),
    )


def _padded(
    samples: Sequence[Sample], num_frames: int, image_size: int, buffer: Tensor | None
) -> tuple[Tensor, np.ndarray]:
    shape = (num_frames, image_size, image_size, 3)
    frame_mask = np.zeros((len(samples), num_frames), dtype=np.int64)
    for row, sample in enumerate(samples):
        count = len(sample.frames)
        if not 1 <= count <= num_frames or sample.frames.shape[1:] != shape[1:]:
            raise ValueError(
                f"sample {sample.key}: frames of shape {sample.frames.shape}; expected 1 to"
                f" {num_frames} frames of {image_size} x {image_size} x 3"
            )
        frame_mask[row, :count] = 1
    if buffer is not None and _holds_frames(buffer, samples, shape):
        return buffer, frame_mask
    frames = np.zeros((len(samples), *shape), dtype=np.uint8)
    for row, sample in enumerate(samples):
        frames[row, : len(sample.frames)] = sample.frames
    return torch.from_numpy(frames), frame_mask


def _holds_frames(buffer: Tensor, samples: Sequence[Sample], shape: tuple[int, ...]) -> bool:
    """True if each sample's frames are a view of its row of the buffer."""
    return buffer.shape == (len(samples), *shape) and all(
        sample.frames.flags.c_contiguous and sample.frames.ctypes.data == row.data_ptr()
        for sample, row in zip(samples, buffer, strict=True)
    )


def _tokens(
    captions: list[Caption], rows: list[int], samples: Sequence[Sample], tokenize: Tokenize
) -> tuple[Tensor, Tensor]:
    if not captions:
        return _long(np.zeros((0, 0), dtype=np.int64)), _long(np.zeros((0, 0), dtype=np.int64))
    token_ids, word_mask = tokenize(captions)
    if token_ids.shape != word_mask.shape or len(token_ids) != len(captions):
        raise ValueError(
            f"tokenize returned ids {tuple(token_ids.shape)} and word_mask"
            f" {tuple(word_mask.shape)} for {len(captions)} captions; expected two of"
            f" ({len(captions)}, T)"
        )
    empty = torch.nonzero(word_mask.sum(dim=1) == 0).flatten().tolist()
    if empty:
        key, text = samples[rows[empty[0]]].key, captions[empty[0]].text
        raise ValueError(
            f"sample {key}: caption {text!r} has no token; every caption needs at least one"
        )
    return token_ids, word_mask


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)
