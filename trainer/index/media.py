"""The videos of an index: their frames as the model saw them, and files that a browser can play.

A feature set names the folder or the data set of its videos, and may come from anyone. So only
video files are opened, only below that folder, and only samples whose key is the stored one.
"""

from __future__ import annotations

import io
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tvr.data_prep.annotations.video_lookup import SUFFIXES
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.frame_sampling import FrameSpacing
from tvr.data_prep.video.images import fit_square
from tvr.trainer.features.feature_set import DataSource, FeatureSet

CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
    ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg",
    ".wmv": "video/x-ms-wmv",
    ".3gp": "video/3gpp",
    ".3g2": "video/3gpp2",
    ".mts": "video/mp2t",
    ".flv": "video/x-flv",
}
MS_PER_PICTURE = 500
MAX_FRAME_BYTES = 1 << 30
"""Of the frames of a video in memory; 64 frames of 448 pixels take 39 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """A video to show: a file, or bytes."""

    path: Path | None
    """A file of this machine; None for bytes."""
    bytes: bytes | None
    content_type: str
    """video/..., or image/webp: the moving pictures of a data set that stores frames only."""
    start_s: float
    end_s: float
    """The cut within it; not a number: the end of the file."""


class StoredVideos:
    """Reads the videos of a feature set; safe to use from several threads."""

    def __init__(self, features: FeatureSet) -> None:
        self._features = features
        self._readers: dict[str, SampleReader] = {}
        self._lock = threading.Lock()
        settings = features.info.settings
        self._num_frames = _size(features, "num_frames", 1024)
        self._side = _size(features, "image_size", 1 << 13)
        size = 3 * self._num_frames * self._side**2
        if size > MAX_FRAME_BYTES:
            raise ShardCorrupt(
                f"{features.folder}: settings num_frames={self._num_frames},"
                f" image_size={self._side}: the frames of a video would take {size} bytes; allowed"
                f" are {MAX_FRAME_BYTES}"
            )
        spacing = settings.get("frame_spacing")
        self._spacing: FrameSpacing = "index" if spacing == "index" else "time"

    def frames(self, video: int, decoder: Decoder = "pyav") -> np.ndarray:
        """Frames (F, H, W, 3) uint8 of a video, as the model saw them.

        Raises:
            BadSample: the video cannot be read.
            ShardCorrupt, ValueError, OSError: as `media`.
        """
        data, found = self._features.source(video)
        key = self._features.keys[video]
        if data.kind == "packed":
            with self._lock:  # a reader serves one caller at a time
                return self._reader(data, found.row, key).read(found.row).frames
        frames, _ = frame_sampler(decoder)(
            str(video_file(Path(data.url), found.file)),
            self._num_frames,
            span=_span(found.start_s, found.end_s),
            key=key,
            finish=lambda picture: fit_square(picture[None], self._side)[0],
            spacing=self._spacing,
        )
        return frames

    def media(self, video: int) -> Media:
        """A video to show.

        Raises:
            BadSample: the sample cannot be read.
            ShardCorrupt: the file lies outside its folder or is no video, or the data set holds
                another sample at this row.
            FileNotFoundError, OSError: the file or the data set is gone.
        """
        data, found = self._features.source(video)
        if data.kind == "videos":
            path = video_file(Path(data.url), found.file)
            kind = CONTENT_TYPES[path.suffix.lower()]
            return Media(
                path=path,
                bytes=None,
                content_type=kind,
                start_s=found.start_s,
                end_s=found.end_s,
            )
        with self._lock:
            reader = self._reader(data, found.row, self._features.keys[video])
            members = reader.members(found.row)
            content = members.get("mp4")
            frames = reader.read(found.row).frames if content is None else None
        if content is not None:
            kind = _content_type(content)
        else:
            assert frames is not None
            content, kind = _moving_picture(frames), "image/webp"
        return Media(path=None, bytes=content, content_type=kind, start_s=0.0, end_s=float("nan"))

    def _reader(self, data: DataSource, row: int, key: str) -> SampleReader:
        reader = self._readers.get(data.name)
        if reader is None:
            reader = self._readers[data.name] = SampleReader(
                data.url,
                num_frames=self._num_frames,
                image_size=self._side,
                frame_spacing=self._spacing,
            )
        if not 0 <= row < len(reader) or reader.key(row) != key:
            raise ShardCorrupt(
                f"{data.url}: row {row} is not {key} any more: the data set differs from the one"
                " that was embedded"
            )
        return reader


def video_file(folder: Path, file: str) -> Path:
    """Path of a video file below a folder.

    Raises:
        ShardCorrupt: it is no video file, or it lies elsewhere, also by a symbolic link.
        FileNotFoundError: there is no such file.
    """
    root = folder.resolve()
    # `resolve` refuses a null byte with another error.
    path = root if "\0" in file else (folder / file).resolve()
    if root not in path.parents or path.suffix.lower() not in SUFFIXES:
        raise ShardCorrupt(f"{file!r:.200} is no video file in {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the video is gone; embed the folder again")
    return path


def _size(features: FeatureSet, name: str, most: int) -> int:
    value = features.info.settings.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise ShardCorrupt(
            f"{features.folder}: setting {name}={value!r:.100} must be a whole number from 1 to"
            f" {most}"
        )
    return value


def _span(start_s: float, end_s: float) -> tuple[float, float | None] | None:
    end = None if not math.isfinite(end_s) else end_s
    return None if start_s == 0 and end is None else (start_s, end)


def _content_type(content: bytes) -> str:
    """By the first bytes: an adopted data set may hold any container under the name mp4."""
    if content[:4] == b"\x1a\x45\xdf\xa3":
        return "video/webm" if b"webm" in content[:64] else "video/x-matroska"
    if content[:4] == b"RIFF":
        return "video/x-msvideo"
    return "video/mp4"


def _moving_picture(frames: np.ndarray) -> bytes:
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(
        out,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=MS_PER_PICTURE,
        loop=0,
    )
    return out.getvalue()
