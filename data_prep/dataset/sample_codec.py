"""Decodes a sample's stored bytes to its metadata and frames."""

from __future__ import annotations

import json
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tvr.data_prep.dataset.foreign_samples import translate_range
from tvr.data_prep.dataset.jpeg_stack import split_stack
from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.records import (
    VIDEO_ID_RULE,
    BadSample,
    Caption,
    Word,
    WordKind,
    is_video_id,
)
from tvr.data_prep.video.decode import Finish, sample_frames
from tvr.data_prep.video.decoders import FrameSampler
from tvr.data_prep.video.frame_index import FrameIndex
from tvr.data_prep.video.frame_sampling import segment_frames
from tvr.data_prep.video.images import decode_jpeg
from tvr.data_prep.video.stored_index import INDEX_MEMBER, decode_index

BLOCKSIZE = tarfile.BLOCKSIZE
# webdataset splits a name at its first dot.
MEMBER_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([a-z0-9_.-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMeta:
    """A sample's metadata."""

    captions: tuple[Caption, ...]
    video_id: str
    frame_times_s: tuple[float, ...]
    """Times of the stored JPEG frames; empty in the video layout."""
    jpegs: tuple[str, ...]
    """Names of the JPEG members in order."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the captions."""
        return tuple(caption.text for caption in self.captions)


def parse_range(manifest: Manifest, row: int, content: bytes) -> dict[str, bytes]:
    """Checks a sample's byte range and splits it into members by extension. Raises BadSample.

    A sample of another tool's shard is translated to the members of a packed one.
    """
    samples = manifest.samples
    key, length, crc32 = str(samples.key[row]), int(samples.length[row]), int(samples.crc32[row])
    split = split_tar if manifest.beton is None else split_stack
    if manifest.foreign is not None:
        split = partial(translate_range, rules=manifest.foreign)
    return parse_members(content, key, length, crc32, split)


def split_tar(content: bytes, key: str) -> dict[str, bytes]:
    """Splits a sample's byte range of a tar shard into members by extension.

    Only plain files of the sample are members: no link, no sparse file, no folder, no compressed
    archive. So no member is larger than its bytes in the range, and no name becomes a path.

    Raises:
        BadSample: the range holds anything else, or members of another sample.
    """
    members: dict[str, bytes] = {}
    keys: dict[str, None] = {}
    at = 0
    while at < len(content):
        header = content[at : at + BLOCKSIZE]
        if not header.strip(b"\0"):
            break  # an empty block ends an archive
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BadSample(key, "unreadable", f"byte {at} is no tar header: {error}") from error
        name = MEMBER_NAME.fullmatch(info.name)
        if name is None or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise BadSample(
                key,
                "unreadable",
                f"tar member {info.name!r} of type {info.type!r} must be a plain file KEY.NAME",
            )
        start = at + BLOCKSIZE
        if not 0 <= info.size <= len(content) - start:
            raise BadSample(
                key,
                "unreadable",
                f"tar member {info.name!r} of {info.size} bytes must end within the sample's"
                f" {len(content)} bytes",
            )
        if name[2] in members:
            raise BadSample(key, "unreadable", f"tar member {info.name!r} occurs twice")
        keys[name[1]] = None
        members[name[2]] = content[start : start + info.size]
        at = start + -(-info.size // BLOCKSIZE) * BLOCKSIZE
    if list(keys) != [key]:
        raise BadSample(key, "missing_member", f"the range holds {list(keys)}")
    return members


def parse_members(
    content: bytes,
    key: str,
    length: int,
    crc32: int,
    split: Callable[[bytes, str], dict[str, bytes]] = split_tar,
) -> dict[str, bytes]:
    """Checks a sample's byte range against its packed length and CRC, and splits it into members.

    Args:
        split: Function from (bytes, key) to members by extension.

    Raises:
        BadSample: the bytes differ from the packed ones, or a member is missing.
    """
    if len(content) != length:
        raise BadSample(
            key, "checksum", f"{len(content)} of {length} bytes are there: the file is truncated"
        )
    if zlib.crc32(content) != crc32:
        raise BadSample(
            key, "checksum", f"crc32 {zlib.crc32(content):08x} is not the packed {crc32:08x}"
        )
    return split(content, key)


def parse_meta(key: str, members: dict[str, bytes]) -> SampleMeta:
    """Parses the JSON member and checks that its frames are present. Raises BadSample."""
    if "json" not in members:
        raise BadSample(key, "missing_member", "json")
    try:
        fields = json.loads(members["json"])
        meta = SampleMeta(
            captions=_captions(fields["captions"], fields.get("words")),
            video_id=_video_id(fields["video_id"]),
            frame_times_s=_times(fields["frame_times_s"]),
            jpegs=tuple(sorted(name for name in members if name.endswith(".jpg"))),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadSample(key, "unreadable", f"json: {error!r}") from error
    if not meta.captions:
        raise BadSample(key, "no_caption", "json holds no caption")
    if "mp4" not in members and (not meta.jpegs or len(meta.jpegs) != len(meta.frame_times_s)):
        found = f"{len(meta.jpegs)} of {len(meta.frame_times_s)} JPEG frames and no mp4"
        raise BadSample(key, "missing_member", found)
    return meta


def _captions(texts: Any, words: Any) -> tuple[Caption, ...]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"captions={texts!r:.200} must be a list of texts")
    for text in texts:
        text.encode()  # raises ValueError for a half of a UTF-16 pair
    if words is None:
        return tuple(Caption(text=text) for text in texts)
    return tuple(
        Caption(text=text, words=tuple(_word(*word) for word in of))
        for text, of in zip(texts, words, strict=True)
    )


def _word(start: Any, end: Any, kind: Any) -> Word:
    if type(start) is not int or type(end) is not int:
        raise ValueError(f"word {start!r:.50} to {end!r:.50} must be two whole numbers")
    return Word(start, end, WordKind(kind))


def _video_id(value: Any) -> str:
    if not is_video_id(value):
        raise ValueError(f"video_id={value!r:.200} must be {VIDEO_ID_RULE}")
    return value


def _times(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    ):
        raise ValueError(f"frame_times_s={values!r:.200} must be a list of finite numbers")
    return tuple(values)


def stored_index(key: str, members: dict[str, bytes]) -> FrameIndex | None:
    """Returns the frame index that was stored with the video, if there is one.

    Raises:
        BadSample: it is damaged, or a value is not allowed.
    """
    if "mp4" not in members or INDEX_MEMBER not in members:
        return None
    return decode_index(members[INDEX_MEMBER], len(members["mp4"]), key)


def decode_members(
    key: str,
    members: dict[str, bytes],
    meta: SampleMeta,
    num_frames: int,
    *,
    offsets: Sequence[float] | None = None,
    sample: FrameSampler = sample_frames,
    out: np.ndarray | None = None,
    finish: Finish | None = None,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Decodes a sample's frames at their stored size, or as `finish` makes them.

    Args:
        offsets: Position within each segment, see `segment_frames`.
        sample: Decoder of the video layout.
        out: (num_frames, H, W, 3) uint8 buffer. Frames of this size that come from JPEGs are
            written into it, and its remaining frames are set to zero.
        finish: Applied to each picture as it comes, so that only its results are held.

    Returns:
        Frames (F, H, W, 3) uint8 with F <= num_frames, and the time of each in seconds.

    Raises:
        BadSample: a frame cannot be decoded, or the JPEGs differ in size.
    """
    if "mp4" in members:
        index = stored_index(key, members)
        return sample(
            members["mp4"],
            num_frames,
            offsets=offsets,
            key=key,
            frame_index=index,
            finish=finish,
        )
    chosen = segment_frames(len(meta.jpegs), num_frames, offsets)
    times_s = tuple(meta.frame_times_s[i] for i in chosen)
    pictures, sizes = [], set()
    for at, i in enumerate(chosen):
        row = None if out is None else out[at]
        picture = decode_jpeg(members[meta.jpegs[i]], key=key, member=meta.jpegs[i], out=row)
        sizes.add(picture.shape)
        if finish is not None:
            picture = finish(picture)
            if row is not None and picture.shape == row.shape:
                if not np.may_share_memory(picture, row):
                    row[:] = picture
                picture = row
        pictures.append(picture)
    if len(sizes) > 1:
        raise BadSample(key, "unreadable", "its JPEG frames differ in size")
    if out is None or pictures[0].shape != out.shape[1:]:
        return np.stack(pictures), times_s
    out[len(pictures) :] = 0
    return out[: len(pictures)], times_s
