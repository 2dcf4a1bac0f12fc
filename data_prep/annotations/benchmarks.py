"""Reads the clips of one split of a benchmark from its published annotation files.

The file names and layouts are those of the publications, and for lists of video ids those that
CLIP4Clip and its successors use. A split is a list of video ids and a file of captions, or a file
of clips. A clip's video_id is the published id; its key is that id as `clip_keys.key_of` spells it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fsspec.core import url_to_fs

from tvr.data_prep.annotations.benchmark_clips import WHOLE, PublishedClip
from tvr.data_prep.annotations.benchmark_files import read_ids
from tvr.data_prep.annotations.benchmark_splits import (
    BENCHMARKS,
    BenchmarkSplit,
    ClipSplit,
    Dataset,
)
from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_of, key_rule
from tvr.data_prep.annotations.video_lookup import VideoFiles
from tvr.data_prep.dataset.manifest import join_url
from tvr.data_prep.records import Clip, RefusedRow

__all__ = ["BENCHMARKS", "Dataset", "Selection", "read_benchmark"]

MAX_LISTED_IDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The clips of a split in list order, and the differences from the published split."""

    name: str
    published: int | None
    clips: tuple[Clip, ...]
    """All clips; packing refuses clips without a file as missing_file."""
    without_file: tuple[str, ...]
    """Ids of clips without a video file."""
    without_captions: tuple[str, ...]
    """Listed ids without captions; they are not clips."""
    not_listed: tuple[str, ...]
    """Captioned ids that are not in the list."""
    refused: tuple[RefusedRow, ...] = ()
    """Rows that are no clip."""
    unit: str = "videos"

    def summary(self) -> list[str]:
        """Returns lines with the split's size, the published size and each difference."""
        size, published = len(self.clips), self.published
        comparison = "" if published is None else f", published {published:,}"
        if published is not None:
            comparison += f" ({size - published:+,})"
        comparison = ", as published" if size == published else comparison
        lines = [f"{self.name}: {size:,} {self.unit}{comparison}"]
        for title, ids in (
            ("rows that are no clip", [row.origin for row in self.refused]),
            ("without a video file", self.without_file),
            ("listed without captions, left out", self.without_captions),
            ("captioned but not in this list, left out", self.not_listed),
        ):
            if ids:
                more = (
                    f" and {len(ids) - MAX_LISTED_IDS:,} more" if len(ids) > MAX_LISTED_IDS else ""
                )
                lines.append(f"{title}: {len(ids):,} ({', '.join(ids[:MAX_LISTED_IDS])}{more})")
        return lines


def read_benchmark(
    dataset: Dataset, split: str | None, *, annotations: str, videos: str
) -> Selection:
    """Reads a split from its folders of annotations and videos (paths or fsspec URLs).

    Raises:
        FileNotFoundError: a folder or an annotation file does not exist.
        ValueError: the dataset or split is unknown, a file is malformed, or two ids have the
            same key.
    """
    source = _split(dataset, split)
    if isinstance(source, ClipSplit):
        return _read_clips(source, f"{dataset} {split}", annotations, videos)
    list_url = _first_existing(annotations, source.lists)
    captions_url = _first_existing(annotations, (source.captions,))
    origins, captions = read_ids(list_url), source.read(captions_url)
    files = VideoFiles(videos)
    clips: dict[str, Clip] = {}
    without_file = []
    for video_id, origin in origins.items():
        if video_id not in captions:
            continue
        key = key_of(video_id)
        if not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"{origin}: video {video_id!r}: {key_rule(key)}")
        if key in clips:
            raise ValueError(
                f"{origin}: video {video_id!r} and {clips[key].video_id!r} of {clips[key].origin}"
                f" have the same key {key!r}"
            )
        file = files.find(video_id) or files.find(video_id.removeprefix(source.file_prefix))
        if file is None:
            without_file.append(video_id)
        clips[key] = Clip(
            key=key,
            video=file or files.expected(video_id),
            captions=tuple(captions[video_id]),
            video_id=video_id,
            origin=origin,
        )
    return Selection(
        name=f"{dataset} {split}",
        published=source.published,
        clips=tuple(clips.values()),
        without_file=tuple(without_file),
        without_captions=tuple(name for name in origins if name not in captions),
        not_listed=tuple(name for name in captions if name not in origins),
    )


def _read_clips(source: ClipSplit, name: str, annotations: str, videos: str) -> Selection:
    """Reads a file of clips, and looks up their videos."""
    url, files = _first_existing(annotations, (source.file,)), VideoFiles(videos)
    listed = read_ids(_first_existing(annotations, source.lists)) if source.lists else None
    clips: dict[str, Clip] = {}
    refused, without_file, not_listed = [], [], []
    for row in source.read(url):
        if isinstance(row, RefusedRow):
            refused.append(row)
            continue
        if listed is not None and row.name not in listed:
            not_listed.append(row.name)
            continue
        try:
            clip, is_there = _clip(row, files)
        except ValueError as error:
            refused.append(RefusedRow(origin=row.origin, detail=f"{row.origin}: {error}"))
            continue
        first = clips.get(row.name)
        if first is not None:  # another sentence of the clip
            clips[row.name] = replace(first, captions=(*first.captions, *clip.captions))
            continue
        clips[row.name] = clip
        if not is_there:
            without_file.append(row.name)
    return Selection(
        name=name,
        published=source.published,
        clips=tuple(clips.values()),
        without_file=tuple(without_file),
        without_captions=tuple(name for name in listed or () if name not in clips),
        not_listed=tuple(not_listed),
        refused=tuple(refused),
        unit="clips",
    )


def _clip(row: PublishedClip, files: VideoFiles) -> tuple[Clip, bool]:
    """Returns the clip of a row, and whether its video is there.

    Raises:
        ValueError: the name leaves the folder, or several files have it.
    """
    found = ((files.find(name), span) for name, span in row.files)
    video, span = next(((file, span) for file, span in found if file is not None), (None, WHOLE))
    clip = Clip(
        key=key_of(f"{row.name}.mp4"),
        video=video or files.expected(row.files[0][0]),
        captions=row.captions,
        video_id=row.name,
        origin=row.origin,
        start_s=span[0],
        end_s=span[1],
    )
    return clip, video is not None


def _split(dataset: Dataset, split: str | None) -> BenchmarkSplit | ClipSplit:
    if dataset not in BENCHMARKS:
        raise ValueError(f"dataset={dataset!r} must be one of {', '.join(BENCHMARKS)}")
    if split not in BENCHMARKS[dataset]:
        raise ValueError(
            f"split={split!r} of dataset {dataset} must be one of {', '.join(BENCHMARKS[dataset])};"
            " set it with --split"
        )
    return BENCHMARKS[dataset][split]


def _first_existing(folder: str, names: tuple[str, ...]) -> str:
    fs, root = url_to_fs(folder)
    for name in names:
        if fs.exists(join_url(root, name)):
            return join_url(folder, name)
    raise FileNotFoundError(f"annotations={folder!r}: no file {' or '.join(names)} in that folder")
