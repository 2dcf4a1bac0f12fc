"""Benchmarks, on the published annotation files if present; missing caption files are made up."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from tvr.data_prep.annotations.benchmark_files import Refusals, read_ids
from tvr.data_prep.annotations.benchmarks import BENCHMARKS, Dataset, Selection, read_benchmark
from tvr.data_prep.annotations.clip_keys import KEY_PATTERN

REAL = Path(__file__).parents[3] / "shared" / "annotations"


def read(folder: Path, dataset: Dataset, split: str, videos: Path) -> Selection:
    return read_benchmark(dataset, split, annotations=str(folder), videos=str(videos))


def real(dataset: str, *names: str) -> Path:
    folder = REAL / dataset
    for name in names:
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}")
    return folder


def linked(target: Path, folder: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    return target


def test_real_msrvtt_test(tmp_path: Path) -> None:
    folder = real("msrvtt", "MSRVTT_JSFUSION_test.csv")
    selection = read(folder, "msrvtt", "test-1ka", tmp_path)
    assert selection.summary()[0] == "msrvtt test-1ka: 1,000 videos, as published"
    assert all(len(clip.captions) == 1 and clip.captions[0] for clip in selection.clips)
    assert selection.clips[0].captions == ("a person is connecting something to system",)


@pytest.mark.parametrize(
    ("split", "without", "size"),
    [
        ("train-9k", (), 9_000),
        ("train-9k", ("MSRVTT_train.9k.csv",), 9_000),
        ("train-1kb", (), 6_656),
        ("test-1kb", (), 1_000),
    ],
)
def test_real_msrvtt_lists(tmp_path: Path, split: str, without: tuple[str, ...], size: int) -> None:
    folder = linked(tmp_path, real("msrvtt", *BENCHMARKS["msrvtt"][split].lists))
    for name in without:
        (folder / name).unlink()
    sentences = [
        {"caption": f"{number} of {row}", "video_id": f"video{row}"}
        for row in range(10_000)
        for number in range(20)
    ]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    selection = read(folder, "msrvtt", split, tmp_path)
    assert selection.summary()[0] == f"msrvtt {split}: {size:,} videos, as published"
    assert {len(clip.captions) for clip in selection.clips} == {20}
    assert len(selection.not_listed) == 10_000 - size
    assert selection.without_captions == ()


def test_real_msvd_lists(tmp_path: Path) -> None:
    folder = linked(tmp_path, real("msvd", "train_list.txt", "val_list.txt", "test_list.txt"))
    ids = {
        split: list(read_ids(str(folder / f"{split}_list.txt"), Refusals()))
        for split in BENCHMARKS["msvd"]
    }
    all_ids = [name for names in ids.values() for name in names]
    assert len(set(all_ids)) == 1_970
    assert any(name.startswith("-") for name in all_ids)
    captions = {name: [["a", "man", str(number)] for number in range(41)] for name in all_ids}
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    for split, size in (("train", 1_200), ("val", 100), ("test", 670)):
        selection = read(folder, "msvd", split, tmp_path)
        assert selection.summary()[0] == f"msvd {split}: {size:,} videos, as published"
        assert [clip.key for clip in selection.clips] == ids[split]
        assert {len(clip.captions) for clip in selection.clips} == {41}


def test_real_didemo_test(tmp_path: Path) -> None:
    folder = real("didemo", "test_data.json", "test_list.txt")
    selection = read(folder, "didemo", "test", tmp_path)
    assert selection.summary()[0] == "didemo test: 1,004 videos, as published"
    assert (len(selection.not_listed), selection.without_captions) == (33, ())
    assert "left out: 33 (" in selection.summary()[-1]
    assert selection.summary()[-1].endswith("and 23 more)")
    assert all(KEY_PATTERN.fullmatch(clip.key) for clip in selection.clips)
    data = json.loads((folder / "test_data.json").read_text())
    clip = selection.clips[0]
    descriptions = [entry["description"] for entry in data if entry["video"] == clip.video_id]
    assert len(descriptions) > 1
    assert clip.captions == (" ".join(" ".join(descriptions).split()),)


@pytest.mark.parametrize(
    ("split", "summary"),
    [
        ("train", "didemo train: 8,392 videos, published 8,395 (-3)"),
        ("val", "didemo val: 1,065 videos, as published"),
    ],
)
def test_real_didemo_lists(tmp_path: Path, split: str, summary: str) -> None:
    folder = linked(tmp_path, real("didemo", f"{split}_list.txt"))
    ids = list(read_ids(str(folder / f"{split}_list.txt"), Refusals()))
    data = [{"video": name, "description": text} for text in "abc" for name in ids]
    (folder / f"{split}_data.json").write_text(json.dumps(data))
    selection = read(folder, "didemo", split, tmp_path)
    assert selection.summary()[0] == summary
    assert {clip.captions for clip in selection.clips} == {("a b c",)}
    assert [clip.video_id for clip in selection.clips] == ids


def test_real_activitynet(tmp_path: Path) -> None:
    folder = real("activitynet", "val_1.json", "val_ids.json")
    selection = read(folder, "activitynet", "val", tmp_path)
    assert selection.summary()[0] == "activitynet val: 4,917 videos, as published"
    assert (len(selection.without_captions), selection.not_listed) == (9, ())
    assert "listed without captions, left out: 9 (v_" in selection.summary()[2]
    captions = {clip.video_id: clip.captions for clip in selection.clips}
    assert captions["v_uqiMw7tQ1Cc"] == (
        "A weight lifting tutorial is given. The coach helps the guy in red with the proper body"
        " placement and lifting technique.",
    )
    assert all(len(texts) == 1 and texts[0] for texts in captions.values())
