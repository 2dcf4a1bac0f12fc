"""Verification and checked reads: every kind of damage is reported."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.batches import damage_sample, flip_bit
from builders.clip_files import make_dataset

from tvr.data_prep.check.verify import VerifyReport, verify_dataset
from tvr.data_prep.dataset.manifest import read_manifest, write_manifest
from tvr.data_prep.dataset.sample_codec import parse_members, parse_meta
from tvr.data_prep.dataset.shard_writer import tar_bytes
from tvr.data_prep.records import BadSample


def found(report: VerifyReport) -> list[str]:
    return [f"{problem.where} / {problem.what}" for problem in report.problems]


def test_an_undamaged_data_set_has_no_problems(tmp_path: Path) -> None:
    report = verify_dataset(make_dataset(tmp_path, 7), decode=3)
    assert (report.num_shards, report.num_samples, report.num_decoded) == (2, 7, 3)
    assert report.num_bytes == sum(file.stat().st_size for file in tmp_path.glob("data/*.tar"))
    assert found(report) == []


def test_a_flipped_bit_is_reported_for_the_sample_and_the_shard(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 7)
    damage_sample(tmp_path / "data", 3, 700)
    problems = found(verify_dataset(url))
    assert len(problems) == 2
    assert problems[0].startswith("shard-000000.tar: c03 / checksum: crc32")
    assert problems[1] == "shard-000000.tar / sha256 differs from the manifest's"


def test_truncated_and_missing_shards_are_reported(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 12)
    first = tmp_path / "data" / "shard-000000.tar"
    keep = int(read_manifest(url).samples.offset[3]) + 100
    first.write_bytes(first.read_bytes()[:keep])
    (tmp_path / "data" / "shard-000001.tar").unlink()
    problems = found(verify_dataset(url))
    assert [problem.split(" / ")[0] for problem in problems] == [
        *("shard-000000.tar: c03", "shard-000000.tar: c04"),
        *("shard-000000.tar", "shard-000000.tar", "shard-000001.tar"),
    ]
    assert "the file is truncated" in problems[0]
    assert f"{keep} bytes, expected" in problems[2]
    assert "FileNotFoundError" in problems[4]


def test_bytes_after_the_last_sample_are_checked(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 3)
    with (tmp_path / "data" / "shard-000000.tar").open("ab") as file:
        file.write(b"more")
    assert [problem.split(" / ")[0] for problem in found(verify_dataset(url))] == [
        "shard-000000.tar",
        "shard-000000.tar",
    ]


def test_differences_between_manifest_and_shards_are_reported(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 3)
    manifest = read_manifest(url)
    columns = manifest.samples
    samples = replace(
        columns,
        key=np.array(["c00", "c00", "c02"]),
        video_id=np.array(["c00", "c01", "other"]),
        num_captions=np.array([9, 2, 3], dtype=np.int32),
        offset=columns.offset + np.array([0, 0, 512]),
    )
    write_manifest(url, replace(manifest, samples=samples))
    problems = found(verify_dataset(url))
    assert problems[0] == "manifest.json / sample key c00 occurs 2 times"
    assert problems[1] == "manifest.json / 6 captions, 14 in its columns"
    assert "c00 / captions 1, 9 in the manifest" in problems[2]
    assert "c00 / missing_member: the range holds ['c01']" in problems[3]
    assert "offset" in problems[4]
    assert "c02 / video_id 'c02', 'other' in the manifest" in problems[5]
    assert len(problems) == 6


def test_the_list_of_refused_clips_must_agree_with_the_manifest(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 2)
    bad = tmp_path / "data" / "bad.jsonl"
    listed = '{"key": "x", "reason": "unreadable", "detail": ""}\n'
    for text, expected in (
        (listed, "1 unreadable listed, none in manifest.json"),
        ("{", "damaged or edited: JSONDecodeError"),
        ('{"key": "x"}', "damaged or edited: KeyError"),
    ):
        bad.write_text(text)
        (problem,) = found(verify_dataset(url))
        assert problem.startswith(f"bad.jsonl / {expected}")
    bad.unlink()
    (problem,) = found(verify_dataset(url))
    assert problem.startswith("bad.jsonl / FileNotFoundError")
    write_manifest(url, replace(read_manifest(url), bad={"unreadable": 2, "no_frames": 1}))
    bad.write_text(listed)
    assert found(verify_dataset(url)) == [
        "bad.jsonl / 1 unreadable listed, 1 no_frames, 2 unreadable in manifest.json"
    ]


def test_the_number_of_jobs_does_not_change_the_report(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 12)
    for number in (0, 2):
        flip_bit(tmp_path / "data" / f"shard-00000{number}.tar", 3000)
    reports = [verify_dataset(url, jobs=jobs) for jobs in (1, 2, 7)]
    assert reports[0] == reports[1] == reports[2]
    assert len(reports[0].problems) == 4
    with pytest.raises(ValueError, match="jobs=0 must be 1 or more"):
        verify_dataset(url, jobs=0)


def test_undecodable_frames_are_found_only_by_decoding(tmp_path: Path) -> None:
    """A sample packed from damaged bytes passes every checksum."""
    url = make_dataset(tmp_path, 1)
    json_text = b'{"captions":["x"],"video_id":"c00","frame_times_s":[0.0]}'
    content = tar_bytes("c00", {"json": json_text, "00.jpg": b"no JPEG"})
    (tmp_path / "data" / "shard-000000.tar").write_bytes(content + bytes(1024))
    manifest = read_manifest(url)
    samples = replace(
        manifest.samples,
        length=np.array([len(content)]),
        crc32=np.array([zlib.crc32(content)], dtype=np.uint32),
    )
    write_manifest(url, replace(manifest, samples=samples))
    assert not [line for line in found(verify_dataset(url, decode=0)) if "c00" in line]
    assert [line for line in found(verify_dataset(url)) if r"unreadable: 00.jpg" in line]


@pytest.mark.parametrize(
    ("tagger", "words", "expected"),
    [
        ("t 1", "[[[0,1,0],[2,5,1]]]", ""),
        ("t 1", "[[]]", ""),
        (None, "null", ""),
        ("t 1", "[[[0,1,0],[2,6,1]]]", "word [2, 6) must lie within [1, 5)"),
        ("t 1", "[[[0,3,0],[2,5,1]]]", "word [2, 5) must lie within [3, 5)"),
        ("t 1", "[[[-1,1,0]]]", "word [-1, 1) must lie within [0, 5)"),
        ("t 1", "[[[2,2,0]]]", "word [2, 2) must lie within [0, 5)"),
        ("t 1", "null", "words missing"),
        (None, "[[[0,1,0]]]", "words without a tagger in the manifest"),
    ],
)
def test_words_must_lie_within_their_caption(
    tmp_path: Path, tagger: str | None, words: str, expected: str
) -> None:
    url = make_dataset(tmp_path, 1)
    text = f'{{"captions":["a dog"],"words":{words},"video_id":"c00","frame_times_s":[]}}'
    content = tar_bytes("c00", {"json": text.encode(), "mp4": b""})
    (tmp_path / "data" / "shard-000000.tar").write_bytes(content + bytes(1024))
    manifest = read_manifest(url)
    samples = replace(
        manifest.samples,
        length=np.array([len(content)]),
        crc32=np.array([zlib.crc32(content)], dtype=np.uint32),
    )
    write_manifest(url, replace(manifest, samples=samples, tagger=tagger))
    problems = [line for line in found(verify_dataset(url, decode=0)) if "c00" in line]
    where = "shard-000000.tar: c00 / caption 'a dog': "
    assert problems == ([where + expected] if expected else [])


GOOD_JSON = b'{"captions":["x"],"video_id":"v","frame_times_s":[0.0, 0.1]}'


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ({"00.jpg": b"", "01.jpg": b""}, "missing_member", "json"),
        ({"json": GOOD_JSON, "00.jpg": b""}, "missing_member", "1 of 2 JPEG frames and no mp4"),
        ({"json": GOOD_JSON}, "missing_member", "0 of 2 JPEG frames"),
        ({"json": b"{", "mp4": b""}, "unreadable", "json"),
        ({"json": b"[]", "mp4": b""}, "unreadable", "json"),
        ({"json": b'{"captions":["x"]}', "mp4": b""}, "unreadable", "video_id"),
        ({"json": GOOD_JSON.replace(b'"x"', b""), "mp4": b""}, "no_caption", "no caption"),
    ],
)
def test_missing_and_damaged_members_are_refused(
    members: dict[str, bytes], reason: str, detail: str
) -> None:
    content = tar_bytes("k", members)
    assert parse_members(content, "k", len(content), zlib.crc32(content)) == members
    with pytest.raises(BadSample, match=detail) as caught:
        parse_meta("k", members)
    assert (caught.value.key, caught.value.reason) == ("k", reason)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-512], "checksum"),
        (lambda content: content[:600] + b"?" + content[601:], "checksum"),
        (lambda content: b"", "checksum"),
    ],
)
def test_a_byte_range_that_differs_from_the_packed_one_is_refused(
    damage: Callable[[bytes], bytes], reason: str
) -> None:
    content = tar_bytes("k", {"json": GOOD_JSON, "00.jpg": b"1", "01.jpg": b"2"})
    with pytest.raises(BadSample) as caught:
        parse_members(damage(content), "k", len(content), zlib.crc32(content))
    assert caught.value.reason == reason


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make one with `tvr pack`"):
        verify_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="decode=-1 must be 0 or more"):
        verify_dataset(str(tmp_path), decode=-1)
