"""Inputs that the fuzz run found, each of which ended a command or was used although damaged."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import resource
import tarfile
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import make_dataset, write_clips
from builders.counter_files import Encoding, make_video

from tvr.data_prep import cli
from tvr.data_prep.annotations.benchmark_files import Refusals, msrvtt_captions
from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.annotations.safe_pickle import load_plain_pickle
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.foreign_tar import sample_files
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.packing.output_files import seal, unseal
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import BadSample, Clip, ShardCorrupt
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.data_prep.video.reencode import reencode_video
from tvr.trainer.checkpoint.catalogue import best_step, list_candidates, read_state

ROW = b'{"video": "v.mp4", "caption": "x"}\n'
DEEP = b"[" * 100_000
PACKED = gzip.compress(ROW * 50, mtime=0)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PACKED[:-9], id="truncated"),
        pytest.param(PACKED[:-8] + b"\0" * 8, id="another checksum"),
        pytest.param(PACKED[:12] + b"\xff" * 8 + PACKED[20:], id="damaged"),
        pytest.param(b"no gzip", id="no gzip"),
    ],
)
def test_a_damaged_gzip_file_is_named_in_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    arguments = ["--annotations", str(path), "--out", str(tmp_path / "out"), "--layout", "frames"]
    assert cli.pack(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: " in line
    assert "damaged" in line


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"video": ["a.mp4", "b.mp4"], "caption": ["first one", "second one"]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    assert len(read_annotations(str(path))) == 2
    for damaged in (
        whole.replace(b"first one", b"f\xffrst one"),  # no UTF-8
        whole[:8] + b"\xff" * 30 + whole[38:],  # no header of a page
        whole[:-100] + b"\xff" * 92 + whole[-8:],  # no footer
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: (not Parquet|row 1: Unicode)"):
            read_annotations(str(path))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(DEEP, id="deeply nested"),
        pytest.param(b'{"video": "v.mp4", "captions": ' + DEEP, id="a deeply nested value"),
        pytest.param(b'{"video": "v.mp4", "caption": ' + b"9" * 5000 + b"}", id="5000 digits"),
    ],
)
def test_json_that_python_cannot_read_names_its_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON"):
        read_annotations(str(path))
    (tmp_path / "a.json").write_bytes(line)
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        msrvtt_captions(str(tmp_path / "a.json"), Refusals())


@pytest.mark.parametrize("name", ["[]", "{}", "7", "null"])
def test_a_field_of_json_whose_name_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"v": ["x"],\n' + name + ': ["y"]}')
    with pytest.raises(ValueError, match=r"a\.json:2: .*name of a field must be a text"):
        read_annotations(str(path))


def test_a_time_beyond_all_floats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"video": "v.mp4", "caption": "x", "start": 10**400}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: start=1000"):
        read_annotations(str(path))


def test_a_name_that_leaves_the_folder_of_videos_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"clip_name": "../v", "caption": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: '\.\./v' must be a name in the folder"):
        read_annotations(str(path))


def test_a_pickle_cannot_ask_for_gigabytes() -> None:
    content = pickle.dumps({"v": [["a", "dog"]]}, protocol=2)
    assert load_plain_pickle(content, "c.pkl") == {"v": [["a", "dog"]]}
    # As a table, the numbered objects would take 16 GiB.
    bomb = content[:2] + b"]r" + (1 << 30).to_bytes(4, "little") + b"0" + content[2:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_plain_pickle(bomb, "c.pkl") == {"v": [["a", "dog"]]}
    assert load_plain_pickle(b"]p99999999999\n.", "c.pkl") == []
    with pytest.raises(ValueError, match=r"c\.pkl: refused: it asks for a bytearray"):
        load_plain_pickle(b"\x80\x05\x96" + (1 << 36).to_bytes(8, "little") + b"a.", "c.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB


def test_a_clip_that_the_encoder_refuses_costs_one_clip(tmp_path: Path) -> None:
    """A frame that is shown for eight hours of a transport stream's ticks does not fit into MP4."""
    gap = make_video(Encoding(frames=3, ticks=(0, 40, 8 * 3_600_000), container="mpegts"))
    with pytest.raises(BadSample, match="unreadable: it cannot be re-encoded"):
        reencode_video(gap, short_side=None, keyframe_interval=4)
    (tmp_path / "gap.ts").write_bytes(gap)
    clips = [
        *write_clips(tmp_path, 1),
        Clip(key="gap", video=str(tmp_path / "gap.ts"), captions=("x",), video_id="gap"),
    ]
    out = str(tmp_path / "out")
    manifest = pack_shards(clips, out, layout="video", reencode=True, max_bad=1)
    assert manifest is not None
    assert manifest.bad == {"unreadable": 1}


def test_a_deeply_nested_list_of_refused_clips_is_a_problem(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 1)
    (Path(url) / "bad.jsonl").write_bytes(DEEP)
    (problem,) = verify_dataset(url).problems
    assert (problem.where, problem.what[:17]) == ("bad.jsonl", "damaged or edited")


def test_a_size_of_thousands_of_digits_is_damage() -> None:
    info = tarfile.TarInfo("a.mp4")
    info.pax_headers = {"size": "9" * 5000}
    content = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    sample = next(sample_files(lambda at, length: content[at : at + length], len(content)))
    assert "a size of -1 bytes" in sample.problem


# -------------------------------------------------------- files of a packing


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The folder of a packing of which one of two tasks is done."""
    clips = write_clips(tmp_path, 4, num_frames=1)
    rows = [{"video": Path(clip.video).name, "caption": clip.key} for clip in clips]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pack(tmp_path, task=0) is None
    return tmp_path


def pack(folder: Path, task: int) -> Any:
    return pack_shards(
        AnnotationFile(str(folder / "a.jsonl")),
        str(folder / "out"),
        layout="frames",
        num_frames=1,
        samples_per_shard=2,
        task=task,
        num_tasks=2,
    )


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            lambda content: content.replace(b'"num_shards": 2', b'"num_shards": 1'), id="1"
        ),
        pytest.param(lambda content: content.replace(b'"generation"', b'"generatiom"'), id="name"),
        pytest.param(lambda content: content[:-40], id="truncated"),
        pytest.param(lambda content: b"[]", id="list"),
        pytest.param(lambda content: DEEP, id="deep"),
    ],
)
def test_a_damaged_plan_is_named(
    unfinished: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = unfinished / "out" / ".packing" / "plan.json"
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(ShardCorrupt, match=r"\.packing/plan\.json: damaged.* remove the folder"):
        pack(unfinished, task=1)


def test_a_changed_record_of_a_shard_is_packed_again(
    unfinished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (record,) = (unfinished / "out" / ".packing").glob("shard-*.json")
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b'"c00"', b'"c09"'))
    assert record.read_bytes() != whole
    caplog.set_level(logging.WARNING)
    assert pack(unfinished, task=1) is None  # the other task's shard is missing again
    assert "a shard's record is damaged" in caplog.text
    pack(unfinished, task=0)
    keys = read_manifest(str(unfinished / "out")).samples.key.tolist()
    assert keys == ["c00", "c01", "c02", "c03"]


def test_a_seal_holds_for_every_field() -> None:
    fields = {"a": 1, "b": ["\ud800", None, 1.5], "c": {"d": "\u732b"}}
    assert unseal(seal(fields)) == fields
    for changed in (b'{"a": 1}', b"[1]", b"7", seal(fields).replace(b"1.5", b"1.6"), b"\xff"):
        with pytest.raises(ValueError, match="damaged"):
            unseal(changed)


# ------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("content", [b'{"step": Infinity, "score": 1}', DEEP, b'{"step": []}'])
def test_a_damaged_note_of_the_best_step_is_ignored(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "best.json").write_bytes(content)
    assert best_step(StorageFolder(str(tmp_path))) is None
    assert "best.json is damaged" in caplog.text


def test_a_step_of_too_many_digits_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step-" + "9" * 5000)
    (tmp_path / "step-00000300").mkdir()
    assert list_candidates(StorageFolder(str(tmp_path))) == [300]


def test_a_deeply_nested_checkpoint_manifest_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-00000300" / "manifest.json").write_bytes(DEEP)
    state, (line,) = read_state(StorageFolder(str(tmp_path)), 300)
    assert state is None
    assert "manifest.json: damaged: RecursionError" in line
