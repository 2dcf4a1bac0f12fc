"""Reads clips from annotation files.

JSONL has one video or one caption a line; the other formats may have several rows a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tvr.data_prep.annotations.rows import Draft, annotation_rows, file_format
from tvr.data_prep.annotations.video_lookup import VideoFiles
from tvr.data_prep.records import Clip

LOCAL_PROTOCOLS = {"file", "local"}


def read_annotations(url: str, *, videos: str | None = None) -> list[Clip]:
    """Reads clips in file order from a .jsonl, .json, .csv, .tsv (all also .gz) or .parquet file.

    - JSONL: {"video": ..., "captions": [...] or "caption": "...", optional "key", "video_id",
      "start", "end"}. Or {"clip_name": ..., "caption": ...}: the video is looked up by that name
      in `videos`, and the lines of one name are merged in file order.
    - JSON: the same objects in a list, or in an object; see `json_items`.
    - CSV and TSV: columns video, caption, optional key, video_id, start, end; see `columns`.
    - Parquet: the columns of CSV; a column captions of lists may replace or complement caption.

    In all but JSONL, rows of one clip are merged in file order. Where captions may lie is said in
    `caption_fields`.

    "start" and "end" are seconds and cut the clip out of its video. The default of "key" is the
    video's file name, for a cut NAME_START_END with milliseconds; the default of "video_id" is the
    key. Empty captions are kept; packing drops and counts them.

    Args:
        url: Path or fsspec URL of the annotation file.
        videos: Folder of relative video paths; default: the folder of the annotation file.

    Raises:
        FileNotFoundError: the annotation file, or the folder in which to look up names, does not
            exist.
        ImportError: the file is Parquet and pyarrow is not installed.
        ValueError: the file is malformed (the message has file:line), has no clips, has a duplicate
            key, or is remote and names a video on this machine.
    """
    clips: dict[str, tuple[Clip, bool]] = {}
    for clip, may_continue in annotated_clips(url, videos=videos):
        if clip.key in clips:
            first, is_open = clips[clip.key]
            clip = merge_clips(first, clip, may_continue=may_continue and is_open)
        clips[clip.key] = clip, may_continue
    return [clip for clip, _ in clips.values()]


def annotated_clips(
    url: str, *, videos: str | None = None, on_lookup: Callable[[], object] = lambda: None
) -> Iterator[tuple[Clip, bool]]:
    """Yields the clips of an annotation file in file order, without holding them.

    Rows that follow each other and belong to one clip are merged. Rows of one clip that lie apart
    are yielded apart; `merge_clips` joins them.

    Args:
        on_lookup: Called when names are looked up in the folder of videos.

    Yields:
        A clip, and whether it may continue one, or be continued: by rows of CSV and Parquet files,
        and by those that name a video to look up.

    Raises as `read_annotations`, except for keys that occur again.
    """
    base = videos if videos is not None else _parent(url)
    merge, local = file_format(url) != "jsonl", is_local(url)
    files: VideoFiles | None = None
    current: Draft | None = None
    for row in annotation_rows(url):
        if row.by_name and files is None:
            files = VideoFiles(base)
            on_lookup()
        if not local:
            _check_remote(row, url)
        if current is not None and _continues(row, current, merge):
            current.captions.extend(row.captions)
            continue
        if current is not None:
            yield _clip(current, base, files), merge or current.by_name
        current = row
    if current is None:
        raise ValueError(
            f"{url}: empty annotation without clips; expected one JSON object or CSV row a clip"
        )
    yield _clip(current, base, files), merge or current.by_name


def merge_clips(first: Clip, clip: Clip, *, may_continue: bool) -> Clip:
    """Returns the clip of two rows with the same key.

    Args:
        may_continue: Both rows may be one of several of a clip, see `annotated_clips`.

    Raises:
        ValueError: the rows are two clips, or disagree.
    """
    where, first_at = clip.origin or clip.video, first.origin or first.video
    if not may_continue or (first.video, first.span) != (clip.video, clip.span):
        raise ValueError(
            f"{where}: duplicate key {clip.key!r}, first at {first_at}; give each clip"
            ' its own "key" (the default is the video\'s file name)'
        )
    if first.video_id != clip.video_id:
        raise ValueError(
            f"{where}: video_id={clip.video_id!r} differs from {first.video_id!r} of the same"
            f" video at {first_at}"
        )
    return replace(first, captions=(*first.captions, *clip.captions))


def _continues(row: Draft, current: Draft, merge: bool) -> bool:
    return (
        (merge or row.by_name)
        and row.key == current.key
        and row.source == current.source
        and row.video_id == current.video_id
    )


def _clip(draft: Draft, base: str, files: VideoFiles | None) -> Clip:
    if draft.by_name:
        assert files is not None
        try:
            video = files.find(draft.video) or files.expected(draft.video)
        except ValueError as error:
            raise ValueError(f"{draft.origin}: {error}") from error
    else:
        video = _resolve(draft.video, base)
    return Clip(
        key=draft.key,
        video=video,
        captions=tuple(draft.captions),
        video_id=draft.video_id,
        origin=draft.origin,
        start_s=draft.start_s,
        end_s=draft.end_s,
    )


def is_local(url: str) -> bool:
    """True if a path or URL, or a part of a chained URL, names a file of this machine."""
    parts = [part.partition("://") for part in url.split("::")]
    if len(parts) == 1 and not parts[0][1]:
        return True
    return any(
        protocol in LOCAL_PROTOCOLS if separator else "/" in protocol
        for protocol, separator, _ in parts
    )


def _check_remote(draft: Draft, url: str) -> None:
    """A file from elsewhere may not pack files of this machine that the user did not name."""
    video = draft.video
    is_path = "://" not in video and "::" not in video
    if ".." in video.split("/") or (video.startswith("/") if is_path else is_local(video)):
        raise ValueError(
            f"{draft.origin}: video={video!r} must be a URL, or a path without .. in the folder of"
            f" videos, because the annotation file {url} is not on this machine; copy the"
            " annotation file here to read such videos"
        )


def _resolve(video: str, base: str) -> str:
    if "://" in video or video.startswith("/") or not base:
        return video
    return f"{base.rstrip('/')}/{video}"


def _parent(url: str) -> str:
    """Returns the folder of a file at a path or URL; "" for the current folder."""
    folder, slash, _ = url.rpartition("/")
    return folder + "/" if slash else ""
