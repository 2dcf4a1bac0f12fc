"""Benchmarks, on small files with the published layouts."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
from builders.clip_files import numbered_video

from tvr.data_prep import cli
from tvr.data_prep.annotations.benchmark_files import Refusals, read_ids
from tvr.data_prep.annotations.benchmarks import BENCHMARKS, Dataset, Selection, read_benchmark
from tvr.data_prep.annotations.text_files import MAX_LINE
from tvr.data_prep.check import cli as check_cli


def msrvtt(folder: Path, ids: list[str]) -> None:
    """Writes two captions a video; train-9k lists all videos but the last, test-1ka the last."""
    sentences = [
        {"caption": f"{word} {name}", "video_id": name, "sen_id": 2 * row + number}
        for row, name in enumerate(ids)
        for number, word in enumerate(("a first", "a second"))
    ]
    videos = [{"video_id": name, "split": "train", "url": ""} for name in ids]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    (folder / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *ids[:-1]]) + "\n")
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(
        f'key,vid_key,video_id,sentence\nret0,msr0,{ids[-1]},"one, as scored"\n'
    )


def msvd(folder: Path, captions: Any, ids: list[str], split: str = "test") -> None:
    # Python 2 wrote protocol 2.
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))
    (folder / f"{split}_list.txt").write_bytes("\r\n".join(ids).encode())


def read(folder: Path, dataset: Dataset, split: str | None, videos: str = "") -> Selection:
    return read_benchmark(dataset, split, annotations=str(folder), videos=videos or str(folder))


def captions_of(selection: Selection) -> dict[str, tuple[str, ...]]:
    return {clip.video_id: clip.captions for clip in selection.clips}


def test_msrvtt_has_all_captions_in_training_and_one_in_the_test(tmp_path: Path) -> None:
    msrvtt(tmp_path, ["video2", "video0", "video7"])
    training = read(tmp_path, "msrvtt", "train-9k")
    assert captions_of(training) == {
        "video2": ("a first video2", "a second video2"),
        "video0": ("a first video0", "a second video0"),
    }
    assert training.clips[1].origin == f"{tmp_path}/MSRVTT_train.9k.csv:3"
    assert training.not_listed == ("video7",)
    assert captions_of(read(tmp_path, "msrvtt", "test-1ka")) == {"video7": ("one, as scored",)}


def test_a_file_of_one_line_may_be_of_any_length(tmp_path: Path) -> None:
    msrvtt(tmp_path, ["video1", "video2", "video3"])
    path = tmp_path / "MSRVTT_data.json"
    whole = {"notes": "x" * (MAX_LINE + 100), **json.loads(path.read_text())}
    path.write_text(json.dumps(whole))
    assert "\n" not in path.read_text()
    assert len(read(tmp_path, "msrvtt", "train-9k").clips) == 2


def test_msrvtt_reads_the_list_without_header_if_the_csv_is_missing(tmp_path: Path) -> None:
    msrvtt(tmp_path, ["video2", "video0", "video7"])
    (tmp_path / "MSRVTT_train.9k.csv").unlink()
    (tmp_path / "train_list_jsfusion.txt").write_text("video7\nvideo2")  # no last newline
    assert [clip.key for clip in read(tmp_path, "msrvtt", "train-9k").clips] == ["video7", "video2"]
    with pytest.raises(FileNotFoundError, match=r"no file MSRVTT_train\.7k\.csv in that folder"):
        read(tmp_path, "msrvtt", "train-7k")


def test_msvd_joins_words_and_keeps_every_caption(tmp_path: Path) -> None:
    sentences = [["a", "man", "cuts"], ["a", "person", "slices"], []]
    msvd(
        tmp_path,
        {"-4wsu_5_15": sentences, "_x_0_1": [("a", "cat")], "z_1_2": []},
        ["_x_0_1", "-4wsu_5_15"],
    )
    selection = read(tmp_path, "msvd", "test")
    assert captions_of(selection) == {
        "_x_0_1": ("a cat",),
        "-4wsu_5_15": ("a man cuts", "a person slices", ""),
    }
    assert [clip.key for clip in selection.clips] == ["_x_0_1", "-4wsu_5_15"]
    assert selection.not_listed == ("z_1_2",)


def test_didemo_joins_descriptions_in_file_order(tmp_path: Path) -> None:
    entries = [("1@N0_b.mov", "one  "), ("2@N0_c.", "x"), ("1@N0_b.mov", "two."), ("3@N", "y")]
    data = [{"video": name, "description": text, "times": [[0, 0]]} for name, text in entries]
    (tmp_path / "val_data.json").write_text(json.dumps(data))
    (tmp_path / "val_list.txt").write_text("1@N0_b.mov\n2@N0_c.\n4@N0_d.avi\n")
    selection = read(tmp_path, "didemo", "val")
    assert captions_of(selection) == {"1@N0_b.mov": ("one two.",), "2@N0_c.": ("x",)}
    assert [clip.key for clip in selection.clips] == ["1_N0_b", "2_N0_c"]
    assert selection.without_captions == ("4@N0_d.avi",)
    assert selection.not_listed == ("3@N",)
    assert selection.summary() == [
        "didemo val: 2 videos, published 1,065 (-1,063)",
        "without a video file: 2 (1@N0_b.mov, 2@N0_c.)",
        "listed without captions, left out: 1 (4@N0_d.avi)",
        "captioned but not in this list, left out: 1 (3@N)",
    ]


def test_activitynet_joins_sentences_and_needs_no_list(tmp_path: Path) -> None:
    captions = {
        "v_a": {"duration": 9.0, "timestamps": [[0, 9]], "sentences": ["One. ", "  Two."]},
        "v_b": {"duration": 9.0, "timestamps": [], "sentences": []},
    }
    (tmp_path / "train.json").write_text(json.dumps(captions))
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mkv").touch()  # some collections omit the "v_"
    selection = read(tmp_path, "activitynet", "train", str(videos))
    assert captions_of(selection) == {"v_a": ("One. Two.",), "v_b": ("",)}
    assert selection.clips[0].video == f"{videos}/a.mkv"
    (tmp_path / "train_ids.json").write_text('["v_b", "v_c"]')
    selection = read(tmp_path, "activitynet", "train")
    assert (list(captions_of(selection)), selection.without_captions) == (["v_b"], ("v_c",))


def test_ids_of_one_key_get_keys_of_their_own(tmp_path: Path) -> None:
    data = [{"video": name, "description": "x"} for name in ("1@N_b.mov", "1@N_b.avi")]
    (tmp_path / "val_data.json").write_text(json.dumps(data))
    (tmp_path / "val_list.txt").write_text("1@N_b.mov\n1@N_b.avi\n")
    first, second = read(tmp_path, "didemo", "val").clips
    assert first.key == "1_N_b"
    assert re.fullmatch("1_N_b-[a-z2-7]{12}", second.key)
    assert (first.video_id, second.video_id) == ("1@N_b.mov", "1@N_b.avi")


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("charades", "test", "dataset='charades' must be one of msrvtt, msvd, didemo"),
        ("msrvtt", "test", "split='test' of dataset msrvtt must be one of train-9k, train-7k, t"),
        ("didemo", None, "split=None of dataset didemo must be one of train, val, test; set it"),
    ],
)
def test_unknown_names_are_refused(
    tmp_path: Path, dataset: Any, split: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, dataset, split)


MALFORMED = [
    ("a.csv", "id\nvideo1\n", r"a\.csv:1: columns id; expected video_id"),
    ("a.json", "[", r"a\.json: not JSON"),
    ("a.json", "3", r"a\.json: expected a list or dict, found int"),
]


@pytest.mark.parametrize(("name", "text", "message"), MALFORMED)
def test_the_error_names_a_malformed_list(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ids(str(tmp_path / name), Refusals())


BAD_IDS = [
    ("a.txt", b"video1\nvideo2\nvideo1\n", r"a\.txt:3: video id 'video1' again, first at .*:1"),
    ("b.txt", b"video1\nvid\xe9o\nvideo2\n", r"b\.txt:2: not UTF-8 text: byte 0xe9"),
    ("a.csv", b"video_id,n\nvideo1,1\nv\nvideo2,2\n", r"a\.csv:3: expected 2 fields"),
    ("b.csv", b'video_id\nvideo1\n"v\nvideo2\n', r"b\.csv:3: not CSV"),
    ("a.json", b'["video1", 3, "video2"]', r"a\.json: id 2: video id 3 must be text"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_IDS)
def test_a_bad_id_is_refused_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refusals = Refusals()
    assert list(read_ids(str(tmp_path / name), refusals)) == ["video1", "video2"]
    (row,) = refusals.of([])
    assert re.search(message, row.detail)


@pytest.mark.parametrize(
    ("dataset", "split", "name", "value", "message"),
    [
        ("msrvtt", "train-9k", "MSRVTT_data.json", {}, "sentences must be a list, found NoneType"),
        ("didemo", "val", "val_data.json", {}, "expected a list, found dict"),
    ],
)
def test_the_error_names_malformed_captions(
    tmp_path: Path, dataset: Dataset, split: str, name: str, value: Any, message: str
) -> None:
    for listed in ("MSRVTT_train.9k.csv", "val_list.txt"):
        (tmp_path / listed).write_text("video_id\nv\n")
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        read(tmp_path, dataset, split)


@pytest.mark.parametrize(
    ("dataset", "split", "name", "value", "message"),
    [
        (
            *("msrvtt", "train-9k", "MSRVTT_data.json"),
            {"sentences": [{"caption": "x"}, {"video_id": "w"}, {"video_id": "v", "caption": "x"}]},
            r"sentences\[0\]: video_id=None must be text",
        ),
        (
            *("msrvtt", "train-9k", "MSRVTT_data.json"),
            {
                "sentences": [
                    {"caption": "\ud83d", "video_id": "v"},
                    {"video_id": "v", "caption": "x"},
                ]
            },
            r"sentences\[0\]: caption='.ud83d' must be text",
        ),
        (
            *("didemo", "val", "val_data.json"),
            [{"video": "v"}, {"video": "v", "description": "x"}],
            r"\[0\]: description=None must be",
        ),
        (
            *("activitynet", "val", "val_1.json"),
            {"v": {"sentences": ["x"]}, "v_a": {"sentences": [1]}},
            r"v_a: sentences=\[1\]",
        ),
    ],
)
def test_a_bad_entry_is_refused_and_the_others_are_read(
    tmp_path: Path, dataset: Dataset, split: str, name: str, value: Any, message: str
) -> None:
    for listed in ("MSRVTT_train.9k.csv", "val_list.txt"):
        (tmp_path / listed).write_text("video_id\nv\n")
    (tmp_path / "val_ids.json").write_text('["v", "v_a"]')
    (tmp_path / name).write_text(json.dumps(value))
    selection = read(tmp_path, dataset, split)
    assert captions_of(selection) == {"v": ("x",)}
    (row,) = selection.refused  # one of another split is not counted
    assert re.search(message, row.detail)
    assert f"bad rows: 1 ({row.origin})" in selection.summary()


def test_annotations_and_videos_may_be_urls() -> None:
    for name, text in (("list.txt", ""), ("val_list.txt", "1@N_b.mov\n")):
        with fsspec.open(f"memory://didemo/{name}", "w") as file:
            file.write(text)  # type: ignore[union-attr]
    with fsspec.open("memory://didemo/val_data.json", "w") as file:
        file.write('[{"video": "1@N_b.mov", "description": "x"}]')  # type: ignore[union-attr]
    with fsspec.open("memory://films/part1/1@N_b.mp4", "wb") as file:
        file.write(b"film")  # type: ignore[union-attr]
    selection = read_benchmark(
        "didemo", "val", annotations="memory://didemo/", videos="memory://films"
    )
    assert [clip.video for clip in selection.clips] == ["memory://films/part1/1@N_b.mp4"]
    assert selection.without_file == ()


def test_a_benchmark_is_packed_and_missing_videos_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, videos, out = tmp_path / "annotations", tmp_path / "videos", tmp_path / "data"
    annotations.mkdir()
    (videos / "more").mkdir(parents=True)
    msrvtt(annotations, ["video0", "video1", "video2", "video3"])
    (videos / "video0.mp4").write_bytes(numbered_video(4))
    (videos / "more" / "video2.mp4").write_bytes(numbered_video(4, first=9))
    line = ["--dataset", "msrvtt", "--annotations", str(annotations), "--videos", str(videos)]
    line += ["--out", str(out), "--layout", "frames", "--num-frames", "2"]

    assert cli.pack([*line, "--split", "train-9k"]) == 2
    printed = capsys.readouterr()
    assert "without a video file: 1 (video1)" in printed.out
    message = "1 videos of msrvtt train-9k have no file, more than max_bad=0; the last is video1"
    assert message in printed.err
    assert not out.exists()  # reported before packing, not after hours

    assert cli.pack([*line, "--split", "train-9k", "--max-bad", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "msrvtt train-9k: 3 videos, published 9,000 (-8,997)",
        "without a video file: 1 (video1)",
        "captioned but not in this list, left out: 1 (video3)",
        f"packed 2 clips with 4 captions into 1 shards, 0.0 MB, at {out}",
    ]
    (bad,) = map(json.loads, (out / "bad.jsonl").read_text().splitlines())
    assert (bad["key"], bad["reason"]) == ("video1", "missing_file")
    assert f"{videos}/video1.mp4 of {annotations}/MSRVTT_train.9k.csv:3" in bad["detail"]
    assert check_cli.verify([str(out)]) == 0


def test_wrong_usage_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--annotations", str(tmp_path), "--out", str(tmp_path / "o"), "--layout", "frames"]
    msrvtt(tmp_path, ["video0", "video1"])
    codes = [
        cli.pack([*line, "--split", "train"]),
        cli.pack([*line, "--dataset", "msvd"]),
        cli.pack([*line, "--dataset", "msvd", "--split", "val"]),
        cli.pack([*line, "--dataset", "msrvtt", "--split", "train-9k", "--videos", "/no/such"]),
    ]
    assert codes == [2] * 4
    expected = [
        "split='train' needs a benchmark: set --dataset",
        "split=None of dataset msvd must be one of train, val, test",
        f"annotations='{tmp_path}': no file val_list.txt in that folder",
        "videos='/no/such': no such folder",
    ]
    for line, start in zip(capsys.readouterr().err.splitlines(), expected, strict=True):
        assert line.startswith(f"tvr pack: error: {start}")


def test_the_help_names_every_split() -> None:
    text = " ".join((Path(cli.__file__)).read_text().split())
    for dataset, splits in BENCHMARKS.items():
        assert dataset in text
        assert ", ".join(splits) in text
