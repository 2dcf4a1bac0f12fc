"""The published files of each split of each benchmark, and the sizes that papers report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tvr.data_prep.annotations.benchmark_clips import (
    ClipRow,
    lsmdc_clips,
    vatex_clips,
    webvid_clips,
    youcook2_clips,
)
from tvr.data_prep.annotations.benchmark_files import (
    activitynet_captions,
    didemo_captions,
    jsfusion_captions,
    msrvtt_captions,
    msvd_captions,
)

Dataset = Literal["msrvtt", "msvd", "didemo", "activitynet", "vatex", "lsmdc", "youcook2", "webvid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSplit:
    """The files of a split."""

    published: int
    """Number of videos that retrieval papers report."""
    lists: tuple[str, ...]
    """Alternative files of video ids; the first one that exists is read."""
    captions: str
    """File of captions; it may also hold other splits."""
    read: Callable[[str], dict[str, list[str]]]
    """Reads `captions` from a URL and returns the captions by video id."""
    file_prefix: str = ""
    """Prefix of the ids that some collections omit from the file names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSplit:
    """The files of a split whose clips are listed with their captions."""

    published: int | None
    """Number of clips that the publication reports; None = not known."""
    file: str
    read: Callable[[str], Iterator[ClipRow]]
    """Reads the clips of `file` from a URL."""
    lists: tuple[str, ...] = ()
    """Alternative files of the ids that belong to the split; empty = all clips of the file do."""


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


def _vatex(published: int, file: str, *lists: str) -> ClipSplit:
    return ClipSplit(published=published, file=f"vatex_{file}.json", read=vatex_clips, lists=lists)


def _lsmdc(published: int, file: str) -> ClipSplit:
    return ClipSplit(published=published, file=f"LSMDC16_{file}.csv", read=lsmdc_clips)


def _youcook2(published: int, subset: str) -> ClipSplit:
    return ClipSplit(
        published=published,
        file="youcookii_annotations_trainval.json",
        read=partial(youcook2_clips, subset=subset),
    )


def _webvid(file: str) -> ClipSplit:
    return ClipSplit(published=None, file=f"results_{file}.csv", read=webvid_clips)


BENCHMARKS: dict[Dataset, dict[str, BenchmarkSplit | ClipSplit]] = {
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
    "vatex": {
        "train": _vatex(25_991, "training_v1.0"),
        "val": _vatex(3_000, "validation_v1.0"),
        "test": _vatex(6_000, "public_test_english_v1.1"),
        # Retrieval papers halve the validation set (Chen et al., CVPR 2020).
        "val-1500": _vatex(1_500, "validation_v1.0", "val_list.txt"),
        "test-1500": _vatex(1_500, "validation_v1.0", "test_list.txt"),
    },
    "lsmdc": {
        "train": _lsmdc(101_079, "annos_training"),
        "val": _lsmdc(7_408, "annos_val"),
        "test": _lsmdc(1_000, "challenge_1000_publictect"),
    },
    "youcook2": {
        "train": _youcook2(10_337, "training"),
        "val": _youcook2(3_492, "validation"),
    },
    "webvid": {
        "train-2m": _webvid("2M_train"),
        "val-2m": _webvid("2M_val"),
        "train-10m": _webvid("10M_train"),
        "val-10m": _webvid("10M_val"),
    },
}
