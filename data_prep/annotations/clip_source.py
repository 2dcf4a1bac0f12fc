"""Where the clips of a packing come from: a list in memory, or an annotation file.

A source is read once, by the task that makes the plan. Its identity tells the other tasks whether
a stored plan is of the same file, so that they need not read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from tvr.data_prep.annotations.clip_lines import SourceRow
from tvr.data_prep.annotations.read import annotated_clips
from tvr.data_prep.records import Clip, RefusedRow
from tvr.data_prep.storage.storage import file_system
from tvr.data_prep.storage.storage_errors import is_storage_error

# What file systems call a value that changes with a file's content, best first.
VERSION_FIELDS = ("ETag", "etag", "md5Hash", "md5", "generation", "mtime", "LastModified")


class ClipSource(Protocol):
    """Clips to pack."""

    def rows(self) -> Iterator[SourceRow | RefusedRow]:
        """Yields clips, and rows that are none."""
        ...

    def identity(self) -> dict[str, Any] | None:
        """Names the source and its version; None if equal names do not mean equal clips."""
        ...


class ClipList:
    """Clips in memory, and rows from which none could be made."""

    def __init__(self, clips: Iterable[Clip | RefusedRow]) -> None:
        self._clips = clips

    def rows(self) -> Iterator[SourceRow | RefusedRow]:
        """See `ClipSource`."""
        for clip in self._clips:
            yield clip if isinstance(clip, RefusedRow) else SourceRow(clip=clip)

    def identity(self) -> dict[str, Any] | None:
        """See `ClipSource`: only the clips themselves tell what they are."""
        return None


class AnnotationFile:
    """The clips of an annotation file, see `read_annotations`.

    Args:
        url: Path or fsspec URL.
        videos: Folder of relative video paths; None means the folder of the file.
    """

    def __init__(self, url: str, videos: str | None = None) -> None:
        self._url = url
        self._videos = videos
        self._looks_up_names = False

    def rows(self) -> Iterator[SourceRow | RefusedRow]:
        """See `ClipSource`."""
        for row in annotated_clips(self._url, videos=self._videos):
            self._looks_up_names |= isinstance(row, SourceRow) and row.by_name
            yield row

    def identity(self) -> dict[str, Any] | None:
        """See `ClipSource`: the path, the size and the version of the file.

        None after `rows` looked up names in a folder, whose files may have changed.
        """
        version = _version(self._url)
        if version is None or self._looks_up_names:
            return None
        return {"annotations": self._url, "videos": self._videos, **version}


def _version(url: str) -> dict[str, Any] | None:
    try:
        fs, path = file_system(url)
        info = fs.info(path)
    except Exception as error:
        if not is_storage_error(error):
            raise
        return None  # reading the file gives the error that names it
    for name in VERSION_FIELDS:
        if info.get(name):
            return {"size": info.get("size"), "version": f"{name} {info[name]}"}
    return None
