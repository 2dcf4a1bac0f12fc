"""Published layouts, and annotation files as spreadsheets and other programs write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import numbered_video, read_number

from tvr.data_prep import cli
from tvr.data_prep.annotations.benchmarks import Dataset, Selection, read_benchmark
from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.annotations.read import annotated_clips, read_annotations
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.file_formats import json_items
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Clip, RefusedRow


def select(folder: Path, dataset: Dataset, split: str) -> Selection:
    return read_benchmark(dataset, split, annotations=str(folder), videos=str(folder / "videos"))


def touch(folder: Path, *names: str) -> None:
    (folder / "videos").mkdir(exist_ok=True)
    for name in names:
        path = folder / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def places(folder: Path, clips: tuple[Clip, ...]) -> list[tuple[str, str, Any]]:
    """(key, file below the folder of videos, span) of clips."""
    root = f"{folder}/videos/"
    return [(clip.key, clip.video.removeprefix(root), clip.span) for clip in clips]


# --------------------------------------------------------- published layouts

VATEX = [
    {
        "videoID": "-9XxcO0hTVs_000010_000020",
        "enCap": ["A man is cooking.", "Someone cooks."],
        "chCap": ["\u4e00\u4e2a\u7537\u4eba"],
    },
    {"videoID": "__abcdefghi_000100_000110", "enCap": ["A dog runs."], "chCap": []},
    {"videoID": "gone_000001_000011", "enCap": ["Nobody is there."]},
    {"videoID": "no_captions", "chCap": ["\u4e00"]},
    {"enCap": ["no id"]},
    {"videoID": "half", "enCap": ["\ud83d"]},
    {"videoID": "a b", "enCap": ["x"]},
    {"videoID": "a_b", "enCap": ["y"]},
]


def test_a_published_file_of_one_line_may_be_of_any_length(tmp_path: Path) -> None:
    entries = [{"videoID": "abcdefghijk_000010_000020", "enCap": ["x" * 3000, "a dog"]}] * 1500
    entries = [{**each, "videoID": f"abc{n:08d}_000010_000020"} for n, each in enumerate(entries)]
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(entries))
    found = read_benchmark("vatex", "train", annotations=str(tmp_path), videos=str(tmp_path))
    assert (len(found.clips), len(found.refused)) == (1500, 0)


@pytest.mark.parametrize("name", ["A.CSV", "a.Tsv", "a.JSONL", "a.ndjson"])
def test_capitals_of_names_and_columns_do_not_matter(tmp_path: Path, name: str) -> None:
    rows = {
        "A.CSV": "Video,Caption\na.mp4,a dog\n",
        "a.Tsv": "VIDEO\tCAPTION\na.mp4\ta dog\n",
    }
    line = json.dumps({"video": "a.mp4", "caption": "a dog"}) + "\n"
    (tmp_path / name).write_text(rows.get(name, line))
    (clip,) = read_annotations(str(tmp_path / name))
    assert (clip.key, clip.captions) == ("a", ("a dog",))


def test_a_cell_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("video,caption\na.mp4," + "dog " * 60_000 + "\n")
    (clip,) = read_annotations(str(tmp_path / "a.csv"))
    assert len(clip.captions[0]) == 240_000


def test_two_lists_of_rows_are_refused(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "caption": "a dog"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"clips": rows, "annotations": rows}))
    with pytest.raises(ValueError, match=r"a\.json.*a second list of rows, 'annotations'"):
        read_annotations(str(path))


def test_vatex(tmp_path: Path) -> None:
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(VATEX))
    touch(tmp_path, "-9XxcO0hTVs_000010_000020.mp4", "raw/__abcdefghi.mkv")
    selection = select(tmp_path, "vatex", "train")
    key_of_second = selection.clips[-1].key
    assert key_of_second.startswith("a_b-")
    assert places(tmp_path, selection.clips) == [
        ("-9XxcO0hTVs_000010_000020", "-9XxcO0hTVs_000010_000020.mp4", None),
        ("__abcdefghi_000100_000110", "raw/__abcdefghi.mkv", (100.0, 110.0)),
        ("gone_000001_000011", "gone_000001_000011.mp4", None),
        ("a_b", "a b.mp4", None),
        (key_of_second, "a_b.mp4", None),
    ]
    assert selection.clips[0].captions == ("A man is cooking.", "Someone cooks.")
    assert selection.without_file == ("gone_000001_000011", "a b", "a_b")
    assert [row.detail.partition("json: ")[2] for row in selection.refused] == [
        "[3]: no_captions: enCap=None must be a list of texts",
        "[4]: videoID=None must be text",
        "[5]: caption '\\ud83d': half of a UTF-16 pair after 0 characters",
    ]
    assert selection.summary()[0] == "vatex train: 5 clips, published 25,991 (-25,986)"
    assert selection.summary()[-1].startswith("bad rows: 3 (")


def test_the_halves_of_vatex_follow_their_lists(tmp_path: Path) -> None:
    (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(VATEX))
    (tmp_path / "test_list.txt").write_text("__abcdefghi_000100_000110\nunknown\n")
    touch(tmp_path)
    selection = select(tmp_path, "vatex", "test-1500")
    assert [clip.key for clip in selection.clips] == ["__abcdefghi_000100_000110"]
    assert selection.without_captions == ("unknown",)
    assert len(selection.not_listed) == 5
    assert len(select(tmp_path, "vatex", "val").clips) == 5


def lsmdc_line(clip: str, sentence: str) -> str:
    times = ("00.00.51.926", "00.00.54.129") * 2
    return "\t".join((clip, *times, sentence))


AMERICAN_BEAUTY = "0001_American_Beauty_00.00.51.926-00.00.54.129"
FAR_FROM = "3009_BATTLE_LOS_ANGELES_00.01.01.111-00.01.03.222"


def test_lsmdc(tmp_path: Path) -> None:
    lines = [
        lsmdc_line(AMERICAN_BEAUTY, 'SOMEONE says "hi", twice.'),
        lsmdc_line(FAR_FROM, "He turns."),
        lsmdc_line(FAR_FROM, "He turns again."),
        "a line of\ttwo fields",
        "",
        lsmdc_line("../secret_00.00.51.926-00.00.54.129", "x"),
    ]
    (tmp_path / "LSMDC16_annos_training.csv").write_bytes("\r\n".join(lines).encode())
    movie = AMERICAN_BEAUTY[:20]
    touch(tmp_path, f"{movie}/{AMERICAN_BEAUTY}.avi", f"{FAR_FROM}.avi")
    selection = select(tmp_path, "lsmdc", "train")
    assert places(tmp_path, selection.clips) == [
        (
            "0001_American_Beauty_00_00_51_926-00_00_54_129",
            f"{movie}/{AMERICAN_BEAUTY}.avi",
            None,
        ),
        ("3009_BATTLE_LOS_ANGELES_00_01_01_111-00_01_03_222", f"{FAR_FROM}.avi", None),
    ]
    assert [clip.captions for clip in selection.clips] == [
        ('SOMEONE says "hi", twice.',),
        ("He turns.", "He turns again."),
    ]
    assert selection.clips[0].video_id == AMERICAN_BEAUTY
    assert [row.origin.rpartition(":")[2] for row in selection.refused] == ["4", "6"]
    assert "published 101,079" in selection.summary()[0]


def test_youcook2(tmp_path: Path) -> None:
    def video(subset: str, *segments: Any) -> dict[str, Any]:
        annotations = [
            {"id": number, "segment": segment, "sentence": f"step {number} "}
            for number, segment in enumerate(segments)
        ]
        more = {"duration": 311.77, "recipe_type": "113", "video_url": "https://x"}
        return {**more, "subset": subset, "annotations": annotations}

    database = {
        "GLd3aX16zBg": video("training", [90, 102], [114, 127.5], [200, 100], ["a", 1]),
        "xHr8X2Wpmno": video("validation", [1, 2]),
        "fn9anlEL4FI": video("training", [0, 3]),
        "broken": {"subset": "training"},
    }
    path = tmp_path / "youcookii_annotations_trainval.json"
    path.write_text(json.dumps({"database": database}))
    touch(tmp_path, "training/113/GLd3aX16zBg.mp4", "fn9anlEL4FI.webm", "xHr8X2Wpmno.mp4")
    selection = select(tmp_path, "youcook2", "train")
    assert places(tmp_path, selection.clips) == [
        ("GLd3aX16zBg_0", "training/113/GLd3aX16zBg.mp4", (90.0, 102.0)),
        ("GLd3aX16zBg_1", "training/113/GLd3aX16zBg.mp4", (114.0, 127.5)),
        ("fn9anlEL4FI_0", "fn9anlEL4FI.webm", (0.0, 3.0)),
    ]
    assert selection.clips[1].captions == ("step 1",)
    origins = [row.origin.removeprefix(f"{path}: ") for row in selection.refused]
    assert origins == ["GLd3aX16zBg[2]", "GLd3aX16zBg[3]", "broken"]
    assert [clip.key for clip in select(tmp_path, "youcook2", "val").clips] == ["xHr8X2Wpmno_0"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a dict, found list"):
        select(tmp_path, "youcook2", "train")


def test_webvid(tmp_path: Path) -> None:
    rows = [
        "videoid,contentUrl,duration,page_dir,name",
        '21179416,https://x/21179416.mp4,PT00H00M11S,006001_006050,"Aerial shot, winter forest"',
        "5629184,https://x/5629184.mp4,PT00H00M29S,071501_071550,Senior couple",
        "1,https://x,PT00H00M29S,000001_000050,gone",
        "2,https://x",
    ]
    (tmp_path / "results_2M_val.csv").write_text("\n".join(rows))
    touch(tmp_path, "006001_006050/21179416.mp4", "part0/5629184.mp4")
    selection = select(tmp_path, "webvid", "val-2m")
    assert places(tmp_path, selection.clips) == [
        ("21179416", "006001_006050/21179416.mp4", None),
        ("5629184", "part0/5629184.mp4", None),
        ("1", "000001_000050/1.mp4", None),
    ]
    assert selection.clips[0].captions == ("Aerial shot, winter forest",)
    assert selection.without_file == ("1",)
    assert [row.origin.rpartition(":")[2] for row in selection.refused] == ["5"]
    assert selection.summary()[0] == "webvid val-2m: 3 clips"
    (tmp_path / "results_2M_train.csv").write_text("videoid,caption\n1,x\n")
    with pytest.raises(ValueError, match="csv:1: columns videoid, caption; expected videoid, page"):
        select(tmp_path, "webvid", "train-2m")


def test_the_segments_of_a_published_file_are_packed(tmp_path: Path) -> None:
    annotations = [
        {"id": number, "segment": segment, "sentence": f"step {number}"}
        for number, segment in enumerate(([0, 1], [2, 3], [9, 3]))
    ]
    database = {"abc": {"subset": "validation", "annotations": annotations}}
    (tmp_path / "youcookii_annotations_trainval.json").write_text(
        json.dumps({"database": database})
    )
    touch(tmp_path)
    (tmp_path / "videos" / "abc.mp4").write_bytes(numbered_video(40))
    folders = ["--annotations", str(tmp_path), "--videos", str(tmp_path / "videos")]
    out = ["--out", str(tmp_path / "data"), "--layout", "frames", "--num-frames", "1"]
    command = [*folders, *out, "--dataset", "youcook2", "--split", "val", "--processes", "1"]
    assert cli.pack(command) == 2
    assert cli.pack([*command, "--max-bad", "1", "--shuffle-seed", "None"]) == 0
    manifest = read_manifest(str(tmp_path / "data"))
    assert manifest.samples.key.tolist() == ["abc_0", "abc_1"]
    assert manifest.bad == {"bad_row": 1}
    reader = SampleReader(str(tmp_path / "data"), num_frames=1, image_size=32)
    numbers = [read_number(reader.decode(row, 1, None)[1][0]) for row in range(2)]
    assert numbers == [5, 25]


# ------------------------------------------------------------ files of tables


def read(folder: Path, name: str, content: str | bytes) -> list[tuple[str, tuple[str, ...]]]:
    """(video, captions) of an annotation file with this content."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    clips = read_annotations(str(path))
    return [(clip.video.removeprefix(f"{folder}/"), clip.captions) for clip in clips]


A_AND_B = [("a.mp4", ("one, two", "three")), ("b.mp4", ("four; five",))]
TABLES = {
    "commas.csv": 'video,caption\na.mp4,"one, two"\na.mp4,three\nb.mp4,four; five\n',
    "semicolons.csv": 'video;caption\na.mp4;one, two\na.mp4;three\nb.mp4;"four; five"\n',
    "tabs.csv": "video\tcaption\na.mp4\tone, two\na.mp4\tthree\nb.mp4\tfour; five\n",
    "tabs.tsv": "caption\tvideo\none, two\ta.mp4\nthree\ta.mp4\nfour; five\tb.mp4\n",
    "sep.csv": 'sep=;\nvideo;caption\na.mp4;one, two\na.mp4;three\nb.mp4;"four; five"\n',
    "spaces.csv": 'video , caption\na.mp4,"one, two"\na.mp4,three\n\nb.mp4,four; five\n',
    "unnamed.csv": 'video;caption;;\na.mp4;one, two;;\na.mp4;three;;\n;;;\nb.mp4;"four; five";;',
    "quoted.csv": '"video","caption"\n"a.mp4","one, two"\n"a.mp4","three"\n"b.mp4","four; five"',
}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-32"],  # these have a byte-order mark, but for the first
)
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_any_separator_encoding_and_line_end(
    tmp_path: Path, name: str, encoding: str, ends: str
) -> None:
    content = TABLES[name].replace("\n", ends).encode(encoding)
    assert read(tmp_path, name, content) == A_AND_B
    with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
        file.write(content)
    assert len(read_annotations(str(tmp_path / f"{name}.gz"))) == 2


def test_utf16_without_mark_and_other_encodings_are_refused(tmp_path: Path) -> None:
    for encoding in ("utf-16-be", "latin-1"):
        content = "video,caption\na.mp4,\u00e9t\u00e9\n".encode(encoding)
        with pytest.raises(ValueError, match=r"a\.csv"):
            read(tmp_path, "a.csv", content)


def test_the_separator_follows_from_the_header_alone(tmp_path: Path) -> None:
    # Both characters are more frequent in the rows than the separator is.
    rows = "".join(f"v{n}.mp4,a;b;c;d\te\tf\tg\n" for n in range(3))
    assert read(tmp_path, "a.csv", "video,caption\n" + rows)[0] == (
        "v0.mp4",
        ("a;b;c;d\te\tf\tg",),
    )
    for name, text in (
        ("a.csv", "video|caption\na.mp4|x\n"),
        ("a.csv", "video,text\na.mp4,x\n"),
        ("a.csv", "video,video,caption\na.mp4,a.mp4,x\n"),
        ("a.csv", "video,caption,captions\na.mp4,x,y\n"),
        ("a.csv", "video,,caption\na.mp4,,x\n"),
        ("a.tsv", "video,caption\na.mp4,x\n"),
    ):
        with pytest.raises(ValueError, match=r"a\.[ct]sv:1: columns .*; expected video, caption"):
            read(tmp_path, name, text)


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('video,captions\na.mp4,"[""one"", ""two"", null]"\n', ("one", "two")),
        ("video;caption\na.mp4;['one', \"it's\", None]\n", ("one", "it's")),
        ("video;caption\na.mp4;[]\n", ()),
        ("video,caption\na.mp4,[Music] plays [softly]\n", ("[Music] plays [softly]",)),
        ("video,caption\na.mp4,[1]\n", ("[1]",)),
        ("video,caption_2,caption_10,caption_1\na.mp4,two,ten,one\n", ("one", "two", "ten")),
        ("video,caption_1,caption_2\na.mp4,one,\n", ("one",)),
        ("video,caption_1,caption_2\na.mp4,,\n", ("",)),
        ("video,caption,caption\na.mp4,one,two\n", ("one", "two")),
        ("video,caption,caption_1\na.mp4,\"['a', 'b']\",c\n", ("a", "b", "c")),
        ("video,caption\na.mp4,\n", ("",)),
    ],
    ids=[
        *("json list", "python list", "empty list", "brackets", "number", "numbered", "fewer"),
        *("none of several", "repeated", "mixed", "empty"),
    ],
)
def test_several_captions_in_a_row(tmp_path: Path, text: str, captions: tuple[str, ...]) -> None:
    assert read(tmp_path, "a.csv", text) == [("a.mp4", captions)]


# --------------------------------------------------------------- files of JSON

ROWS = [
    {"video": "a.mp4", "caption": "one"},
    {"video": "a.mp4", "captions": ["two", None]},
    {"video": "b.mp4", "caption": ["three", "four"]},
    {"video": "c.mp4", "caption_2": "six", "caption_1": "five"},
    {"video": "d.mp4", "caption": None},
]
READ = [
    *(("a.mp4", ("one", "two")), ("b.mp4", ("three", "four")), ("c.mp4", ("five", "six"))),
    ("d.mp4", ()),
]
JSON_FILES = {
    "list": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=2),
    "field": json.dumps({"info": {"year": 2020}, "annotations": ROWS, "licenses": [1]}),
    "data": json.dumps({"version": 1, "data": ROWS}, indent=1),
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "indented lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "videos": json.dumps(
        {
            **{"a.mp4": ["one", "two"], "b.mp4": {"captions": ["three", "four"]}},
            **{"c.mp4": {"caption_1": "five", "caption_2": "six"}, "d.mp4": None},
        }
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", JSON_FILES)
def test_json_files(
    tmp_path: Path, form: str, piece: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_items, "PIECE", piece)
    content = JSON_FILES[form].replace("\n", "\r\n").encode(encoding)
    assert read(tmp_path, "a.json", content) == READ


def test_names_of_videos_as_fields_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "v7.webm").write_bytes(b"")
    text = json.dumps({"v7": "one", "sub/w.mp4": "two"})
    assert read(tmp_path, "a.json", text) == [("v7.webm", ("one",)), ("sub/w.mp4", ("two",))]
    assert AnnotationFile(str(tmp_path / "a.json")).identity() is not None
    source = AnnotationFile(str(tmp_path / "a.json"))
    assert len(list(source.rows())) == 2
    assert source.identity() is None  # the folder may change, the file need not


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "caption": "one"}
    assert read(tmp_path, "a.json", json.dumps(row)) == [("a.mp4", ("one",))]


def test_many_videos_as_fields_need_the_memory_of_a_few(tmp_path: Path) -> None:
    names = [f"v{number}.mp4" for number in range(200)]
    # With so many fields, even one of this name is a video.
    text = json.dumps({**dict.fromkeys(names, "x"), "annotations": ["y"]})
    (tmp_path / "annotations.mp4").write_bytes(b"")
    found = read(tmp_path, "a.json", text)
    assert len(found) == 201
    assert found[-1] == ("annotations.mp4", ("y",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"video": "a.mp4", "caption": "x"},\n{"video": }]', r"a\.json:2: not JSON: Expecting"),
        ('[{"video": "a.mp4", "caption": "x"}\n{}]', r"a\.json:2: .*expected ','"),
        ('[{"video": "a.mp4", "caption": "x"}', r"a\.json:1: .*the file ends"),
        ('[{"video": "a.mp4", "caption": "x"}]\n\n[]', r"a\.json:3: .*more text after the end"),
        ("3", r"a\.json:1: .*expected a list or an object"),
        ("", r"a\.json: empty annotation"),
        ("[]", r"a\.json: empty annotation"),
        ("[\n[1]]", r"a\.json:2: expected a JSON object, found list"),
        ("[" * 100_000, r"a\.json:1: .*nested too deeply"),
        ('[{"video": "a.mp4", "text": "x"}]', r"a\.json:1: unknown text; allowed are video"),
    ],
    ids=[
        *("value", "comma", "cut off", "two values", "number", "empty", "no row", "list", "deep"),
        "field",
    ],
)
def test_errors_of_json_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.json", text)


def test_a_row_without_end_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_items, "PIECE", 100)
    monkeypatch.setattr(json_items, "MAX_ROW", 1000)
    row = json.dumps({"video": "a.mp4", "caption": "x" * 10_000})
    with pytest.raises(ValueError, match=r"a\.json:2: .*no value of at most 1,000 characters"):
        read(tmp_path, "a.json", f"[\n{row}\n]")


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        (
            "a.json",
            b'[{"video": "a.mp4", "caption": "one"},\n{"video": "b.mp4", "video": "c.mp4",'
            b' "caption": "x"},\n7,\n{"video": "d.mp4", "caption": "\xff"},\n'
            b'{"video": "z.mp4", "caption": "last"}]',
            ("2", "3", "4"),
        ),
        (
            "a.tsv",
            b"video\tcaption\na.mp4\tone\nb.mp4\nc.mp4\t\xff\nd.mp4\t['x' 'y']\nz.mp4\tlast\n",
            ("3", "4", "5"),
        ),
        (
            "a.csv",
            "video;caption\na.mp4;one\nb.mp4;x;y\nz.mp4;last\n".encode("utf-16"),
            ("3",),
        ),
    ],
    ids=["json", "tsv", "utf-16"],
)
def test_a_bad_row_spoils_no_other(
    tmp_path: Path, name: str, content: bytes, lines: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(annotated_clips(str(tmp_path / name)))
    good = [row.clip.key for row in rows if not isinstance(row, RefusedRow)]
    refused = [row.origin.rpartition(":")[2] for row in rows if isinstance(row, RefusedRow)]
    assert (good, tuple(refused)) == (["a", "z"], lines)
