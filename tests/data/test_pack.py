"""Packing: the content of a data set, the count of bad clips, and no partial data set."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from builders.clip_files import (
    make_dataset,
    numbered_video,
    plain_captions,
    read_number,
    sound_only,
    tokenize,
    write_clips,
)
from fsspec.core import url_to_fs
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import Manifest, read_manifest, write_manifest
from tvr.data_prep.dataset.shard_writer import content_hash
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.loader import evaluation_batches, read_sample
from tvr.data_prep.records import Clip, ShardCorrupt, TooManyBadSamples

LAYOUTS: list[dict[str, Any]] = [
    {"layout": "frames", "num_frames": 4, "short_side": 24, "jpeg_quality": 95},
    {"layout": "video"},
    {"layout": "video", "reencode": True, "short_side": 16},
]


@dataclass(frozen=True)
class PackedClips:
    """Seven clips, packed with one of LAYOUTS to a folder and to memory."""

    clips: list[Clip]
    folder: str
    memory: str
    manifest: Manifest


@pytest.fixture(scope="module", params=LAYOUTS)
def packed_clips(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PackedClips:
    folder = tmp_path_factory.mktemp("packed")
    clips = write_clips(folder, 7)
    urls = str(folder / "data"), f"memory://{folder.name}/data"
    manifest, _ = (pack_shards(clips, url, samples_per_shard=3, **request.param) for url in urls)
    return PackedClips(clips, *urls, manifest)


@pytest.mark.parametrize("location", ["folder", "memory"])
def test_round_trip(packed_clips: PackedClips, location: str) -> None:
    clips, manifest = packed_clips.clips, packed_clips.manifest
    url = packed_clips.folder if location == "folder" else packed_clips.memory
    assert manifest.shard_sizes == (3, 3, 1)
    assert manifest.num_captions == sum(len(clip.captions) for clip in clips)
    assert verify_dataset(url).problems == ()
    batches = list(
        evaluation_batches(
            url,
            micro_batch=3,
            rank=0,
            world_size=1,
            workers=0,
            num_frames=4,
            image_size=16,
            tokenize=tokenize,
            max_bad=0,
        )
    )
    assert [key for batch in batches for key in batch.keys] == [clip.key for clip in clips]
    assert [text for batch in batches for text in batch.captions] == [
        text for clip in clips for text in clip.captions
    ]
    sample = read_sample(url, "c03", num_frames=4, image_size=32 if location == "folder" else 31)
    assert (list(sample.captions), sample.video_id) == (plain_captions(*clips[3].captions), "c03")
    assert sample.frame_times_s == pytest.approx((0.0, 0.1, 0.2, 0.3))


def test_the_same_clips_give_the_same_bytes(packed_clips: PackedClips) -> None:
    contents = []
    for url in (packed_clips.folder, packed_clips.memory):
        fs, root = url_to_fs(url)
        paths = fs.ls(root, detail=False)
        contents.append({path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in paths})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        *("bad.jsonl", "manifest.json", "samples.rows"),
        *(f"shard-{number:06d}.tar" for number in range(3)),
    }


def test_shards_are_plain_webdataset(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 7, jpeg_quality=95)
    samples: list[dict[str, Any]] = []
    for path in sorted((tmp_path / "data").glob("*.tar")):
        with path.open("rb") as stream:  # wds.WebDataset would leave the file open
            source = [{"url": str(path), "stream": stream}]
            samples += group_by_keys(tar_file_expander(source))
    assert [sample["__key__"] for sample in samples] == [f"c{i:02d}" for i in range(7)]
    numbers = [
        read_number(np.asarray(Image.open(io.BytesIO(samples[2][f"{i:02d}.jpg"]))))
        for i in range(4)
    ]
    assert numbers == [16, 17, 18, 19]
    assert json.loads(samples[2]["json"]) == {
        "captions": [f"caption {number} of clip 2" for number in range(3)],
        "words": None,
        "video_id": "c02",
        "span_s": None,
        "frame_times_s": [0.0, 0.1, 0.2, 0.3],
        "source_size": [64, 32],
        "fps": 10.0,
        "duration_s": 0.4,
    }
    columns = read_manifest(url).samples
    with tarfile.open(tmp_path / "data" / "shard-000000.tar") as archive:
        offsets = [entry.offset for entry in archive if entry.name.endswith(".00.jpg")]
    assert columns.offset[:5].tolist() == offsets
    assert not (np.asarray(columns.offset) % 512).any()
    assert not (np.asarray(columns.length) % 512).any()


def test_content_is_a_hash_of_the_source_and_the_cut(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 3)
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "c01.mp4").read_bytes())
    copy = replace(clips[1], key="copy", video=str(tmp_path / "copy.mp4"), captions=("other",))
    manifest = pack_shards([*clips, copy], str(tmp_path / "data"), layout="video")
    content = np.asarray(manifest.samples.content)
    assert content.dtype == np.uint64
    assert content[3] == content[1]
    assert len(set(content.tolist())) == 3
    spans = [None, (0.5, None), (0.5, 1.0), (0.0, 1.0)]
    assert len({content_hash(b"the same bytes", span) for span in spans}) == 4


def bad_clips(folder: Path) -> list[Clip]:
    """Writes a good clip, then one clip for each reason of refusal; keys start with the reason."""
    whole = numbered_video(20, faststart=True)
    contents = {
        "unreadable": b"garbage" * 100,
        "unreadable_cut": whole[: len(whole) - 40],
        "no_frames": sound_only(),
        "no_caption": numbered_video(3),
        "not_mp4": numbered_video(3, container="matroska"),
    }
    for name, content in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)
    names = ["missing_file", *contents]
    return write_clips(folder, 1) + [
        Clip(
            key=name,
            video=str(folder / f"{name}.mp4"),
            captions=("", " \n") if name == "no_caption" else ("a caption", ""),
            video_id=name,
            origin=f"a.jsonl:{number}",
        )
        for number, name in enumerate(names, start=1)
    ]


def test_bad_clips_are_counted_and_listed(tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    manifest = pack_shards(bad_clips(tmp_path), url, layout="video", max_bad=6)
    expected = {"missing_file": 1, "unreadable": 2, "no_frames": 1, "no_caption": 1, "not_mp4": 1}
    assert manifest.bad == expected
    assert read_manifest(url).bad == expected
    assert manifest.samples.key.tolist() == ["c00"]
    entries = [
        json.loads(line) for line in (tmp_path / "data" / "bad.jsonl").read_text().splitlines()
    ]
    assert [(entry["key"], entry["key"].startswith(entry["reason"])) for entry in entries] == [
        (clip.key, True) for clip in bad_clips(tmp_path)[1:]
    ]
    assert "missing_file.mp4 of a.jsonl:1" in entries[0]["detail"]


def test_too_many_bad_clips_publish_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    with pytest.raises(TooManyBadSamples, match=r"6 bad .* max_bad=5 .*2 unreadable.* a\.jsonl:6"):
        pack_shards(bad_clips(tmp_path), url, layout="video", max_bad=5)
    assert list((tmp_path / "data").iterdir()) == []


def test_an_empty_caption_among_good_ones_is_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(numbered_video(2))
    (tmp_path / "a.jsonl").write_text(
        '{"video": "v.mp4", "captions": ["", " two\\twords ", "x &amp; y"]}'
    )
    clips = read_annotations(str(tmp_path / "a.jsonl"))
    url = str(tmp_path / "data")
    manifest = pack_shards(clips, url, layout="frames", num_frames=2)
    assert (manifest.num_captions, manifest.num_empty_captions, manifest.bad) == (2, 1, {})
    sample = read_sample(url, "v", num_frames=1, image_size=8)
    assert list(sample.captions) == plain_captions("two words", "x & y")


def test_a_complete_data_set_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 7, samples_per_shard=2)
    before = {file: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    clips = write_clips(tmp_path, 3)
    with pytest.raises(FileExistsError, match="holds a complete data set"):
        pack_shards(clips, url, layout="video")
    missing = Clip(key="x", video=str(tmp_path / "x.mp4"), captions=("x",), video_id="x")
    with pytest.raises(TooManyBadSamples):
        pack_shards([*clips, missing], url, layout="video", samples_per_shard=1, overwrite=True)
    assert {file: file.read_bytes() for file in before} == before
    assert read_sample(url, "c06", num_frames=1, image_size=8).key == "c06"
    (tmp_path / "data" / "shard-000009.tar.partial").write_bytes(b"left by a killed packing")
    pack_shards(clips, url, layout="video", overwrite=True)
    names = sorted(file.name for file in (tmp_path / "data").iterdir())
    # The packing that failed was the first one after the data set.
    assert names == ["bad.jsonl", "manifest.json", "samples-2.rows", "shard-2-000000.tar"]
    assert verify_dataset(url).problems == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "tar"}, "layout='tar' must be one of video, frames"),
        ({"layout": "frames", "num_frames": 0}, "num_frames=0 must be from 1"),
        ({"layout": "frames", "short_side": 1}, "short_side=1 must be from 2"),
        ({"layout": "frames", "jpeg_quality": 101}, "jpeg_quality=101 must be from 1 to 100"),
        ({"layout": "frames", "samples_per_shard": 0}, "samples_per_shard=0 must be"),
        ({"layout": "frames", "reencode": True}, "reencode=True is for layout=video"),
        ({"layout": "video", "short_side": 16}, "short_side=16 needs reencode=True"),
        ({"layout": "video", "reencode": True, "keyframe_interval": 0}, "keyframe_interval=0 must"),
        ({"layout": "video", "max_bad": -1}, "max_bad=-1 must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_shards(write_clips(tmp_path, 1), str(tmp_path / "data"), **settings)


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "x" * 81])
def test_invalid_keys_are_refused(tmp_path: Path, key: str) -> None:
    clip = Clip(key=key, video="v.mp4", captions=("x",), video_id="x", origin="a.jsonl:7")
    with pytest.raises(ValueError, match=r"a\.jsonl:7: key=.* must be 1 to 80 letters"):
        pack_shards([clip], str(tmp_path / "data"), layout="video")


def test_duplicate_keys_and_no_clips_are_refused(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 1)
    with pytest.raises(TooManyBadSamples, match="duplicate key 'c00'"):
        pack_shards(clips * 2, str(tmp_path / "data"), layout="video")
    with pytest.raises(ValueError, match="no usable clip"):
        pack_shards([], str(tmp_path / "data"), layout="video")
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_dataset(tmp_path_factory.mktemp("dataset"), 7))


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("manifest.json", None, FileNotFoundError, r"manifest\.json does not exist"),
        ("samples.rows", None, ShardCorrupt, r"samples\.rows is missing"),
        ("samples.rows", lambda old: old[:-1], ShardCorrupt, "1440 in manifest"),
        ("samples.rows", lambda old: old[:-1] + b"x", ShardCorrupt, "sha256 differs"),
        ("samples.rows", lambda old: b"x" + old[1:], ShardCorrupt, "sha256 differs"),
        ("manifest.json", lambda old: old[: len(old) // 2], ShardCorrupt, "not JSON"),
        ("manifest.json", lambda old: b"[]", ShardCorrupt, "expected a JSON object"),
        (
            "manifest.json",
            lambda old: old.replace(b'"format_version": 3', b'"format_version": 1'),
            ValueError,
            "format_version=1, this release reads 3; pack the data set again",
        ),
        (
            "manifest.json",
            lambda old: old.replace(b'"format_version": 3', b'"format_version": 2'),
            ValueError,
            r"format_version=2, this release reads 3; `tvr upgrade .*data` converts",
        ),
        (
            "manifest.json",
            lambda old: old.replace(b'"format_version"', b'"version"'),
            ValueError,
            "perhaps the features of `tvr embed`",
        ),
        (
            "manifest.json",
            lambda old: old.replace(b'"num_samples": 5', b'"num_samples": 4'),
            ShardCorrupt,
            "disagree on the samples per shard",
        ),
        (
            "manifest.json",
            lambda old: old.replace(b'"layout": "frames"', b'"layout": "beton"'),
            ShardCorrupt,
            "layout='beton'",
        ),
        (
            "manifest.json",
            lambda old: old.replace(b'"short_side"', b'"long_side"'),
            ShardCorrupt,
            "damaged or edited: KeyError",
        ),
    ],
)
def test_the_error_names_a_damaged_index(
    dataset: Path, tmp_path: Path, name: str, damage: Any, error: type[Exception], message: str
) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / name
    if damage is None:
        path.unlink()
    else:
        damaged = damage(path.read_bytes())
        assert damaged != path.read_bytes()
        path.write_bytes(damaged)
    with pytest.raises(error, match=message):
        read_manifest(str(tmp_path / "data"))


def test_columns_out_of_shard_order_are_refused(tmp_path: Path) -> None:
    url = make_dataset(tmp_path, 4, samples_per_shard=2)
    manifest = read_manifest(url)
    samples = replace(manifest.samples, shard=manifest.samples.shard[::-1])
    with pytest.raises(ValueError, match="a row from 0 to 1 is not of shard 0"):
        write_manifest(url, replace(manifest, samples=samples))
    assert read_manifest(url).samples.key.tolist() == ["c00", "c01", "c02", "c03"]
    assert sorted(path.name for path in Path(url).glob("samples*")) == ["samples.rows"]


def test_a_missing_source_on_another_file_system_is_refused(tmp_path: Path) -> None:
    with fsspec.open("memory://sources/good.mp4", "wb") as file:
        file.write(numbered_video(3))  # type: ignore[union-attr]
    clips = [
        Clip(key=name, video=f"memory://sources/{name}.mp4", captions=("x",), video_id=name)
        for name in ("good", "absent")
    ]
    manifest = pack_shards(clips, str(tmp_path / "data"), layout="video", max_bad=1)
    assert (manifest.samples.key.tolist(), manifest.bad) == (["good"], {"missing_file": 1})
