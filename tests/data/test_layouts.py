"""Published layouts, and annotation files as spreadsheets and other programs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import numbered_video, read_number

from tvr.data_prep import cli
from tvr.data_prep.annotations.benchmarks import Dataset, Selection, read_benchmark
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Clip


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
]


def test_vatex(tmp_path: Path) -> None:
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(VATEX))
    touch(tmp_path, "-9XxcO0hTVs_000010_000020.mp4", "raw/__abcdefghi.mkv")
    selection = select(tmp_path, "vatex", "train")
    assert places(tmp_path, selection.clips) == [
        ("-9XxcO0hTVs_000010_000020", "-9XxcO0hTVs_000010_000020.mp4", None),
        ("__abcdefghi_000100_000110", "raw/__abcdefghi.mkv", (100.0, 110.0)),
        ("gone_000001_000011", "gone_000001_000011.mp4", None),
    ]
    assert selection.clips[0].captions == ("A man is cooking.", "Someone cooks.")
    assert selection.without_file == ("gone_000001_000011",)
    assert [row.detail.partition("json: ")[2] for row in selection.refused] == [
        "[3]: no_captions: enCap=None must be a list of texts",
        "[4]: videoID=None must be text",
    ]
    assert selection.summary()[0] == "vatex train: 3 clips, published 25,991 (-25,988)"
    assert selection.summary()[1].startswith("rows that are no clip: 2 (")


def test_the_halves_of_vatex_follow_their_lists(tmp_path: Path) -> None:
    (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(VATEX))
    (tmp_path / "test_list.txt").write_text("__abcdefghi_000100_000110\nunknown\n")
    touch(tmp_path)
    selection = select(tmp_path, "vatex", "test-1500")
    assert [clip.key for clip in selection.clips] == ["__abcdefghi_000100_000110"]
    assert selection.without_captions == ("unknown",)
    assert len(selection.not_listed) == 2
    assert len(select(tmp_path, "vatex", "val").clips) == 3


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
