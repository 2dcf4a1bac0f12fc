"""Finds samples that two data sets share, and videos that one data set holds under two ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders.clip_files import numbered_video
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.check import cli as check_cli
from tvr.data_prep.check.verify import VerifyReport, verify_dataset
from tvr.data_prep.dataset.leakage import COLUMNS, repeated_content, shared_samples
from tvr.data_prep.dataset.manifest import SampleTable
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import Clip


def pack(folder: Path, *clips: tuple[str, str, int, str]) -> str:
    """Packs clips of (key, video_id, number of the first frame, caption); returns the URL."""
    folder.mkdir()
    packed_clips = []
    for key, video_id, number, caption in clips:
        video = folder / f"{key}.mp4"
        video.write_bytes(numbered_video(2, first=number, bframes=0))
        packed_clips.append(Clip(key=key, video=str(video), captions=(caption,), video_id=video_id))
    url = str(folder / "data")
    pack_shards(packed_clips, url, layout="frames", num_frames=2, samples_per_shard=2)
    return url


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack(
        tmp_path_factory.mktemp("train") / "clips",
        ("a", "va", 1, "one"),
        ("b", "vb", 2, "two"),
        ("c", "vc", 3, "three"),
    )


def problems(report: VerifyReport) -> list[str]:
    return [f"{problem.where} / {problem.what}" for problem in report.problems]


def test_data_sets_without_common_samples_have_no_problem(train: str, tmp_path: Path) -> None:
    test = pack(tmp_path / "test", ("d", "vd", 4, "four"), ("e", "ve", 5, "five"))
    report = verify_dataset(test, against=[train])
    assert problems(report) == []
    assert [common.num_captions for common in report.common_captions] == [0]


@pytest.mark.parametrize(
    ("clip", "by"),
    [
        (("b", "vx", 9, "x"), "key"),
        (("x", "vb", 9, "x"), "video_id"),
        (("x", "vx", 2, "x"), "content"),
        (("b", "vb", 2, "x"), "key and video_id and content"),
    ],
)
def test_a_sample_of_the_training_set_is_named_with_both_keys(
    train: str, tmp_path: Path, clip: tuple[str, str, int, str], by: str
) -> None:
    test = pack(tmp_path / "test", ("d", "vd", 4, "four"), clip)
    expected = [f"shard-000000.tar: {clip[0]} / same {by} as b of {train}"]
    assert problems(verify_dataset(test, against=[train])) == expected
    assert problems(verify_dataset(test, against=[train], compare_captions=False)) == expected
    assert problems(verify_dataset(test)) == []


def test_a_data_set_is_compared_with_several_others(train: str, tmp_path: Path) -> None:
    other = pack(tmp_path / "other", ("o", "vo", 7, "two"), ("p", "vd", 8, "eight"))
    test = pack(tmp_path / "test", ("d", "vd", 4, "two"), ("c", "ve", 5, "five"))
    report = verify_dataset(test, against=[train, other])
    assert problems(report) == [
        f"shard-000000.tar: c / same key as c of {train}",
        f"shard-000000.tar: d / same video_id as p of {other}",
    ]
    assert [(each.url, each.num_captions) for each in report.common_captions] == [
        (train, 1),
        (other, 1),
    ]


def test_equal_captions_are_counted_but_no_problem(train: str, tmp_path: Path) -> None:
    test = pack(
        tmp_path / "test", ("d", "vd", 4, "two"), ("e", "ve", 5, "three"), ("f", "vf", 6, "x")
    )
    report = verify_dataset(test, against=[train])
    assert (problems(report), report.common_captions[0].num_captions) == ([], 2)
    assert verify_dataset(test, against=[train], compare_captions=False).common_captions == ()


def test_unreadable_captions_of_the_other_set_are_counted(train: str, tmp_path: Path) -> None:
    test = pack(tmp_path / "test", ("d", "vd", 4, "two"), ("e", "ve", 5, "three"))
    train = str(shutil.copytree(train, tmp_path / "train"))
    (Path(train) / "shard-000000.tar").unlink()  # a and b
    report = verify_dataset(test, against=[train])
    assert problems(report) == []
    assert [(each.num_captions, each.num_unread) for each in report.common_captions] == [(1, 2)]
    second = Path(train) / "shard-000001.tar"
    second.write_bytes(second.read_bytes()[:700])
    (common,) = verify_dataset(test, against=[train]).common_captions
    assert (common.num_captions, common.num_unread) == (0, 3)


def test_one_video_under_two_ids_is_a_problem(tmp_path: Path) -> None:
    url = pack(
        tmp_path / "twice",
        ("a", "va", 1, "one"),
        ("b", "vb", 2, "two"),
        ("c", "vc", 1, "three"),
        ("d", "vb", 2, "four"),  # two clips of one video
    )
    assert problems(verify_dataset(url)) == [
        "shard-000001.tar: c / same content as a, but video_id 'vc' instead of 'va'"
    ]


def columns(rows: list[tuple[str, str, int]]) -> SampleTable:
    keys, video_ids, contents = zip(*rows, strict=True)
    none = np.zeros(len(rows), dtype=np.int32)
    return SampleTable(
        key=np.array(keys),
        video_id=np.array(video_ids),
        content=np.array(contents, dtype=np.uint64),
        shard=none,
        offset=none,
        length=none,
        crc32=none,
        num_captions=none,
    )


rows = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["v", "w", "xx"]), st.integers(0, 5)),
    min_size=1,
    max_size=8,
)


@given(rows, rows)
def test_shared_samples_are_all_equal_pairs(
    ours: list[tuple[str, str, int]], theirs: list[tuple[str, str, int]]
) -> None:
    naive = [
        (row, other_row, by)
        for row, mine in enumerate(ours)
        for other_row, other in enumerate(theirs)
        if (by := [n for n, a, b in zip(COLUMNS, mine, other, strict=True) if a == b])
    ]
    shared = shared_samples(columns(ours), columns(theirs))
    assert [(each.row, each.other_row, list(each.by)) for each in shared] == naive


@given(rows)
def test_repeated_content_is_reported_once_a_row(samples: list[tuple[str, str, int]]) -> None:
    naive = []
    for row, (_, video_id, content) in enumerate(samples):
        first = next(at for at, (_, _, other) in enumerate(samples) if other == content)
        if samples[first][1] != video_id:
            naive.append((row, first))
    assert list(repeated_content(columns(samples))) == naive


def test_the_command_line(train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = pack(tmp_path / "test", ("d", "vb", 4, "two"), ("e", "ve", 5, "five"))
    copy = str(tmp_path / "copy")
    shutil.copytree(train, copy)
    assert check_cli.verify([test, "--against", train, "--against", copy]) == 3
    printed = capsys.readouterr().out
    assert "2 problems" in printed
    assert f"captions in common with {train}: 1" in printed
    out = tmp_path / "report.json"
    assert check_cli.verify(["--against", train, test, "--json", str(out)]) == 3
    capsys.readouterr()
    assert check_cli.verify([test, "--against", train, "--json", "-"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert report["problems"] == [
        {"where": "shard-000000.tar: d", "what": f"same video_id as b of {train}"}
    ]
    assert report["captions"]["num_captions"] == 2
    assert check_cli.verify([test, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert check_cli.verify([test, "--against", str(tmp_path / "none")]) == 2
    assert "no data set there" in capsys.readouterr().err
