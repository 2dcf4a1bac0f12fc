"""Reads clips from annotation files.

JSONL has one video or one caption a line; the other formats may have several rows a video.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvr.data_prep.annotations.clip_lines import SourceRow
from tvr.data_prep.annotations.rows import Draft, annotation_rows, file_format, refused_row
from tvr.data_prep.annotations.same_key import decide_rows, merge_clips
from tvr.data_prep.annotations.video_lookup import VideoFiles
from tvr.data_prep.records import Clip, RefusedRow
from tvr.data_prep.storage.storage import is_chained

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

    The file must be right as a whole: `tvr pack` leaves bad rows out, this function does not.

    Args:
        url: Path or fsspec URL of the annotation file.
        videos: Folder of relative video paths; default: the folder of the annotation file.

    Raises:
        FileNotFoundError: the annotation file, or the folder in which to look up names, does not
            exist.
        ImportError: the file is Parquet and pyarrow is not installed.
        ValueError: the file or a row of it is malformed (the message has file:line), it has no
            clips, two rows give the same key to two clips, or the file is remote and names a video
            on this machine.
    """
    rows: list[SourceRow] = []
    for row in annotated_clips(url, videos=videos):
        if isinstance(row, RefusedRow):
            raise ValueError(row.detail)
        rows.append(row)
    while not _rename(rows):
        pass
    clips: dict[str, Clip] = {}
    for row in rows:
        clip = row.clip
        first = clips.get(clip.key)
        clips[clip.key] = merge_clips(first, clip, may_continue=True) if first else clip
    return list(clips.values())


def _rename(rows: list[SourceRow]) -> bool:
    """Gives rows keys of their own; returns False if it did. Raises ValueError as decided."""
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row.clip.key, []).append(number)
    refused: list[tuple[int, str]] = []
    is_done = True
    for same in numbers.values():
        if len(same) == 1:
            continue
        owner = next((number for number in same if not rows[number].key_hash), same[0])
        for decision in list(decide_rows(same, rows[owner], rows.__getitem__)):
            if decision.refusal is not None:
                refused.append((decision.row, decision.refusal.detail))
            elif decision.kind == "renamed":
                rows[decision.row] = rows[decision.row].renamed()
                is_done = False
    if refused:
        raise ValueError(min(refused)[1])
    return is_done


def annotated_clips(url: str, *, videos: str | None = None) -> Iterator[SourceRow | RefusedRow]:
    """Yields the clips of an annotation file in file order, without holding them.

    Rows that follow each other and belong to one clip are merged. Rows of one key that lie apart
    are yielded apart; `same_key` says what they are. A row that is no clip is yielded as that.

    Raises as `read_annotations` for a file that is wrong as a whole.
    """
    base = videos if videos is not None else _parent(url)
    merge, local = file_format(url) != "jsonl", is_local(url)
    files: VideoFiles | None = None
    current: Draft | None = None
    is_empty = True
    for row in annotation_rows(url):
        is_empty = False
        if isinstance(row, RefusedRow):
            yield row
            continue
        if row.by_name and files is None:
            files = VideoFiles(base)
        if not local and (problem := _remote_problem(row, url)):
            yield refused_row(row.origin, problem)
            continue
        if current is not None and _continues(row, current, merge):
            current.captions.extend(row.captions)
            continue
        if current is not None:
            yield _source_row(current, base, files, merge)
        current = row
    if is_empty:
        raise ValueError(
            f"{url}: empty annotation without clips; expected one JSON object or CSV row a clip"
        )
    if current is not None:
        yield _source_row(current, base, files, merge)


def _continues(row: Draft, current: Draft, merge: bool) -> bool:
    return (
        (merge or row.by_name)
        and row.key == current.key
        and row.source == current.source
        and row.video_id == current.video_id
    )


def _source_row(
    draft: Draft, base: str, files: VideoFiles | None, merge: bool
) -> SourceRow | RefusedRow:
    video = draft.video
    if draft.by_name:
        assert files is not None
        try:
            video = files.find(video) or files.expected(video)
        except ValueError as error:
            return refused_row(draft.origin, f"{draft.origin}: {error}")
    else:
        video = _resolve(video, base)
    clip = Clip(
        key=draft.key,
        video=video,
        captions=tuple(draft.captions),
        video_id=draft.video_id,
        origin=draft.origin,
        start_s=draft.start_s,
        end_s=draft.end_s,
    )
    return SourceRow(
        clip=clip,
        may_continue=merge or draft.by_name,
        key_hash=draft.key_hash,
        has_video_id=draft.has_video_id,
        by_name=draft.by_name,
    )


def is_local(url: str) -> bool:
    """True if a path or URL, or a part of a chained URL, names a file of this machine."""
    if "://" not in url:
        return True
    parts = url.split("::") if is_chained(url) else [url]
    return any(
        protocol in LOCAL_PROTOCOLS if separator else "/" in protocol
        for protocol, separator, _ in (part.partition("://") for part in parts)
    )


def _remote_problem(draft: Draft, url: str) -> str:
    """A file from elsewhere may not pack files of this machine that the user did not name."""
    video = draft.video
    is_path = "://" not in video
    if ".." in video.split("/") or (video.startswith("/") if is_path else is_local(video)):
        return (
            f"{draft.origin}: video={video!r:.200} must be a URL, or a path without .. in the"
            f" folder of videos, because the annotation file {url} is not on this machine; copy"
            " the annotation file here to read such videos"
        )
    return ""


def _resolve(video: str, base: str) -> str:
    if "://" in video or video.startswith("/") or not base:
        return video
    return f"{base.rstrip('/')}/{video}"


def _parent(url: str) -> str:
    """Returns the folder of a file at a path or URL; "" for the current folder."""
    folder, slash, _ = url.rpartition("/")
    return folder + "/" if slash else ""
