"""Annotation files: formats, path rules, and errors that name the file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from tvr.data_prep.annotations.read import read_annotations


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_with_all_fields_and_defaults(tmp_path: Path) -> None:
    lines = [
        {"video": "a b.c.mp4", "captions": ["x", "y"]},
        {"video": "/abs/v.mp4", "caption": "z", "key": "k-1", "video_id": "same"},
        {"video": "memory://box/w.mp4", "captions": []},
    ]
    url = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    clips = read_annotations(url)
    assert [clip.key for clip in clips] == ["a_b_c", "k-1", "w"]
    assert [clip.video_id for clip in clips] == ["a_b_c", "same", "w"]
    assert [clip.video for clip in clips] == [
        f"{tmp_path}/a b.c.mp4",
        "/abs/v.mp4",
        "memory://box/w.mp4",
    ]
    assert [clip.captions for clip in clips] == [("x", "y"), ("z",), ()]
    assert clips[1].origin == f"{url}:2"


def test_csv_merges_rows_of_a_video_in_file_order(tmp_path: Path) -> None:
    text = '\ufeffvideo,caption,video_id\nb.mp4,"one, two",V\na.mp4,three,\nb.mp4,"fo\nur",V\n'
    clips = read_annotations(write(tmp_path, "a.csv", text), videos="memory://films/")
    assert [(clip.key, clip.captions, clip.video_id) for clip in clips] == [
        ("b", ("one, two", "fo\nur"), "V"),
        ("a", ("three",), "a"),
    ]
    assert clips[0].video == "memory://films/b.mp4"


def test_cuts_have_keys_of_their_own_and_merge_when_equal(tmp_path: Path) -> None:
    text = (
        "video,caption,start,end,key\nv.mp4,one,1.5,3,\nv.mp4,two,3,,\nv.mp4,whole,,,\n"
        "v.mp4,three,1.5,3.0,\nv.mp4,named,0,2,k\n"
    )
    clips = read_annotations(write(tmp_path, "a.csv", text))
    assert [(clip.key, clip.captions, clip.span) for clip in clips] == [
        ("v_1500_3000", ("one", "three"), (1.5, 3.0)),
        ("v_3000_end", ("two",), (3.0, None)),
        ("v", ("whole",), None),
        ("k", ("named",), (0.0, 2.0)),
    ]
    lines = [{"video": "v.mp4", "caption": "x", "start": 2, "end": 4.25}]
    (clip,) = read_annotations(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert (clip.key, clip.start_s, clip.end_s) == ("v_2000_4250", 2.0, 4.25)
    columns = {"video": ["v.mp4"], "caption": ["x"], "start": [None], "end": [7]}
    (clip,) = read_annotations(write_parquet(tmp_path, columns))
    assert (clip.key, clip.span) == ("v_0_7000", (0.0, 7.0))


def test_gzip_on_another_file_system() -> None:
    url = "memory://annotations/a.jsonl.gz"
    with fsspec.open(url, "wb") as file:
        file.write(gzip.compress(b'{"video": "v.mp4", "caption": "x"}'))  # type: ignore[union-attr]
    assert read_annotations(url)[0].video == "memory://annotations/v.mp4"


def test_lines_of_the_authors_name_a_video_to_look_up(tmp_path: Path) -> None:
    (tmp_path / "data/mp4").mkdir(parents=True)
    (tmp_path / "data/mp4/video1.avi").touch()
    (tmp_path / "video2.mp4").touch()
    lines = [
        {"caption": "x", "clip_name": "data/mp4/video1", "sen_id": 0, "label": 1},
        {"caption": "z", "clip_name": "video2.mp4", "retrieval_key": "ret0"},
        {"caption": "y", "clip_name": "data/mp4/video1", "sen_id": 1, "label": 2},
        {"caption": "", "clip_name": "gone", "sen_id": 0},
        {"caption": "beside", "video": "own.mp4"},
    ]
    url = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    clips = read_annotations(url)
    assert [(clip.key, clip.captions) for clip in clips] == [
        ("video1", ("x", "y")),
        ("video2", ("z",)),
        ("gone", ("",)),
        ("own", ("beside",)),
    ]
    names = ["data/mp4/video1.avi", "video2.mp4", "gone.mp4", "own.mp4"]
    assert [clip.video for clip in clips] == [f"{tmp_path}/{name}" for name in names]
    assert [clip.video_id for clip in clips] == ["video1", "video2", "gone", "own"]
    with pytest.raises(FileNotFoundError, match="videos='/no/such': no such folder"):
        read_annotations(url, videos="/no/such")


def write_parquet(folder: Path, columns: dict[str, list[Any]]) -> str:
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return str(folder / "a.parquet")


def test_parquet_has_the_columns_of_csv_and_lists(tmp_path: Path) -> None:
    columns = {"video": ["b.mp4", "a.mp4", "b.mp4"], "caption": ["one", "", None]}
    url = write_parquet(tmp_path, columns | {"video_id": ["V", None, "V"]})
    clips = read_annotations(url, videos="/films")
    assert [(clip.key, clip.captions, clip.video_id) for clip in clips] == [
        ("b", ("one", ""), "V"),
        ("a", ("",), "a"),
    ]
    assert clips[0].video == "/films/b.mp4"
    lists = [["x", "y"], None, []]
    url = write_parquet(
        tmp_path,
        {"video": ["b.mp4", "a.mp4", "c.mp4"], "captions": lists, "caption": [None, "z", None]},
    )
    clips = read_annotations(url)
    assert [(clip.key, clip.captions) for clip in clips] == [
        ("b", ("x", "y")),
        ("a", ("z",)),
        ("c", ()),
    ]
    assert clips[1].origin == f"{url}: row 2"


PARQUET_ERRORS = [
    ({"video": ["v.mp4"], "text": ["x"]}, "row 1: unknown text; allowed are video"),
    ({"video": ["v.mp4"], "captions": [[1]]}, r"row 1: captions=\[1\] must be text"),
    ({"video": [None], "caption": ["x"]}, "row 1: video='' must be a text"),
    (
        {"video": ["v.mp4"], "caption": ["x"], "captions": [["x"]]},
        'row 1: give either "captions"',
    ),
    (
        {"video": ["v.mp4", "w.mp4"], "caption": ["x", "y"], "key": ["k", "k"]},
        "row 2: duplicate key 'k'",
    ),
    ({"video": []}, "empty annotation"),
]


@pytest.mark.parametrize(("columns", "message"), PARQUET_ERRORS)
def test_parquet_errors_name_the_row(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"a\.parquet: {message}"):
        read_annotations(write_parquet(tmp_path, columns))


def test_invalid_and_missing_parquet_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet: not Parquet"):
        read_annotations(write(tmp_path, "a.parquet", "video,caption\n" * 9))
    with pytest.raises(FileNotFoundError, match=r"annotation file .*b\.parquet does not exist"):
        read_annotations(str(tmp_path / "b.parquet"))


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_parquet(tmp_path, {"video": ["v.mp4"], "caption": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"not installed; .* pip install -e '\.\[parquet\]'"):
        read_annotations(url)


JSONL_ERRORS = [
    ("", r"a\.jsonl: empty annotation"),
    ("\n\n", r"a\.jsonl: empty annotation"),
    ('{"video": "v.mp4", "caption": "x"}\n{', r"a\.jsonl:2: not JSON"),
    ("[1]", r"a\.jsonl:1: expected a JSON object, found list"),
    ('{"video": "v.mp4", "text": "x"}', r"a\.jsonl:1: unknown text; allowed are video"),
    ('{"video": "v.mp4"}', r'a\.jsonl:1: give either "captions"'),
    ('{"video": "v.mp4", "caption": "x", "captions": ["x"]}', r"a\.jsonl:1: give either"),
    ('{"video": "v.mp4", "captions": {"x": 1}}', r"a\.jsonl:1: captions=\{'x': 1\} must be text"),
    ('{"video": "v.mp4", "captions": [1]}', r"a\.jsonl:1: captions=\[1\] must be text"),
    ('{"caption": "x"}', r"a\.jsonl:1: video='' must be a text"),
    ('{"video": 3, "caption": "x"}', r"a\.jsonl:1: video=3 must be a text"),
    ('{"video": "v.mp4", "caption": "x", "key": "a.b"}', r"a\.jsonl:1: key='a\.b' must be 1 to 80"),
    ('{"video": "v.mp4", "caption": "x", "key": "a/b"}', r"a\.jsonl:1: key='a/b' must be"),
    ('{"video": "v.mp4", "caption": "x", "end": true}', r"a\.jsonl:1: end=True must be a number"),
    (
        '{"video": "v.mp4", "caption": "x", "start": -1}',
        r"a\.jsonl:1: start=-1.0 and end=None must",
    ),
    ('{"clip_name": "v"}', r'a\.jsonl:1: give either "captions"'),
    ('{"clip_name": "", "caption": "x"}', r"a\.jsonl:1: clip_name='' must be text"),
    (
        '{"clip_name": "v", "caption": "x", "start": 1.5}',
        r"a\.jsonl:1: unknown start; allowed are clip_name",
    ),
    (
        '{"video": "v.mp4", "caption": "x"}\n{"clip_name": "v", "caption": "y"}',
        r"a\.jsonl:2: duplicate key 'v'",
    ),
    (
        '{"video": "p/v.mp4", "caption": "x", "key": "k"}\n'
        '{"video": "q/v.mp4", "caption": "x", "key": "k"}',
        r"a\.jsonl:2: duplicate key 'k', first at .*a\.jsonl:1",
    ),
    (
        '{"video": "v.mp4", "caption": "x"}\n{"video": "v.mp4", "caption": "y"}',
        r"a\.jsonl:2: duplicate key 'v'",
    ),
]


@pytest.mark.parametrize(("text", "message"), JSONL_ERRORS)
def test_jsonl_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_annotations(write(tmp_path, "a.jsonl", text))


CSV_ERRORS = [
    ("", r"a\.csv: empty annotation"),
    ("video,caption\n", r"a\.csv: empty annotation"),
    ("video,text\nv.mp4,x\n", r"a\.csv:1: columns video, text; expected video, caption"),
    ("video,caption,mood\nv.mp4,x,y\n", r"a\.csv:1: columns video, caption, mood"),
    ("video,caption\nv.mp4,x\nv.mp4\n", r"a\.csv:3: expected 2 fields"),
    ("video,caption\nv.mp4,x,y\n", r"a\.csv:2: expected 2 fields"),
    ("video,caption\n,x\n", r"a\.csv:2: video='' must be a text"),
    ('video,caption\nv.mp4,"x\n', r"a\.csv:2: not CSV"),
    ("video,caption,video_id\nv.mp4,x,A\nv.mp4,y,B\n", r"a\.csv:3: video_id='B' differs from 'A'"),
    ("video,caption,start\nv.mp4,x,soon\n", r"a\.csv:2: start='soon' must be a number of sec"),
    ("video,caption,start\nv.mp4,x,nan\n", r"a\.csv:2: start='nan' must be a number"),
    ("video,caption,start,end\nv.mp4,x,3,2\n", r"a\.csv:2: start=3.0 and end=2.0 must be 0 <= st"),
    (
        "video,caption,start,key\nv.mp4,x,1,k\nv.mp4,y,2,k\n",
        r"a\.csv:3: duplicate key 'k', first at .*a\.csv:2",
    ),
]


@pytest.mark.parametrize(("text", "message"), CSV_ERRORS)
def test_csv_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_annotations(write(tmp_path, "a.csv", text))


def test_missing_unknown_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none\.csv does not exist"):
        read_annotations(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match=r"a\.txt'.*must end in \.jsonl, \.json, \.csv or"):
        read_annotations(write(tmp_path, "a.txt", ""))
    with pytest.raises(ValueError, match=r"a\.parquet\.gz'.*or in \.parquet"):
        read_annotations(write(tmp_path, "a.parquet.gz", ""))
    (tmp_path / "latin.csv").write_bytes(b"video,caption\nv.mp4,\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.csv:2: not UTF-8 text: byte 0xe9"):
        read_annotations(str(tmp_path / "latin.csv"))
