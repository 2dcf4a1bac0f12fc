"""Videos of any name: keys are unique and readable, stay as they were, and lead to the file."""

from __future__ import annotations

import csv
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import numbered_video

from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_of
from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.annotations.video_lookup import VideoFiles
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.storage.storage import Storage, is_chained

CAFE = "caf\u00e9.mp4"
NAMES = [
    *("v.mp4", "A.mp4", "a.mp4", "video_01-b.mp4"),
    *("\u6771\u4eac.mp4", "\u5927\u962a.mp4", "\u0645\u0631\u062d\u0628\u0627.mp4"),
    *(CAFE, unicodedata.normalize("NFD", CAFE), "\U0001f600.mp4", "\U0001f600\U0001f601.mp4"),
    *("a b.mp4", "a_b.mp4", "a%20b.mp4", "x.y.mp4", "x-y.mp4", "x_y.mp4"),
    *("#.mp4", "?.mp4", "*.mp4", "[1].mp4", "a::b.mp4", "zip::c.mp4", "a#b?c=1.mp4"),
    *("-v.mp4", "--help.mp4", "v..mp4", "v .mp4", " v.mp4", ".v.mp4", ".mp4", "v", "v.avi"),
    *("~v.mp4", "$HOME.mp4", "a'b\"c.mp4", "a\\b.mp4", "a|b;c&d.mp4", "{a}.mp4", "%s.mp4"),
    *("p/v.mp4", "q/v.mp4", "p/\u6771\u4eac.mp4", "q r/a b.mp4", "p::q/v.mp4", "[ab]/v.mp4"),
    *("n" * 76 + ".mp4", "n" * 80 + "1.mp4", "n" * 80 + "2.mp4", "m" * 250 + ".mp4"),
    *("\u3042" * 80 + ".mp4", "e\u0301" * 60 + ".mp4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos with all these names, and annotation files of them."""
    folder = tmp_path_factory.mktemp("names")
    video = numbered_video(2)
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        # A box of free space makes the content of each file its own.
        (folder / name).write_bytes(video + b"\0\0\0\x0cfree" + NAMES.index(name).to_bytes(4))
    rows = [{"video": name, "caption": f"caption {n}"} for n, name in enumerate(NAMES)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption"])
        writer.writerows((row["video"], row["caption"]) for row in [*rows, *rows])
    return folder


def members(out: Path) -> dict[str, dict[str, Any]]:
    """Returns the JSON member of each sample by its key."""
    with tarfile.open(out / "shard-000000.tar") as shard:
        names = [name for name in shard.getnames() if name.endswith(".json")]
        files = {name.removesuffix(".json"): shard.extractfile(name) for name in names}
        return {key: json.load(file) for key, file in files.items() if file is not None}


def test_videos_of_any_name_are_packed_and_found_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_shards(AnnotationFile(str(folder / "a.jsonl")), str(out), layout="frames", num_frames=1)
    found = members(out)
    assert len(found) == len(NAMES)
    assert all(KEY_PATTERN.fullmatch(key) for key in found)
    assert verify_dataset(str(out)).problems == ()
    named = {meta["captions"][0]: (key, meta) for key, meta in found.items()}
    for number, name in enumerate(NAMES):
        key, meta = named[f"caption {number}"]
        if Path(name).name.removesuffix(".mp4") != key:
            # The key does not tell the file, so the sample's JSON does.
            assert meta["source"] == str(folder / name)
        else:
            assert "source" not in meta
    keys = {name: named[f"caption {number}"][0] for number, name in enumerate(NAMES)}
    # As they always were.
    for name in ("v.mp4", "A.mp4", "a.mp4", "video_01-b.mp4", "-v.mp4", "n" * 76 + ".mp4"):
        assert keys[name] == name.removesuffix(".mp4")
    assert (keys["a b.mp4"], keys["a%20b.mp4"], keys["x.y.mp4"]) == ("a_b", "a_20b", "x_y")
    # Readable.
    assert keys[CAFE].startswith("cafe-")
    assert keys["q/v.mp4"].startswith("v-")
    assert keys["x_y.mp4"].startswith("x_y-")
    assert keys["\u6771\u4eac.mp4"].startswith("video-")


def test_rows_of_colliding_names_are_merged_by_video(folder: Path) -> None:
    clips = read_annotations(str(folder / "a.csv"))
    assert {len(clip.captions) for clip in clips} == {2}
    assert [clip.video for clip in clips] == [str(folder / name) for name in NAMES]
    assert len({clip.key for clip in clips}) == len(NAMES)
    assert [clip.video_id for clip in clips] == [clip.key for clip in clips]


def test_keys_depend_on_names_and_not_on_folders(folder: Path, tmp_path: Path) -> None:
    keys = [clip.key for clip in read_annotations(str(folder / "a.jsonl"))]
    moved = read_annotations(str(folder / "a.jsonl"), videos=str(tmp_path))
    assert [clip.key for clip in moved] == keys
    for name in NAMES:
        assert key_of(name) == key_of(f"/other/{name}") == key_of(f"s3://bucket/{name}")


def test_a_key_that_a_row_gives_comes_before_made_ones(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"video": "p/v.mp4", "caption": "made"},
        {"video": "w.mp4", "caption": "given", "key": "v"},
        {"video": "q/v.mp4", "caption": "made too", "video_id": "film"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, given, second = read_annotations(str(tmp_path / "a.jsonl"))
    assert (given.key, given.captions) == ("v", ("given",))
    assert first.key != second.key
    assert first.key.startswith("v-")
    assert (first.video_id, second.video_id) == (first.key, "film")


def test_cuts_of_long_names_and_equal_milliseconds_have_keys_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"video": "m" * 90 + ".mp4", "caption": "x", "start": 1, "end": 2},
        {"video": "m" * 90 + ".mp4", "caption": "x", "start": 2, "end": 3},
        {"video": "v.mp4", "caption": "x", "start": 1.0001, "end": 2},
        {"video": "v.mp4", "caption": "x", "start": 1.0002, "end": 2},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = [clip.key for clip in read_annotations(str(tmp_path / "a.jsonl"))]
    assert len(set(keys)) == 4
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert keys[0].endswith("_1000_2000")
    assert keys[2] == "v_1000_2000"
    assert keys[3].startswith("v_1000_2000-")


@pytest.mark.parametrize("name", ["a::b.mp4", "zip::c.mp4", "*.mp4", "[1].mp4", "a#b?c=1.mp4"])
def test_a_local_path_is_a_path_whatever_its_characters(name: str, folder: Path) -> None:
    number = NAMES.index(name).to_bytes(4)
    assert Storage(str(folder / name)).read_root().endswith(number)
    assert Storage(f"file://{folder / name}").read_root().endswith(number)
    assert Storage(str(folder)).read(name).endswith(number)
    assert VideoFiles(str(folder)).find(name) == str(folder / name)


def test_a_chain_of_file_systems_is_still_one(folder: Path, tmp_path: Path) -> None:
    assert is_chained("zip://a.mp4::s3://bucket/b.zip")
    content = Storage(f"simplecache::file://{folder}/v.mp4").read_root()
    assert content == (folder / "v.mp4").read_bytes()
