"""Videos and pictures of results, in answer to requests with and without a byte range."""

from __future__ import annotations

import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from starlette.responses import Response, StreamingResponse

from tvr.data_prep.records import BadSample, ShardCorrupt
from tvr.data_prep.video.images import encode_jpeg
from tvr.trainer.service.problems import Refusal
from tvr.trainer.service.records import FoundVideo, SearchIndex

CHUNK_BYTES = 1 << 16
THUMBNAIL_QUALITY = 85
# RFC 9110, 14.2: other forms, such as several ranges, may be ignored, and the whole is sent.
ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
HEADERS = {"Accept-Ranges": "bytes", "Cache-Control": "no-cache"}


class Thumbnails:
    """Pictures of videos; those that were asked for last stay in memory."""

    def __init__(self, index: SearchIndex, most: int) -> None:
        self._index, self._most = index, most
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def jpeg(self, video: int) -> bytes:
        """JPEG of the frame in the middle, of those that the model saw."""
        content = self._kept.get(video)
        if content is None:
            frames = self._index.frames(video)
            content = encode_jpeg(frames[len(frames) // 2], THUMBNAIL_QUALITY)
        # Each of these is one step for the interpreter, so threads need no lock.
        self._kept[video] = content
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return content


class Layouts:
    """Knows which data sets hold pictures instead of videos, from the first video of each."""

    def __init__(self, index: SearchIndex) -> None:
        self._index = index
        self._is_picture: dict[str, bool] = {}

    def pictures(self, hits: Sequence[FoundVideo]) -> frozenset[str]:
        """URLs of the data sets whose videos a page shows as moving pictures."""
        for hit in hits:
            if hit.data not in self._is_picture:
                try:
                    kind = self._index.media(hit.row).content_type
                except (BadSample, ShardCorrupt, OSError):
                    continue  # the page shows the others; this one answers for itself
                self._is_picture[hit.data] = kind.startswith("image/")
        return frozenset(data for data, is_picture in self._is_picture.items() if is_picture)


def open_video(index: SearchIndex, video: int) -> tuple[BinaryIO | bytes, int, str]:
    """Opens a video of the index.

    Returns:
        An open file or the content, the number of bytes, and the content type.

    Raises:
        FileNotFoundError: the file is gone, or is no regular file.
    """
    media = index.media(video)
    if media.path is None:
        content = media.bytes or b""
        return content, len(content), media.content_type
    # Without O_NONBLOCK a FIFO in the place of the file would hold the thread.
    descriptor = os.open(media.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{media.path.name} is no file")
    file = os.fdopen(descriptor, "rb")
    return file, found.st_size, media.content_type


def ranged_response(
    content: BinaryIO | bytes, size: int, content_type: str, wanted: str | None
) -> Response:
    """Answers with the whole (200), or with the range of a Range header (206).

    Raises:
        Refusal: the range lies outside (416).
    """
    found = ONE_RANGE.fullmatch(wanted.strip()) if wanted else None
    first, end, headers = 0, size, dict(HEADERS)
    if found is not None and (found[1] or found[2]):
        if found[1]:
            first = int(found[1])
            end = min(size, int(found[2]) + 1) if found[2] else size
        else:
            first = max(0, size - int(found[2]))
        if first >= end:
            if not isinstance(content, bytes):
                content.close()
            raise Refusal(
                416,
                "the range lies outside of the video",
                value=wanted,
                allowed=f"bytes 0 to {size - 1}",
                headers={"Content-Range": f"bytes */{size}"},
            )
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    else:
        found = None
    status = 200 if found is None else 206
    if isinstance(content, bytes):
        return Response(content[first:end], status, headers, content_type)
    headers["Content-Length"] = str(end - first)
    return StreamingResponse(_chunks(content, first, end), status, headers, content_type)


def _chunks(file: BinaryIO, first: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        while first < end and (chunk := file.read(min(CHUNK_BYTES, end - first))):
            first += len(chunk)
            yield chunk
