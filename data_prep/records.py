"""Records that pass from annotations to batches, one type per stage, and the errors that callers
handle."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    # Importing torch takes seconds; commands that only read records start without it.
    from torch import Tensor

# The name of a tar member is KEY.extension. USTAR limits it to 100 bytes, and WebDataset splits it
# at the first dot.
MAX_KEY_LENGTH = 80
KEY_PATTERN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")
MAX_VIDEO_ID_LENGTH = 4096
# Control characters, line separators, and halves of UTF-16 pairs, which UTF-8 cannot encode.
REFUSED_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
VIDEO_ID_RULE = f"1 to {MAX_VIDEO_ID_LENGTH} characters, none for control"

# Marks that may end a sentence or a list item, in Latin, Arabic, Indic, Khmer, Ethiopic and East
# Asian writing. The caption is the same without them.
SENTENCE_MARKS = (
    ".!?,;:\u203c\u203d\u2047\u2048\u2049\u2026"
    "\u060c\u061b\u061f\u06d4\u0964\u0965\u17d4\u1362"
    "\u3001\u3002\uff01\uff0c\uff0e\uff1a\uff1b\uff1f\uff61"
)

# Reasons for which a sample is refused. The set is fixed because it is a metric label.
BAD_SAMPLE_REASONS = (
    "missing_file",  # the source video does not exist or cannot be opened
    "unreadable",  # damaged or unknown video, JPEG or JSON
    "no_frames",  # no video stream, or a stream without frames
    "no_caption",  # no caption with a visible character
    "not_mp4",  # the video is to be copied but its container is not MP4
    "missing_shard",  # the whole shard file is absent
    "read_error",  # the storage refuses to deliver the bytes, and would refuse again
    "checksum",  # the bytes differ from what was packed
    "missing_member",  # a tar member that the layout requires is absent
    "unavailable",  # the storage failed for the moment; the sample itself may be good
    "out_of_memory",  # the clip needs more memory than its process may take
    "timed_out",  # packing the clip took too long, or its storage stopped sending
    "killed",  # the process that packed the clip ended twice
    "bad_row",  # a row of the annotations is no clip
)
# Reasons that lie outside of the sample: it is read again at its next visit, never quarantined,
# and does not count towards the limit of bad samples.
TRANSIENT_REASONS = ("unavailable",)
# Reasons that may lie in the machine: another one, or larger limits, may pack the clip.
LIMIT_REASONS = ("out_of_memory", "timed_out", "killed")

# What a clip's pictures need to be those that a player shows. Fixed, because it is a metric label.
ADJUSTMENTS = (
    "turned",  # turned or mirrored, by a display matrix or a message in the video stream
    "reshaped",  # pixels that are not square
    "deinterlaced",  # frames of two fields
    "pq",  # high dynamic range, tone-mapped
    "hlg",  # the same with the other transfer function
    "size_change",  # pictures of several sizes, fitted to the first
)

UNDECODABLE_REASONS = ("unreadable", "no_frames")

# Sources of a sample's bytes.
READ_SOURCES = (
    "memory",  # decoded frames cached in memory (data.cache_mib)
    "local",  # a local file
    "beton",  # an FFCV file
    "shard_cache",  # a remote shard in the node's cache
    "fetched",  # a remote shard downloaded for this read
    "store",  # a byte range of a remote shard
    "features",  # stored outputs of frozen towers (data.features)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One annotated video before packing."""

    key: str
    """Unique within the data set; letters, digits, "_" and "-"."""
    video: str
    """Path or fsspec URL."""
    captions: tuple[str, ...]
    """In annotation order. Packing drops and counts empty captions."""
    video_id: str
    """Clips with equal video_id show the same video and are never negatives of each other."""
    origin: str = ""
    """Location of the annotation, "file:line", for error messages."""
    start_s: float = 0.0
    """Start of the clip in its video, in seconds."""
    end_s: float | None = None
    """End of the clip in its video, in seconds; None = end of the video."""

    @property
    def span(self) -> tuple[float, float | None] | None:
        """(start_s, end_s) of the clip; None = the whole video."""
        whole = self.start_s == 0 and self.end_s is None
        return None if whole else (self.start_s, self.end_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedRow:
    """A row of an annotation file that is no clip: a bad sample with the reason "bad_row"."""

    origin: str
    """Location of the row, "file:line", which is also its key in bad.jsonl."""
    detail: str
    """What is wrong, with the location."""


PACKED_WITHOUT_WORDS = "packed without words; pack the data set again with `tvr pack --words`"


class WordKind(IntEnum):
    """Kind of a word. Shards store the numbers."""

    PLAIN = 0
    CONTENT = 1
    """A noun, adjective or full verb: value 2 in a word mask."""
    DROPPABLE = 2
    """A word with little information about its video; word drop may remove it."""


class Word(NamedTuple):
    """Character range [start, end) of a word in its caption."""

    start: int
    end: int
    kind: WordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """A packed caption: HTML entities resolved, words separated by one space."""

    text: str
    words: tuple[Word, ...] | None = None
    """Words in order; None = packed without words."""
    dropped_from: str | None = None
    """The caption before words were dropped from it; None = it is whole."""

    @property
    def whole(self) -> str:
        """The caption with all its words."""
        return self.text if self.dropped_from is None else self.dropped_from

    def known_words(self) -> tuple[Word, ...]:
        """Returns the words. Raises ValueError for a caption packed without words."""
        if self.words is None:
            raise ValueError(f"caption {self.text!r}: {PACKED_WITHOUT_WORDS}")
        return self.words


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One decoded clip."""

    key: str
    video_id: str
    captions: tuple[Caption, ...]
    frames: np.ndarray
    """(F, H, W, 3) uint8 RGB, F >= 1."""
    frame_times_s: tuple[float, ...]
    """Presentation time of each frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """One of the data sets that a run trains on."""

    url: str
    """Folder or fsspec URL."""
    max_bad: int
    """Limit for distinct bad samples of this set."""
    name: str = ""
    """Name in a mixture, see `mixture.SET_NAME`; empty = the only set."""
    weight: float = 1.0
    """Share of the stream, relative to the weights of the other sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A bad sample in a batch: replaced in training, left out in evaluation."""

    position: int
    """Position in the sample order in training, manifest row in evaluation."""
    key: str
    """Key of the bad sample, as in `Batch.keys`."""
    reason: str
    """One of BAD_SAMPLE_REASONS."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """B videos with A captions.

    Masks are 1 for real entries and 0 for padding. With `data.content_words` the word mask is 2 on
    content words. In training A == B and `caption_video` is arange(B). In evaluation the batch
    holds every caption of each video.
    """

    positions: Tensor
    """(B,) positions in the sample order; manifest rows in evaluation."""
    keys: tuple[str, ...]
    """Keys of the videos; NAME/KEY if the run trains on several sets, see `set_of_key`."""
    video_ids: Tensor
    """(B,) stable 63-bit hashes, see `hash_video_id`."""
    frames: Tensor
    """(B, F, 3, H, W) uint8 RGB; a view of channels-last memory, the decoders' output. With stored
    tower outputs (`tower_outputs`): (B, F, D) float32, the image tower's vectors."""
    frame_mask: Tensor
    """(B, F), at least one 1 per row."""
    captions: tuple[str, ...]
    caption_ids: Tensor
    """(A,) hashes of the whole captions, see `hash_caption`."""
    token_ids: Tensor
    """(A, T). With stored tower outputs: (A, 1 + T, D) float32, sentence and words."""
    word_mask: Tensor
    """(A, T), at least one 1 per row."""
    caption_video: Tensor
    """(A,) row of each caption's video in this batch."""
    replaced: tuple[Replacement, ...] = field(default=())
    reads: Mapping[str, int] = field(default_factory=dict)
    """Number of samples read for this batch, by source (READ_SOURCES)."""


def key_in_set(name: str, key: str) -> str:
    """Returns a sample's key, or video id, so that those of two training sets never agree."""
    return f"{name}/{key}" if name else key


def set_of_key(key: str) -> str:
    """Returns the name of the training set in a key of a batch; empty for the only set.

    No key of a data set contains a slash, see KEY_PATTERN.
    """
    return key.rpartition("/")[0]


def is_video_id(text: object) -> bool:
    """True if a value is a valid `video_id`; VIDEO_ID_RULE describes those."""
    return (
        isinstance(text, str)
        and 1 <= len(text) <= MAX_VIDEO_ID_LENGTH
        and REFUSED_TEXT.search(text) is None
    )


def hash_video_id(video_id: str) -> int:
    """Hashes a video id to 63 bits, the same in every process and release."""
    return _hash_63_bits(video_id)


def normal_caption(text: str) -> str:
    """Returns the form in which equal captions agree.

    Captions are equal without regard to case and to the way in which accents are encoded (canonical
    caseless matching, Unicode D145), to white space, and to sentence marks at the end. A caption of
    such marks alone keeps them. Every other character counts.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFD", text)
    text = text.casefold()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split())
    return text.rstrip(SENTENCE_MARKS + " ") or text


def hash_caption(text: str) -> int:
    """Hashes the normal form of a caption to 63 bits.

    It is the same in every process of a run. Characters that a later version of Unicode adds may
    change it, so it is not stored.
    """
    return _hash_63_bits(normal_caption(text))


def _hash_63_bits(text: str) -> int:
    # A text from elsewhere may hold half of a UTF-16 pair, which strict UTF-8 cannot encode.
    content = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


class BadSample(Exception):
    """A sample cannot be used; `reason` is one of BAD_SAMPLE_REASONS."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        if reason not in BAD_SAMPLE_REASONS:
            raise ValueError(f"reason={reason!r} is not one of {', '.join(BAD_SAMPLE_REASONS)}")
        super().__init__(key, reason, detail)  # pickling rebuilds the error from these args
        self.key = key
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}: {self.detail}"


class TooManyBadSamples(Exception):
    """More samples are bad, or more reads in a row fail for the moment, than allowed.

    The message has the counts and the last examples.
    """


class ShardCorrupt(Exception):
    """The data set's index is damaged or inconsistent; no sample can be read."""
