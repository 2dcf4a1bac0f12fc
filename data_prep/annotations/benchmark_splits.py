"""The published files of the splits whose clips are listed with their captions."""

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


CLIP_BENCHMARKS: dict[Literal["vatex", "lsmdc", "youcook2", "webvid"], dict[str, ClipSplit]] = {
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
