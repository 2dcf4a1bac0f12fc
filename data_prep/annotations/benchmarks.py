"""Reads the clips of one split of a benchmark from its published annotation files.

The file names and layouts are those of the publications, and for lists of video ids those that
CLIP4Clip and its successors use. A split is a list of video ids and a file of captions, or a file
of clips. A clip's video_id is the published id; its key is that id as
`clip_keys.key_of` spells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tvr.data_prep.annotations.benchmark_clips import WHOLE, PublishedClip
from tvr.data_prep.annotations.benchmark_files import (
    Refusals,
    activitynet_captions,
    didemo_captions,
    jsfusion_captions,
    msrvtt_captions,
    msvd_captions,
    read_ids,
)
from tvr.data_prep.annotations.benchmark_splits import CLIP_BENCHMARKS, ClipSplit
from tvr.data_prep.annotations.clip_keys import hashed_key, key_of, name_hash
from tvr.data_prep.annotations.text_files import line_problem
from tvr.data_prep.annotations.video_lookup import VideoFiles
from tvr.data_prep.dataset.manifest import join_url
from tvr.data_prep.records import VIDEO_ID_RULE, Clip, RefusedRow, is_video_id
from tvr.data_prep.storage.storage import file_system

Dataset = Literal["msrvtt", "msvd", "didemo", "activitynet", "vatex", "lsmdc", "youcook2", "webvid"]
MAX_LISTED_IDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSplit:
    """The files of a split."""

    published: int
    """Number of videos that retrieval papers report."""
    lists: tuple[str, ...]
    """Alternative files of video ids; the first one that exists is read."""
    captions: str
    """File of captions; it may also hold other splits."""
    read: Callable[[str, Refusals], dict[str, list[str]]]
    """Reads `captions` from a URL and returns the captions by video id; notes refused rows."""
    file_prefix: str = ""
    """Prefix of the ids that some collections omit from the file names."""


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
    """Rows of this split that are wrong; packing counts them as bad."""
    unit: str = "videos"

    def summary(self) -> list[str]:
        """Returns lines with the split's size, the published size and each difference."""
        size, published = len(self.clips), self.published
        comparison = ", as published" if size == published else ""
        if published not in (None, size):
            comparison = f", published {published:,} ({size - published:+,})"
        lines = [f"{self.name}: {size:,} {self.unit}{comparison}"]
        for title, ids in (
            ("without a video file", self.without_file),
            ("listed without captions, left out", self.without_captions),
            ("captioned but not in this list, left out", self.not_listed),
            ("bad rows", [row.origin for row in self.refused]),
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
        ValueError: the dataset or split is unknown, or a file is malformed as a whole.
    """
    source = _split(dataset, split)
    if isinstance(source, ClipSplit):
        return _read_clips(source, f"{dataset} {split}", annotations, videos)
    list_url = _first_existing(annotations, source.lists)
    captions_url = _first_existing(annotations, (source.captions,))
    refusals = Refusals()
    origins = read_ids(list_url, refusals)
    captions = source.read(captions_url, refusals)
    files = VideoFiles(videos)
    clips: dict[str, Clip] = {}
    without_file = []
    for video_id, origin in origins.items():
        if video_id not in captions:
            continue
        key = key_of(video_id)
        if key in clips:
            key = hashed_key(key, name_hash(video_id))
        try:
            file = files.find(video_id) or files.find(video_id.removeprefix(source.file_prefix))
        except ValueError as error:
            refusals.note(origin, f"{origin}: {error}")
            continue
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
        refused=refusals.of(origins),
    )


def _read_clips(source: ClipSplit, name: str, annotations: str, videos: str) -> Selection:
    """Reads a file of clips, and looks up their videos."""
    url, files = _first_existing(annotations, (source.file,)), VideoFiles(videos)
    refusals = Refusals()
    listed = None
    if source.lists:
        listed = read_ids(_first_existing(annotations, source.lists), refusals)
    clips: dict[str, Clip] = {}
    keys: set[str] = set()
    without_file, not_listed = [], []
    for row in source.read(url):
        if isinstance(row, RefusedRow):
            refusals.rows.append(row)
            continue
        if listed is not None and row.name not in listed:
            not_listed.append(row.name)
            continue
        try:
            clip, is_there = _clip(row, files)
        except ValueError as error:
            refusals.note(row.origin, f"{row.origin}: {error}")
            continue
        first = clips.get(row.name)
        if first is not None:  # another sentence of the clip
            clips[row.name] = replace(first, captions=(*first.captions, *clip.captions))
            continue
        if clip.key in keys:
            clip = replace(clip, key=hashed_key(clip.key, name_hash(row.name)))
        keys.add(clip.key)
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
        refused=refusals.of(()),
        unit="clips",
    )


def _clip(row: PublishedClip, files: VideoFiles) -> tuple[Clip, bool]:
    """Returns the clip of a row, and whether its video is there.

    Raises:
        ValueError: the name leaves the folder, several files have it, or a text is none that a
            file can store.
    """
    if not is_video_id(row.name):
        raise ValueError(f"id {row.name!r:.200} must be {VIDEO_ID_RULE}")
    for text in row.captions:
        if problem := line_problem(text):
            raise ValueError(f"caption {text!r:.200}: {problem}")
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
    if split is None or split not in BENCHMARKS[dataset]:
        raise ValueError(
            f"split={split!r} of dataset {dataset} must be one of {', '.join(BENCHMARKS[dataset])};"
            " set it with --split"
        )
    return BENCHMARKS[dataset][split]


def _first_existing(folder: str, names: tuple[str, ...]) -> str:
    fs, root = file_system(folder)
    for name in names:
        if fs.exists(join_url(root, name)):
            return join_url(folder, name)
    raise FileNotFoundError(f"annotations={folder!r}: no file {' or '.join(names)} in that folder")


def _msrvtt(published: int, *lists: str) -> BenchmarkSplit:
    return BenchmarkSplit(
        published=published, lists=lists, captions="MSRVTT_data.json", read=msrvtt_captions
    )


def _msvd(published: int, split: str) -> BenchmarkSplit:
    return BenchmarkSplit(
        published=published,
        lists=(f"{split}_list.txt",),
        captions="raw-captions.pkl",
        read=msvd_captions,
    )


def _didemo(published: int, split: str) -> BenchmarkSplit:
    return BenchmarkSplit(
        published=published,
        lists=(f"{split}_list.txt",),
        captions=f"{split}_data.json",
        read=didemo_captions,
    )


def _activitynet(published: int, ids: str, captions: str) -> BenchmarkSplit:
    return BenchmarkSplit(
        published=published,
        lists=(ids, captions),
        captions=captions,
        read=activitynet_captions,
        file_prefix="v_",
    )


BENCHMARKS: Mapping[Dataset, Mapping[str, BenchmarkSplit | ClipSplit]] = {
    "msrvtt": {
        "train-9k": _msrvtt(9_000, "MSRVTT_train.9k.csv", "train_list_jsfusion.txt"),
        "train-7k": _msrvtt(7_010, "MSRVTT_train.7k.csv"),
        "test-1ka": BenchmarkSplit(
            published=1_000,
            lists=("MSRVTT_JSFUSION_test.csv",),
            captions="MSRVTT_JSFUSION_test.csv",
            read=jsfusion_captions,
        ),
        # Miech's split. Its training list contains 453 videos of test-1ka, so it cannot replace the
        # training list of another split.
        "train-1kb": _msrvtt(6_656, "train_list_miech.txt"),
        "test-1kb": _msrvtt(1_000, "test_list_miech.txt"),
    },
    "msvd": {
        "train": _msvd(1_200, "train"),
        "val": _msvd(100, "val"),
        "test": _msvd(670, "test"),
    },
    "didemo": {
        "train": _didemo(8_395, "train"),
        "val": _didemo(1_065, "val"),
        "test": _didemo(1_004, "test"),
    },
    "activitynet": {
        "train": _activitynet(10_009, "train_ids.json", "train.json"),
        "val": _activitynet(4_917, "val_ids.json", "val_1.json"),
    },
    **CLIP_BENCHMARKS,
}
