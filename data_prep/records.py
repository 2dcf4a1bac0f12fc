"""The records that travel from annotations to batches, one type per stage, and the errors callers
act on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    # Importing torch takes seconds; commands that only read records start without it.
    from torch import Tensor

# Every reason a sample can be refused for; bounded, so that it can be a metric label.
BAD_SAMPLE_REASONS = (
    "missing_file",  # the source video does not exist or cannot be opened
    "unreadable",  # damaged or unknown video, JPEG or JSON
    "no_frames",  # no video stream, or one without a single picture
    "no_caption",  # no caption with a visible character
    "not_mp4",  # copying was asked for, and the container is another one
    "missing_shard",  # the whole shard file is absent
    "read_error",  # the storage failed to deliver the bytes
    "checksum",  # the bytes differ from what was packed
    "missing_member",  # a tar member that the layout demands is absent
)


UNDECODABLE_REASONS = ("unreadable", "no_frames")

# Where the bytes of a sample can come from.
READ_SOURCES = (
    "memory",  # decoded before, and kept (data.cache_mib)
    "local",  # a file on this machine
    "beton",  # FFCV
    "shard_cache",  # a remote shard that was kept here
    "fetched",  # a remote shard that was fetched for it
    "store",  # a range of a remote shard
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One annotated video before packing."""

    key: str
    """Unique name in the data set: letters, digits, "_" and "-"."""
    video: str
    """Path or fsspec URL."""
    captions: tuple[str, ...]
    """In annotation order; empty ones are dropped (and counted) when packing."""
    video_id: str
    """Clips of equal video_id show the same video and never count as each other's negatives."""
    origin: str = ""
    """Where it was annotated, "file:line", for error messages."""
    start_s: float = 0.0
    """The clip is the part of the video from here, in seconds."""
    end_s: float | None = None
    """Up to here; None = to the video's end."""

    @property
    def span(self) -> tuple[float, float | None] | None:
        """The cut range in seconds; None = the whole video."""
        whole = self.start_s == 0 and self.end_s is None
        return None if whole else (self.start_s, self.end_s)


PACKED_WITHOUT_WORDS = "packed without words; pack the data set again with `tvr pack --words`"


class WordKind(IntEnum):
    """What a word may be used for; the numbers are stored in shards."""

    PLAIN = 0
    CONTENT = 1
    """A noun, adjective or full verb: value 2 in a word mask."""
    DROPPABLE = 2
    """A word that tells little of its video: training may leave it out."""


class Word(NamedTuple):
    """A word's characters [start, end) in its caption."""

    start: int
    end: int
    kind: WordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """A packed caption: HTML entities resolved, one space between words."""

    text: str
    words: tuple[Word, ...] | None = None
    """In order; None = packed without words."""

    def known_words(self) -> tuple[Word, ...]:
        """The words; raises ValueError for a caption packed without them."""
        if self.words is None:
            raise ValueError(f"caption {self.text!r}: {PACKED_WITHOUT_WORDS}")
        return self.words


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One decoded clip: frames (F, H, W, 3) uint8 RGB with F >= 1, and the second each was shown
    at."""

    key: str
    video_id: str
    captions: tuple[Caption, ...]
    frames: np.ndarray
    frame_times_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A bad sample that the stream met: replaced in training, left out in evaluation."""

    position: int
    """Stream position in training, manifest row in evaluation."""
    key: str
    """Key of the bad sample."""
    reason: str
    """One of BAD_SAMPLE_REASONS."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """B videos with A captions; A == B in training. Masks are 1 for real and 0 for padding; a word
    mask is 2 on content words, where they are told apart.

    In training `caption_video` is arange(B); in evaluation every caption of each video is present.
    """

    positions: Tensor
    """(B,) stream positions; manifest rows in evaluation."""
    keys: tuple[str, ...]
    video_ids: Tensor
    """(B,) stable 63-bit hash of each video_id."""
    frames: Tensor
    """(B, F, 3, H, W) uint8 RGB; channels come last in memory, as decoders write them."""
    frame_mask: Tensor
    """(B, F), at least one 1 per row."""
    captions: tuple[str, ...]
    token_ids: Tensor
    """(A, T)."""
    word_mask: Tensor
    """(A, T), at least one 1 per row."""
    caption_video: Tensor
    """(A,) the row of the caption's video in this batch."""
    replaced: tuple[Replacement, ...] = field(default=())
    reads: Mapping[str, int] = field(default_factory=dict)
    """Samples that were read for it, by READ_SOURCES."""


def hash_video_id(video_id: str) -> int:
    """Hashes a video id to 63 bits, the same in every process and release."""
    return int.from_bytes(hashlib.blake2b(video_id.encode(), digest_size=8).digest(), "little") >> 1


class BadSample(Exception):
    """One sample cannot be used; `reason` is one of BAD_SAMPLE_REASONS."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        if reason not in BAD_SAMPLE_REASONS:
            raise ValueError(f"reason={reason!r} is not one of {', '.join(BAD_SAMPLE_REASONS)}")
        super().__init__(key, reason, detail)  # all three in args, so that it survives pickling
        self.key = key
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}: {self.detail}"


class TooManyBadSamples(Exception):
    """The budget for bad samples is spent; the message names the counts and the last examples."""


class ShardCorrupt(Exception):
    """The data set's own index is damaged or disagrees with itself: nothing can be read from it."""
