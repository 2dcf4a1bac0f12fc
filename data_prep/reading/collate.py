"""Samples -> Batch: padding, masks and token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.records import Batch, Caption, Replacement, Sample, hash_video_id

Tokenize = Callable[[Sequence[Caption]], tuple[Tensor, Tensor]]
"""Captions -> token ids (A, T) and word_mask (A, T), 0 = padding, 1 = token and 2 = token of a
content word, with a fixed T."""


def collate(
    samples: Sequence[Sample],
    captions_per_sample: Sequence[Sequence[Caption]],
    positions: Sequence[int],
    tokenize: Tokenize,
    num_frames: int,
    image_size: int,
    *,
    replaced: Sequence[Replacement] = (),
    room: Tensor | None = None,
) -> Batch:
    """Joins B samples, each with its chosen captions, into one Batch (see there for shapes).

    Samples with fewer frames than `num_frames` are padded with zeros under frame_mask 0. No samples
    give a batch of 0 rows. `room` (B, num_frames, image_size, image_size, 3) is not copied where
    the frames of all samples, and zeros behind them, lie in it in this order.

    Raises:
        ValueError: a sample without frames, with too many or of another size; a caption without a
            single token.
    """
    captions = [caption for chosen in captions_per_sample for caption in chosen]
    rows = [row for row, chosen in enumerate(captions_per_sample) for _ in chosen]
    frames, frame_mask = _padded(samples, num_frames, image_size, room)
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
        token_ids=token_ids,
        word_mask=word_mask,
        caption_video=_long(np.array(rows, dtype=np.int64)),
        replaced=tuple(replaced),
    )


def _padded(
    samples: Sequence[Sample], num_frames: int, image_size: int, room: Tensor | None
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
    if room is not None and _is_filled(room, samples, shape):
        return room, frame_mask
    frames = np.zeros((len(samples), *shape), dtype=np.uint8)
    for row, sample in enumerate(samples):
        frames[row, : len(sample.frames)] = sample.frames
    return torch.from_numpy(frames), frame_mask


def _is_filled(room: Tensor, samples: Sequence[Sample], shape: tuple[int, ...]) -> bool:
    return room.shape == (len(samples), *shape) and all(
        sample.frames.flags.c_contiguous and sample.frames.ctypes.data == place.data_ptr()
        for sample, place in zip(samples, room, strict=True)
    )


def _tokens(
    captions: list[Caption], rows: list[int], samples: Sequence[Sample], tokenize: Tokenize
) -> tuple[Tensor, Tensor]:
    if not captions:
        return _long(np.zeros((0, 0), dtype=np.int64)), _long(np.zeros((0, 0), dtype=np.int64))
    token_ids, word_mask = tokenize(captions)
    if token_ids.shape != word_mask.shape or len(token_ids) != len(captions):
        raise ValueError(
            f"tokenize gave ids {tuple(token_ids.shape)} and word_mask {tuple(word_mask.shape)} for"
            f" {len(captions)} captions; expected two of ({len(captions)}, T)"
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
