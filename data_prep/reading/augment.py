"""Random frames, random crops and random words of training samples.

Every draw is a pure function of (seed, stream position). The draws are part of the contract of
`order`: changing them changes the data that a resumed run sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tvr.data_prep.reading.order import uniforms
from tvr.data_prep.records import Caption, Word, WordKind
from tvr.data_prep.video.images import resize

FrameSampling = Literal["centre", "random"]

# Bounds of a crop's width / height, as in the training of CLIP.
MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A random crop, independent of the picture's size; `crop_box` turns it into pixels."""

    share: float
    """Area as a share of the largest square in the picture, in (0, 1]."""
    shape: float
    """Aspect ratio, from the narrowest (0) to the widest (1) allowed, in [0, 1)."""
    down: float
    """Vertical position, from the top (0) to the bottom (1), in [0, 1)."""
    right: float
    """Horizontal position, from the left (0) to the right (1), in [0, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The random choices for one sample; all frames of the clip share the crop."""

    offsets: tuple[float, ...] | None
    """Position of each frame within its segment, see `segment_frames`; None = the middles."""
    crop: Crop | None
    """None = the centre square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Settings of the random frame sampling and cropping.

    Raises:
        ValueError: a setting is out of range.
    """

    frame_sampling: FrameSampling = "centre"
    """random = a random frame in each segment; centre = the middle frame."""
    crop_scale: float = 1.0
    """Smallest area of a crop as a share of the largest square's; 1 = no random crops."""

    def __post_init__(self) -> None:
        if self.frame_sampling not in get_args(FrameSampling):
            raise ValueError(
                f"frame_sampling={self.frame_sampling!r} must be centre or random"
                " (data.frame_sampling)"
            )
        if not 0 < self.crop_scale <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be above 0 and at most 1 (data.crop_scale)"
            )

    def draw(self, seed: int, position: int, num_frames: int) -> View | None:
        """Draws the view of a stream position; None if nothing is random."""
        offsets = crop = None
        if self.frame_sampling == "random":
            offsets = tuple(uniforms("frames", seed, position, num_frames).tolist())
        if self.crop_scale < 1:
            share, shape, down, right = uniforms("crop", seed, position, 4).tolist()
            share = self.crop_scale + share * (1 - self.crop_scale)
            crop = Crop(share=share, shape=shape, down=down, right=right)
        return None if offsets is None and crop is None else View(offsets=offsets, crop=crop)


NO_AUGMENTATION = Augmentation()


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle in a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(crop: Crop, height: int, width: int) -> Box:
    """Places a crop in a picture of `height` x `width` pixels.

    The aspect ratio is log-uniform between 3/4 and 4/3, as far as the picture allows. The position
    is uniform. For a square picture the crops follow torchvision's RandomResizedCrop without its
    rejection loop. For a wide picture, torchvision falls back to one fixed crop, because no crop of
    90 % of the picture's area is narrow enough; areas are therefore relative to the largest square.
    """
    area = crop.share * min(height, width) ** 2
    narrowest = max(MIN_RATIO, area / height**2)
    widest = min(MAX_RATIO, width**2 / area)
    log_range = math.log(widest) - math.log(narrowest)
    ratio = math.exp(math.log(narrowest) + crop.shape * log_range)
    box_height = min(height, max(1, round(math.sqrt(area / ratio))))
    box_width = min(width, max(1, round(math.sqrt(area * ratio))))
    return Box(
        top=int(crop.down * (height - box_height + 1)),
        left=int(crop.right * (width - box_width + 1)),
        height=box_height,
        width=box_width,
    )


def crop_frames(frames: np.ndarray, box: Box, image_size: int) -> np.ndarray:
    """Crops each (F, H, W, 3) uint8 frame and resizes it to (F, image_size, image_size, 3)."""
    # Crop first: Pillow's resize with a box also reads the pixels around the box.
    rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    return resize(frames[:, rows, columns], image_size, image_size)


def drop_words(caption: Caption, seed: int, position: int) -> Caption:
    """Removes k randomly chosen droppable word forms, each with all its occurrences.

    k is uniform in 0 ... min(droppable forms, half of all forms, rounded down), so at least half of
    the forms stay. The result is a pure function of (seed, stream position, caption).

    Raises:
        ValueError: the caption was packed without words.
    """
    words = caption.known_words()
    forms = {_form(caption, word): word.kind for word in words}
    droppable = [form for form, kind in forms.items() if kind == WordKind.DROPPABLE]
    draws = uniforms("words", seed, position, 1 + len(droppable))
    max_dropped = min(len(droppable), len(forms) // 2)
    chosen = np.argsort(draws[1:], kind="stable")[: int(draws[0] * (max_dropped + 1))]
    return _without(caption, words, {droppable[index] for index in chosen})


def _form(caption: Caption, word: Word) -> str:
    """Case-folded text of a word; equal for all occurrences of the word."""
    return caption.text[word.start : word.end].casefold()


def _without(caption: Caption, words: tuple[Word, ...], forms: set[str]) -> Caption:
    """Removes words and the space after each, or the space before at the caption's end."""
    text, kept, copied = "", [], 0
    for word in words:
        text += caption.text[copied : word.start]
        copied = word.end
        if _form(caption, word) not in forms:
            end = len(text) + word.end - word.start
            kept.append(word._replace(start=len(text), end=end))
            text += caption.text[word.start : word.end]
        elif (not text or text.endswith(" ")) and caption.text.startswith(" ", copied):
            copied += 1
    text = (text + caption.text[copied:]).rstrip()
    return Caption(text=text, words=tuple(kept), dropped_from=caption.whole)
