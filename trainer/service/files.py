"""Files that the service reads: those of the index, and the videos that it names.

No file is mapped into memory: reading a page of a mapped file that was cut kills the process
(SIGBUS). A search that reads a file that was cut or replaced fails, and `/healthz` names it.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tvr.data_prep.records import BadSample, ShardCorrupt
from tvr.data_prep.video.images import encode_jpeg
from tvr.trainer.service.problems import CutWhileSent, Refusal
from tvr.trainer.service.records import FoundVideo, SearchIndex

VALID_S = 0.05
"""A check holds so long, which bounds its cost when many ask for it: a file takes 2 us."""
CHUNK_BYTES = 1 << 16
THUMBNAIL_QUALITY = 85
# RFC 9110, 14.2: other forms, such as several ranges, may be ignored, and the whole is sent.
ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
HEADERS = {"Accept-Ranges": "bytes", "Cache-Control": "no-cache"}


class IndexFiles:
    """The files of some folders, with the sizes they have when this is created."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._files: dict[str, tuple[int, int, int]] = {}
        for folder in folders:
            for root, _, names in os.walk(folder):
                for name in names:
                    path = os.path.join(root, name)
                    try:
                        found = os.stat(path)
                    except FileNotFoundError:
                        continue  # a builder's temporary file, or a link that leads nowhere
                    self._files[path] = (found.st_dev, found.st_ino, found.st_size)
        self._lock = threading.Lock()
        self._checked_at = -VALID_S

    def __len__(self) -> int:
        return len(self._files)

    def check(self) -> None:
        """Compares the sizes.

        Raises:
            ShardCorrupt: a file has become shorter; names it and both sizes.
        """
        with self._lock:
            if time.monotonic() - self._checked_at < VALID_S:
                return
            for path, (device, inode, size) in self._files.items():
                try:
                    found = os.stat(path)
                except FileNotFoundError:
                    continue  # a builder's temporary file, or an index that was removed
                is_same = (found.st_dev, found.st_ino) == (device, inode)
                if is_same and found.st_size < size:
                    raise ShardCorrupt(
                        f"{path} has {found.st_size} bytes; it had {size} when the service started"
                    )
            self._checked_at = time.monotonic()


class Thumbnails:
    """Pictures of videos; those that were asked for last stay in memory."""

    def __init__(self, index: SearchIndex, most: int) -> None:
        self._index = index
        self.jpeg = lru_cache(most)(self._encoded)
        """JPEG of the frame in the middle, of those that the model saw; by the video's row."""

    def _encoded(self, video: int) -> bytes:
        frames = self._index.frames(video)
        return encode_jpeg(frames[len(frames) // 2], THUMBNAIL_QUALITY)


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
        return frozenset(hit.data for hit in hits if self._is_picture.get(hit.data))


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
    file = open(media.path, "rb", opener=_open_regular)
    return file, os.fstat(file.fileno()).st_size, media.content_type


def _open_regular(path: str, flags: int) -> int:
    # Without O_NONBLOCK a FIFO in the place of the file would hold the thread.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{path} is no file")
    return descriptor


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
    return _FileResponse(content, first, end, status, headers, content_type)


class _FileResponse(StreamingResponse):
    """A part of an open file, which is closed when the answer ends or the client hangs up."""

    def __init__(
        self,
        file: BinaryIO,
        first: int,
        end: int,
        status: int,
        headers: dict[str, str],
        content_type: str,
    ) -> None:
        super().__init__(_chunks(file, first, end), status, headers, content_type)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def _chunks(file: BinaryIO, first: int, end: int) -> Iterator[bytes]:
    file.seek(first)
    while first < end:
        chunk = file.read(min(CHUNK_BYTES, end - first))
        if not chunk:
            raise CutWhileSent(f"{file.name} ended at byte {first} of {end} while it was sent")
        first += len(chunk)
        yield chunk
