"""Folders with the published layouts of MSR-VTT, MSVD, DiDeMo and ActivityNet Captions."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

SPLITS = {
    "msrvtt": ("train-9k", "test-1ka"),
    "msvd": ("train", "val", "test"),
    "didemo": ("train", "val", "test"),
    "activitynet": ("train", "val"),
}


def write_benchmark(
    folder: Path, benchmark: str, videos: Sequence[Path], captions: Sequence[Sequence[str]]
) -> tuple[Path, Path]:
    """Writes a benchmark in its own layout, and links its videos under the published names.

    Args:
        folder: Folder to create.
        benchmark: A key of SPLITS.
        videos: Files, dealt to the splits in turn from the last: a third goes to each of test and
            val, the rest to training.
        captions: At least two texts for each video.

    Returns:
        The folders of annotations and of videos.
    """
    annotations, linked = folder / "annotations", folder / "videos"
    annotations.mkdir(parents=True)
    linked.mkdir()
    form = {
        "msrvtt": "video{}",
        "msvd": "-v{}_5_15",
        "didemo": "1234@N0_{}.mp4",
        "activitynet": "v_{}",
    }
    names = [form[benchmark].format(number) for number in range(len(videos))]
    for name, video in zip(names, videos, strict=True):
        (linked / (name if "." in name else f"{name}.mp4")).symlink_to(video)
    texts = dict(zip(names, captions, strict=True))
    split_names = SPLITS[benchmark]
    share = len(names) // 3
    parts = {"train": names[: -share * (len(split_names) - 1)]}
    for place, split in enumerate(split_names[1:], start=1):
        first = len(parts["train"]) + (place - 1) * share
        parts[split] = names[first : first + share]
    WRITERS[benchmark](annotations, parts, texts)
    return annotations, linked


Parts = dict[str, list[str]]
Texts = dict[str, Sequence[str]]


def _msrvtt(folder: Path, parts: Parts, texts: Texts) -> None:
    sentences = [
        {"caption": text, "video_id": name, "sen_id": number}
        for number, (name, text) in enumerate((n, t) for n, own in texts.items() for t in own)
    ]
    videos = [{"video_id": name, "split": "train", "url": ""} for name in texts]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    (folder / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *parts["train"]]) + "\n")
    rows = [f"ret{n},msr{n},{name},{texts[name][0]}" for n, name in enumerate(parts["test-1ka"])]
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(
        "\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n"
    )


def _msvd(folder: Path, parts: Parts, texts: Texts) -> None:
    words = {name: [text.split() for text in own] for name, own in texts.items()}
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(words, protocol=2))
    for split, names in parts.items():
        (folder / f"{split}_list.txt").write_text("\n".join(names) + "\n")


def _didemo(folder: Path, parts: Parts, texts: Texts) -> None:
    for split, names in parts.items():
        rows = [
            {"video": name, "description": text, "times": [[0, 0]]}
            for name in names
            for text in texts[name]
        ]
        (folder / f"{split}_data.json").write_text(json.dumps(rows))
        (folder / f"{split}_list.txt").write_text("\n".join(names) + "\n")


def _activitynet(folder: Path, parts: Parts, texts: Texts) -> None:
    for split, file in (("train", "train"), ("val", "val_1")):
        entries = {
            name: {"duration": 2.0, "timestamps": [[0, 1], [1, 2]], "sentences": list(texts[name])}
            for name in parts[split]
        }
        (folder / f"{file}.json").write_text(json.dumps(entries))
        (folder / f"{split}_ids.json").write_text(json.dumps(parts[split]))


WRITERS = {
    "msrvtt": _msrvtt,
    "msvd": _msvd,
    "didemo": _didemo,
    "activitynet": _activitynet,
}
