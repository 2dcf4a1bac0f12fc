"""One bad row of an annotation file costs one clip, named with its file and line."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from builders.clip_files import file_contents, numbered_video, pack_settings, write_clips
from pyarrow import parquet

from tvr.data_prep.annotations import text_files
from tvr.data_prep.annotations.clip_source import AnnotationFile, ClipList
from tvr.data_prep.annotations.text_files import MAX_LINE
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.plan import PackPlan
from tvr.data_prep.packing.plan_build import build_plan
from tvr.data_prep.records import Clip, RefusedRow, TooManyBadSamples

SETTINGS = pack_settings()


def planned(source: Any, folder: Path, max_bad: int) -> tuple[list[Clip], list[RefusedRow]]:
    """Returns the clips and the refused rows of a stored plan."""
    folder.mkdir()
    built = build_plan(source, SETTINGS, folder, max_bad=max_bad)
    rows = built.rows.read_bytes()
    index = built.index.read_bytes()
    plan = PackPlan(built.header, SETTINGS, index, lambda a, b: rows[a:b], folder)
    clips = [clip for number in range(plan.num_shards) for clip in plan.shard_clips(number)]
    assert len(plan.refused_rows()) == plan.header.num_refused
    return clips, plan.refused_rows()


def read(path: Path, max_bad: int = 99) -> tuple[list[str], list[str]]:
    """Returns the keys of the clips, and what is wrong with the refused rows."""
    clips, refused = planned(AnnotationFile(str(path)), path.parent / "plan", max_bad)
    assert all(row.detail.startswith(row.origin) for row in refused)
    return [clip.key for clip in clips], [row.detail for row in refused]


def json_row(**fields: Any) -> bytes:
    return json.dumps({"video": "v.mp4", "caption": "x", **fields}).encode()


BAD_JSONL = {
    "cut off": (b'{"video": "v.mp4", "capt', "not JSON: Unterminated string"),
    "not json": (b"v.mp4,x", "not JSON: Expecting value"),
    "list": (b'["v.mp4", "x"]', "expected a JSON object, found list"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "deep": (b'{"video":' + b"[" * 200_000, "not JSON: maximum recursion depth"),
    "big number": (b'{"start": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "field twice": (b'{"video": "v.mp4", "caption": "x", "caption": "y"}', "a field occurs twice"),
    "unknown": (json_row(captoin="x"), "unknown captoin; allowed are video, captions"),
    "unknown half pair": (b'{"video": "v", "caption": "x", "\\ud83d": 1}', r"unknown \\ud83d"),
    "no caption": (b'{"video": "v.mp4"}', 'give either "captions"'),
    "caption number": (json_row(caption=3), "caption=3 must be text"),
    "caption half pair": (json_row(caption="\ud83d"), "has half of a UTF-16 pair"),
    "reversed": (json_row(start=5, end=2), "start=5.0 and end=2.0 must be 0 <= start < end"),
    "empty cut": (json_row(start=2, end=2), "start=2.0 and end=2.0 must be"),
    "negative": (json_row(start=-1), "start=-1.0 and end=None must be"),
    "nan": (json_row(start=float("nan")), "start=nan must be a number of seconds"),
    "infinite": (json_row(end=float("inf")), "end=inf must be a number of seconds"),
    "overflow": (json_row(end=10**400), "end=1000.* must be a number of seconds"),
    "boolean": (json_row(end=True), "end=True must be a number of seconds"),
    "key": (json_row(key="a/b"), "key='a/b' must be 1 to 80 letters"),
    "key number": (json_row(key=7), "key=7 must be a text"),
    "video null": (json_row(video=None), "video=None must be a text"),
    "video nul": (json_row(video="v\0.mp4"), "must have no control character"),
    "video line": (json_row(video="v\n.mp4"), "must have no control character"),
    "video_id": (json_row(video_id="a\tb"), "video_id=.* must be 1 to 4096 characters"),
    "bytes": (b'{"video": "v.mp4", "caption": "caf\xe9"}', "not UTF-8 text: byte 0xe9 after 34"),
    "raw nul": (b'{"video": "v.mp4", "caption": "\0"}', "not JSON: Invalid control character"),
    "binary": (bytes(range(128, 200)), "not UTF-8 text"),
    "name": (b'{"clip_name": "../../etc/passwd", "caption": "x"}', "must be a name in the folder"),
    "duplicate": (json_row(key="a"), "duplicate key 'a', first at .*:1; give each clip"),
}


@pytest.mark.parametrize("name", BAD_JSONL)
def test_a_bad_line_of_jsonl_costs_one_clip(name: str, tmp_path: Path) -> None:
    line, message = BAD_JSONL[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([json_row(key="a"), line, json_row(key="b", video="w.mp4"), b""]))
    keys, (detail,) = read(path)
    assert keys == ["a", "b"]
    assert detail.startswith(f"{path}:2: ")
    assert len(detail) < 700
    assert re.search(message, detail), detail


BAD_CSV = {
    "few fields": (b"v.mp4,x", "expected 4 fields"),
    "many fields": (b"v.mp4,x,,,,", "expected 4 fields"),
    "reversed": (b"v.mp4,x,5,2", "start=5.0 and end=2.0 must be"),
    "text": (b"v.mp4,x,soon,", "start='soon' must be a number"),
    "nan": (b"v.mp4,x,nan,", "start='nan' must be a number"),
    "no video": (b",x,,", "video='' must be a text"),
    "bytes": (b"v.mp4,caf\xe9,,", "not UTF-8 text: byte 0xe9 after 9 characters"),
    "quote inside": (b'v.mp4,"a "dog"",,', "not CSV: ',' expected after '\"'"),
    "open quote": (b'v.mp4,"a dog,,', "not CSV: "),
    "long": (b"v.mp4," + b"x" * (MAX_LINE + 1) + b",,", "the line has more than 4,194,304 char"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_a_bad_line_of_csv_costs_one_clip(name: str, tmp_path: Path) -> None:
    line, message = BAD_CSV[name]
    path = tmp_path / "a.csv"
    after = [b'c%03d.mp4,"a, b\nc",,' % number for number in range(150)]
    path.write_bytes(b"\n".join([b"video,caption,start,end", b"a.mp4,x,,", line, *after, b""]))
    keys, (detail,) = read(path)
    assert keys == ["a", *(f"c{number:03d}" for number in range(150))]
    assert detail.startswith(f"{path}:3: {message}")


def test_an_open_quote_without_another_one_ends_within_some_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f"c{number:03d}.mp4,x" for number in range(300)]
    rows[20] += '"'  # no quote for CSV: it stands inside of a field
    rows[30] = 'c030.mp4,"x'
    path.write_text("\n".join(["video,caption", *rows]))
    clips, refused = planned(AnnotationFile(str(path)), tmp_path / "plan", 1)
    assert [clip.key for clip in clips] == [f"c{n:03d}" for n in range(300) if n != 30]
    assert clips[20].captions == ('x"',)
    assert [clip.origin for clip in clips[29:31]] == [f"{path}:31", f"{path}:33"]
    assert [row.origin for row in refused] == [f"{path}:32"]
    assert "in a quoted field that begins here" in refused[0].detail


def test_a_long_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE", 1000)
    path = tmp_path / "a.jsonl"
    long = json_row(key="long", caption="x" * 3500)
    path.write_bytes(b"\n".join([json_row(key="a"), long, json_row(key="b", video="w.mp4")]))
    keys, (detail,) = read(path)
    assert keys == ["a", "b"]
    assert detail == f"{path}:2: the line has more than 1,000 characters"


def test_a_bad_value_of_parquet_costs_one_clip(tmp_path: Path) -> None:
    texts = pyarrow.array([b"x", b"caf\xe9", b"y", b"z"]).cast(pyarrow.binary())
    captions = pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers())
    columns = {"video": [f"{name}.mp4" for name in "abcd"], "start": [None, None, 9.0, None]}
    table = pyarrow.table(columns | {"end": [None, None, 3.0, None], "caption": captions})
    parquet.write_table(table, tmp_path / "a.parquet")
    keys, (first, second) = read(tmp_path / "a.parquet")
    assert keys == ["a", "d"]
    assert "a.parquet: row 2: UnicodeDecodeError" in first
    assert "a.parquet: row 3: start=9.0 and end=3.0 must be" in second


def test_of_two_rows_with_one_key_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = ["a.mp4,one,A,", "b.mp4,x,,k", "a.mp4,two,B,", "c.mp4,x,,k", "a.mp4,three,A,"]
    path.write_text("\n".join(["video,caption,video_id,key", *lines]))
    clips, refused = planned(AnnotationFile(str(path)), tmp_path / "plan", 2)
    assert [(clip.key, clip.captions) for clip in clips] == [("a", ("one", "three")), ("k", ("x",))]
    assert [row.origin for row in refused] == [f"{path}:4", f"{path}:5"]
    assert "video_id='B' differs from 'A'" in refused[0].detail
    assert f"duplicate key 'k', first at {path}:3" in refused[1].detail


def test_a_remote_row_that_names_a_local_file_costs_one_clip(tmp_path: Path) -> None:
    url = "memory://rows/a.jsonl"
    with fsspec.open(url, "wb") as file:
        file.write(json_row(video="/etc/passwd") + b"\n" + json_row())  # type: ignore[union-attr]
    clips, (row,) = planned(AnnotationFile(url), tmp_path / "plan", 1)
    assert [clip.key for clip in clips] == ["v"]
    assert row.origin == f"{url}:1"
    assert "must be a URL, or a path without .." in row.detail


def test_a_given_clip_with_half_a_character_is_named(tmp_path: Path) -> None:
    clip = Clip(key="k", video="v.mp4", captions=("\ud83d",), video_id="k", origin="list:7")
    clips, (row,) = planned(ClipList([clip]), tmp_path / "plan", 1)
    assert (clips, row.origin) == ([], "list:7")


def test_too_many_bad_rows_end_planning_early_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(json_row(captoin=n) for n in range(5000)))
    with pytest.raises(TooManyBadSamples) as caught:
        read(path, max_bad=7)
    assert str(caught.value).startswith(
        "8 of the first 8 rows of the annotations are bad, max_bad=7 allowed; nothing was packed;"
        f" first: {path}:1: unknown captoin"
    )
    shutil.rmtree(tmp_path / "plan")
    good = [json_row(key=f"k{n}", video=f"{n}.mp4") for n in range(3000)]
    path.write_bytes(b"\n".join([*good[:5], b"{", *good[5:500], b"[", *good[500:]]))
    with pytest.raises(
        TooManyBadSamples, match=r"^2 of the first 1,00\d rows .*:6: not.*:502: not"
    ):
        read(path, max_bad=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty annotation"),
        ("a.jsonl.gz", gzip.compress(json_row() * 99, mtime=0)[:-20], "is damaged or cut off"),
        ("a.csv.gz", b"video,caption\nv.mp4,x\n", "is damaged or cut off: Not a gzipped file"),
        ("a.jsonl", json_row().decode().encode("utf-16")[:-1], "not utf-16 text: "),
        ("a.csv", b"video,video,caption\nv.mp4,v.mp4,y\n", "columns video, video, caption; expec"),
        ("a.csv", b'video,"caption\nv.mp4,x\n', ":1: not CSV"),
        ("a.parquet", b"PAR1", "not Parquet"),
    ],
    ids=["empty", "cut gzip", "no gzip", "utf-16", "columns", "header", "parquet"],
)
def test_a_file_that_is_wrong_as_a_whole_is_an_error(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


# ------------------------------------------------------------------ packing


def write_rows(folder: Path, *bad: bytes) -> Path:
    """Writes the rows of four videos, with `bad` rows between them."""
    rows = [json_row(video=clip.video) for clip in write_clips(folder, 4)]
    path = folder / f"{len(bad)}.jsonl"
    path.write_bytes(b"\n".join([*rows[:2], *bad, *rows[2:]]))
    return path


def pack(
    path: Path, out: Path, max_bad: int, tasks: Sequence[int] = (0,), num_tasks: int = 1
) -> None:
    for task in tasks:
        pack_shards(
            AnnotationFile(str(path)),
            str(out),
            layout="frames",
            num_frames=2,
            samples_per_shard=2,
            shuffle_seed=0,
            max_bad=max_bad,
            task=task,
            num_tasks=num_tasks,
        )


def bad_of(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]


def test_a_file_with_bad_rows_gives_the_shards_of_the_file_without(tmp_path: Path) -> None:
    path = write_rows(tmp_path, b"{", json_row(video="c00.mp4", start=3, end=1))
    pack(write_rows(tmp_path), tmp_path / "clean", 0)
    pack(path, tmp_path / "out", 2)
    clean, found = file_contents(tmp_path / "clean"), file_contents(tmp_path / "out")
    for name in ("shard-000000.tar", "shard-000001.tar", "samples.rows"):
        assert found[name] == clean[name]
    assert [(bad["key"], bad["reason"]) for bad in bad_of(tmp_path / "out")] == [
        (f"{path}:3", "bad_row"),
        (f"{path}:4", "bad_row"),
    ]
    assert json.loads(found["manifest.json"])["bad"] == {"bad_row": 2}
    assert verify_dataset(str(tmp_path / "out")).problems == ()


def test_bad_rows_count_once_over_all_tasks(tmp_path: Path) -> None:
    path = write_rows(tmp_path, b"{", json_row(video="gone.mp4"), b"[]")
    pack(path, tmp_path / "whole", 3)
    pack(path, tmp_path / "out", 3, tasks=(1, 0), num_tasks=2)
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "whole")
    assert [bad["reason"] for bad in bad_of(tmp_path / "out")] == [
        *("bad_row", "bad_row", "missing_file")
    ]
    # The rows are kept with the plan, so a task that joins it counts them too.
    stored = tmp_path / "planned"
    pack_plan(path, stored, 3)
    with pytest.raises(TooManyBadSamples, match=r"3 bad samples .*max_bad=2 allowed .2 bad_row"):
        pack(path, stored, 2, tasks=(0, 1), num_tasks=2)
    pack(path, stored, 3, tasks=(0, 1), num_tasks=2)
    assert file_contents(stored) == file_contents(tmp_path / "whole")


def pack_plan(path: Path, out: Path, max_bad: int) -> None:
    settings: dict[str, Any] = {"layout": "frames", "num_frames": 2, "samples_per_shard": 2}
    source = AnnotationFile(str(path))
    pack_shards(source, str(out), **settings, shuffle_seed=0, max_bad=max_bad, plan_only=True)


def test_a_file_of_bad_rows_only_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n[]\n")
    with pytest.raises(ValueError, match=r"no clip but 2 bad rows: .*:1: not JSON"):
        pack(path, tmp_path / "out", 5)
    with pytest.raises(TooManyBadSamples, match="2 of the first 2 rows"):
        pack(path, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["hhttps://x/y.mp4", "http://[bad/x.mp4", "github://a/b.mp4"])
def test_a_url_that_no_client_can_open_costs_its_clip(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.mp4").write_bytes(numbered_video(4))
    rows = [{"video": "a.mp4", "caption": "a dog"}, {"video": url, "caption": "a cat", "key": "k"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = pack_shards(
        AnnotationFile(str(path)), str(tmp_path / "data"), layout="video", max_bad=1, processes=0
    )
    assert manifest is not None
    assert (manifest.num_samples, manifest.bad) == (1, {"missing_file": 1})
    (line,) = (tmp_path / "data" / "bad.jsonl").read_text().splitlines()
    assert "its URL cannot be opened" in json.loads(line)["detail"]
