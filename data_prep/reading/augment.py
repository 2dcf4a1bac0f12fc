"""What a training sample shows this time: which of its frames, and which part of their pictures.

Pure functions of (seed, stream position), as the order is; part of its contract.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tvr.data_prep.reading.order import uniforms
from tvr.data_prep.video.images import resize

FrameSampling = Literal["centre", "random"]

# Width over height of a crop, as where CLIP was trained.
LEAST_RATIO, LARGEST_RATIO = 3 / 4, 4 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A part of a picture of any size; see `crop_box`."""

    share: float
    """Of the area of the largest square, above 0 and at most 1."""
    shape: float
    """From the narrowest (0) to the widest (1), as the rest in [0, 1)."""
    down: float
    right: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One draw; all frames of a clip share the crop."""

    offsets: tuple[float, ...] | None
    """Place of each frame in its segment, see `segment_frames`; None: the middles."""
    crop: Crop | None
    """None: the square at the centre."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How views are drawn."""

    frame_sampling: FrameSampling = "centre"
    crop_scale: float = 1.0
    """Least area of a crop as a share of the largest square's; 1: no crop is drawn."""

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
        """The view at a stream position; None where nothing is drawn."""
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
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(crop: Crop, height: int, width: int) -> Box:
    """Where a crop lies in a picture.

    The ratio of its sides is log-even within 3/4 to 4/3 and what the picture allows, its place even
    within the picture. From a square picture these are the crops of torchvision's
    RandomResizedCrop, drawn without repeated tries. From a wide one that takes the same crop each
    time, since none of 0.9 of its area is narrow enough: hence the square's area here.
    """
    area = crop.share * min(height, width) ** 2
    least = max(LEAST_RATIO, area / height**2)
    largest = min(LARGEST_RATIO, width**2 / area)
    ratio = math.exp(math.log(least) + crop.shape * (math.log(largest) - math.log(least)))
    box_height = min(height, max(1, round(math.sqrt(area / ratio))))
    box_width = min(width, max(1, round(math.sqrt(area * ratio))))
    return Box(
        top=int(crop.down * (height - box_height + 1)),
        left=int(crop.right * (width - box_width + 1)),
        height=box_height,
        width=box_width,
    )


def crop_frames(frames: np.ndarray, box: Box, image_size: int) -> np.ndarray:
    """The box of each (F, H, W, 3) uint8 frame, resized to (F, image_size, image_size, 3)."""
    # Cut before: given a box, Pillow also weighs the pixels around it.
    rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    return resize(frames[:, rows, columns], image_size, image_size)
