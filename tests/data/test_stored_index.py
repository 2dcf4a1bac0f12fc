"""The frame index that a sample stores beside its video: its bytes, hostile ones, and its use."""

from __future__ import annotations

import shutil
import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.batches import training
from builders.clip_files import make_dataset, numbered_video, write_clips
from builders.raw_shards import write_raw_shards
from hypothesis import given
from hypothesis import strategies as st
from webdataset.autodecode import Decoder, imagehandler
from webdataset.tariterators import group_by_keys, tar_file_expander

from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.shard_writer import TarSample, tar_bytes
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample
from tvr.data_prep.video import frame_index
from tvr.data_prep.video.frame_index import FrameIndex, index_packets
from tvr.data_prep.video.stored_index import HEADER, decode_index, encode_index, index_member

INDEX = FrameIndex(
    pts=(-7, 0, 1, 500, 1 << 31),
    num_frames=5,
    keyframes=(1, 4),
    unit_s=Fraction(1, 90000),
    rate_hz=Fraction(30000, 1001),
    stream=3,
)


def encoded(**changes: Any) -> bytes:
    content = encode_index(replace(INDEX, **changes))
    assert content is not None
    return content


def packed(numbers: list[int]) -> bytes:
    return zlib.compress(struct.pack(f"<{len(numbers)}I", *numbers))


def header(**changes: object) -> bytes:
    """A header with other values."""
    names = ["magic", "version", "stream", "frames", "keyframes", "first"]
    names += ["unit", "unit_below", "rate", "rate_below"]
    values = dict(zip(names, HEADER.unpack_from(encoded()), strict=True))
    return HEADER.pack(*(values | changes).values())


@given(
    st.lists(st.integers(1, 2**32 - 1), max_size=50),
    st.integers(-(2**61), 2**61),
    st.data(),
)
def test_an_index_is_read_as_it_was_stored(steps: list[int], first: int, data: Any) -> None:
    pts = tuple(np.cumsum([first, *steps]).tolist())
    keyframes = data.draw(st.sets(st.integers(0, len(pts) - 1)))
    index = replace(INDEX, pts=pts, num_frames=len(pts), keyframes=tuple(sorted(keyframes)))
    content = encode_index(index)
    assert content is not None
    assert decode_index(content, len(pts), "k") == index


@pytest.mark.parametrize(
    "changes", [{"pts": None}, {"pts": (0, 1 << 32)}, {"pts": (1 << 62,)}, {"stream": 1 << 12}]
)
def test_an_index_that_has_no_form_is_not_stored(changes: dict[str, Any]) -> None:
    assert encode_index(replace(INDEX, **changes)) is None


BODY = packed([7, 1, 499, (1 << 31) - 500, 1, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes must be at least 56"),
        (encoded()[:55], "55 bytes"),
        (header(magic=b"XXXX") + BODY, "b'XXXX', version 1 must be b'FIDX', version 1"),
        (header(version=2) + BODY, "version 2 must be"),
        (header(frames=0) + BODY, "0 frames"),
        (header(frames=1001) + BODY, "1001 frames"),
        (header(frames=4) + BODY, "must have 20 bytes"),
        (header(keyframes=6) + BODY, "6 keyframes"),
        (header(keyframes=3) + BODY, "must have 28 bytes"),
        (header(stream=5000) + BODY, "stream 5000"),
        (header(first=1 << 62) + BODY, "first time"),
        (header(unit=0) + BODY, "out of range"),
        (header(unit=-1) + BODY, "out of range"),
        (header(unit_below=0) + BODY, "out of range"),
        (header(unit=2) + BODY, "out of range"),
        (header(rate_below=-5) + BODY, "out of range"),
        (header() + packed([7, 0, 499, 1, 1, 3]), "do not ascend"),
        (header() + packed([7, 1, 499, 1, 1, 0]), "do not ascend"),
        (header() + packed([7, 1, 499, 1, 1, 4]), "do not ascend"),
        (header() + packed([7, 1, 499, 1, 2**32 - 1, 2**32 - 1]), "do not ascend"),
        (header() + BODY[:-1], "must have 24 bytes"),
        (header() + BODY + b"x", "must have 24 bytes"),
        (header() + b"no zlib", "Error -3"),
        (header() + zlib.compress(bytes(1 << 24)), "must have 24 bytes"),
    ],
)
def test_hostile_indexes_are_refused(content: bytes, message: str) -> None:
    assert decode_index(header() + BODY, 1000, "k") == INDEX
    with pytest.raises(BadSample, match=f"k: unreadable: fidx: .*{message}"):
        decode_index(content, 1000, "k")


def test_an_index_takes_bounded_memory_in_a_large_file() -> None:
    with pytest.raises(BadSample, match=f"{1 << 23} frames, .* are too many"):
        decode_index(header(frames=1 << 23) + BODY, 1 << 40, "k")


@given(st.integers(0, len(encoded()) - 1), st.integers(1, 255))
def test_flipped_bytes_are_refused_or_give_a_valid_index(at: int, change: int) -> None:
    content = bytearray(encoded())
    content[at] ^= change
    try:
        index = decode_index(bytes(content), 1000, "k")
    except BadSample:
        return
    assert index.pts is not None
    assert list(index.pts) == sorted(set(index.pts))
    assert len(index.pts) == index.num_frames
    assert all(0 <= keyframe < index.num_frames for keyframe in index.keyframes)


def test_it_is_small() -> None:
    """A tar pads each member to 512 bytes."""
    for num_frames in (1, 300, 9000):
        content = index_member(numbered_video(num_frames, gop=16), "k")["fidx"]
        assert len(content) <= 512


# ------------------------------------------------------------------ data sets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return Path(make_dataset(folder, 4, num_frames=4, layout="video"))


def samples_of(folder: Path, change: Any) -> list[TarSample]:
    """The samples of a data set with other members."""
    reader = SampleReader(str(folder), num_frames=1, image_size=8)
    samples, changed = reader.manifest.samples, []
    for row in range(len(reader)):
        members = change(reader.members(row))
        changed.append(
            TarSample(
                key=reader.key(row),
                video_id=samples.video_id[row],
                stored=tar_bytes(reader.key(row), members),
                num_captions=int(samples.num_captions[row]),
                content=int(samples.content[row]),
            )
        )
    return changed


def without_index(members: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in members.items() if name != "fidx"}


@pytest.mark.parametrize("settings", [{}, {"reencode": True}])
def test_packing_stores_the_index_and_reading_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    url = make_dataset(tmp_path, 2, layout="video", **settings)
    reader = SampleReader(url, num_frames=3, image_size=16)
    for row in range(2):
        members = reader.members(row)
        assert sorted(members) == ["fidx", "json", "mp4"]
        stored = decode_index(members["fidx"], len(members["mp4"]), "k")
        assert stored == index_packets(members["mp4"], "k")
    monkeypatch.setattr(frame_index, "index_packets", lambda *_: pytest.fail("packets were listed"))
    assert reader.read(1).frames.shape == (3, 16, 16, 3)


def test_samples_without_an_index_give_the_same_batches(dataset: Path, tmp_path: Path) -> None:
    old = write_raw_shards(
        tmp_path / "old", [samples_of(dataset, without_index)], layout="video", num_frames=0
    )
    frames = []
    for url in (str(dataset), old):
        reader = SampleReader(url, num_frames=3, image_size=16)
        assert ("fidx" in reader.members(0)) == (url != old)
        frames.append(next(training(url)).frames)
    assert (frames[0] == frames[1]).all()


def test_plain_webdataset_decodes_the_shards(dataset: Path) -> None:
    """Its decoders pass the index on as bytes."""
    path = dataset / "shard-000000.tar"
    with path.open("rb") as stream:  # WebDataset itself would leave the file open
        source = tar_file_expander([{"url": str(path), "stream": stream}])
        samples = [Decoder([imagehandler("rgb8")])(sample) for sample in group_by_keys(source)]
    assert [sample["__key__"] for sample in samples] == [f"c{row:02d}" for row in range(4)]
    for sample in samples:
        assert {name for name in sample if not name.startswith("__")} == {"fidx", "json", "mp4"}
        assert isinstance(sample["fidx"], bytes)
        assert sample["json"]["video_id"] == sample["__key__"]


def test_verify_finds_a_wrong_index(dataset: Path, tmp_path: Path) -> None:
    assert verify_dataset(str(dataset)).problems == ()
    wrong = index_member(numbered_video(3), "k")

    def changed(folder: str, member: bytes, decode: int) -> list[str]:
        samples = samples_of(dataset, lambda members: {**members, "fidx": member})
        url = write_raw_shards(tmp_path / folder, [samples], layout="video", num_frames=0)
        shutil.copy(dataset / "bad.jsonl", url)
        return [problem.what for problem in verify_dataset(url, decode=decode).problems]

    assert changed("a", wrong["fidx"], 1) == ["fidx differs from the packets of the video"]
    damaged = changed("b", b"FIDX", 0)
    assert damaged == ["unreadable: fidx: 4 bytes must be at least 56"] * 4
    assert read_manifest(str(dataset)).num_samples == 4


def test_a_damaged_index_is_a_bad_sample(dataset: Path, tmp_path: Path) -> None:
    samples = samples_of(dataset, lambda members: {**members, "fidx": b"x"})
    url = write_raw_shards(tmp_path / "bad", [samples], layout="video", num_frames=0)
    with pytest.raises(BadSample, match="c00: unreadable: fidx"):
        SampleReader(url, num_frames=3, image_size=16).read(0)
    assert len(write_clips(tmp_path, 1)) == 1
