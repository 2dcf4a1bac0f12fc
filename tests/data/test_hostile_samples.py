"""Tars, JSON, frames, videos and annotations that were made to do harm are refused as bad."""

from __future__ import annotations

import gzip
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import av
import fsspec
import pytest
from builders.clip_files import numbered_video
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.annotations.video_lookup import VideoFiles
from tvr.data_prep.dataset.jpeg_stack import split_stack
from tvr.data_prep.dataset.sample_codec import parse_meta, split_tar
from tvr.data_prep.dataset.shard_writer import tar_bytes
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import BadSample, Clip
from tvr.data_prep.video import frame_index
from tvr.data_prep.video.decode import describe_video, sample_frames
from tvr.data_prep.video.images import decode_jpeg, encode_jpeg

GOOD = {"captions": ["x"], "video_id": "v", "frame_times_s": []}


def member(name: str, content: bytes = b"1", kind: bytes = tarfile.REGTYPE, **more: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in more.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse_member() -> bytes:
    """A file of a few bytes that claims to be a terabyte, mostly a hole."""
    info = tarfile.TarInfo("k.mp4")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\x00" % ((1 << 33) - 513) + b"%011o\x00" % 512
    header[483:495] = b"%011o\x00" % ((1 << 33) - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    return bytes(header) + bytes(512)


@pytest.mark.parametrize(
    "content",
    [
        member("../k.json"),
        member("/k.json"),
        member("k/../../x.json"),
        member("k.json/../x"),
        member("k"),
        member(".json"),
        member("k.json") + member("k.json"),
        member("k.json") + member("../../etc/cron.d/x.mp4"),
        member("k.json", b"", tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("k.json", b"", tarfile.LNKTYPE, linkname="/etc/passwd"),
        member("k.json", b"", tarfile.DIRTYPE),
        member("k.json", b"", tarfile.CHRTYPE),
        member("k.json", b"", tarfile.FIFOTYPE),
        member("k.json", b"", size=1 << 32),
        member("k.json", b"1", size=1024),
        member("k.json", b"1" * 600)[:1000],
        member("k.json") + b"\xff" * 512,
        member("k.json") + sparse_member(),
        gzip.compress(member("k.json"), mtime=0),
        b"no tar",
        bytes(512) + member("k.json"),
        member("other.json"),
        member("k.json") + member("other.mp4"),
    ],
)
def test_hostile_tars_are_bad_samples(content: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        split_tar(content, "k")
    assert caught.value.reason in ("unreadable", "missing_member")


@given(st.binary(max_size=1200))
def test_any_bytes_are_members_or_a_bad_sample(content: bytes) -> None:
    for split in (split_tar, split_stack):
        try:
            found = split(content, "k")
        except BadSample:
            continue
        assert sum(map(len, found.values())) <= len(content)


@given(st.dictionaries(st.from_regex(r"[a-z0-9]{1,9}", fullmatch=True), st.binary(max_size=999)))
def test_members_of_a_packed_sample_are_returned(members: dict[str, bytes]) -> None:
    if members:
        assert split_tar(tar_bytes("k", members), "k") == members


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<I", 2**32 - 1),
        struct.pack("<2I", 1, 2**32 - 1) + b"x",
        struct.pack("<3I", 2, 2**31, 2**31),
        b"",
        b"\xff" * 3,
    ],
)
def test_hostile_stacks_are_bad_samples(content: bytes) -> None:
    with pytest.raises(BadSample):
        split_stack(content, "k")


@pytest.mark.parametrize(
    "change",
    [
        {"captions": "text"},
        {"captions": [1]},
        {"captions": [None]},
        {"captions": {"a": 1}},
        {"captions": ["\ud800"]},
        {"video_id": 7},
        {"video_id": ""},
        {"video_id": "\udfff"},
        {"video_id": "a\nb"},
        {"video_id": "x" * 5000},
        {"frame_times_s": ["1"]},
        {"frame_times_s": [float("nan")]},
        {"frame_times_s": [10**400]},
        {"frame_times_s": {"0": 1}},
        {"words": [[["0", 1, 0]]]},
        {"words": [[[0, 1, 9]]]},
        {"words": [[[0, 1]]]},
        {"words": 5},
    ],
)
def test_hostile_json_is_a_bad_sample(change: dict[str, Any]) -> None:
    text = json.dumps(GOOD | change).encode()
    with pytest.raises(BadSample) as caught:
        parse_meta("k", {"json": text, "mp4": b""})
    assert caught.value.reason == "unreadable"


def test_deeply_nested_json_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="RecursionError"):
        parse_meta("k", {"json": b"[" * 100_000, "mp4": b""})


def test_a_jpeg_that_claims_gigabytes_is_refused() -> None:
    import numpy as np

    picture = bytearray(encode_jpeg(np.zeros((16, 16, 3), np.uint8), 80))
    at = picture.index(b"\xff\xc0")
    picture[at + 5 : at + 9] = struct.pack(">2H", 65500, 65500)
    with pytest.raises(BadSample, match="65500 x 65500 pixels, more than"):
        decode_jpeg(bytes(picture), key="k", member="00.jpg")


# ------------------------------------------------------------------ videos


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A video that only its owner should read."""
    path = tmp_path / "victim.mp4"
    path.write_bytes(numbered_video(3))
    return path


def playlist(name: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n"


SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
SDP += "a=rtpmap:96 H264/90000\n"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.ffconcat"])
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile victim.mp4\n",
        "ffconcat version 1.0\nfile '/etc/hostname'\n",
        playlist("victim.mp4"),
        playlist("http://127.0.0.1:9/x.ts"),
        SDP,
    ],
)
def test_a_video_that_refers_to_others_is_a_bad_clip(
    victim: Path, content: str, name: str, as_bytes: bool
) -> None:
    path = victim.with_name(name)
    path.write_text(content)
    with pytest.raises(BadSample) as caught:
        describe_video(path.read_bytes() if as_bytes else path)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    "form", ["concat:{}", "subfile,,start,0,end,99999,,:{}", "data:;base64,eA"]
)
def test_a_path_cannot_name_a_protocol(victim: Path, form: str) -> None:
    with pytest.raises(BadSample) as caught:
        describe_video(form.format(victim))
    assert caught.value.reason in ("unreadable", "missing_file")


def test_packing_refuses_a_playlist(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile victim.mp4\n")
    clips = [
        Clip(key=path.stem, video=str(path), captions=("x",), video_id=path.stem)
        for path in (victim, tmp_path / "clip.mp4")
    ]
    manifest = pack_shards(clips, str(tmp_path / "data"), layout="video", max_bad=1)
    assert (manifest.samples.key.tolist(), manifest.bad) == (["victim"], {"unreadable": 1})


def test_the_list_of_containers_names_libavs() -> None:
    known = {name for entry in av.formats_available for name in entry.split(",")}
    assert set(frame_index.CONTAINERS) <= known


def test_a_codec_without_decoder_is_a_bad_clip(victim: Path) -> None:
    content = victim.read_bytes().replace(b"avc1", b"zzzz")
    with pytest.raises(BadSample, match="no decoder"):
        sample_frames(content, 1)


def test_a_picture_of_too_many_pixels_is_refused(
    victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_index, "MAX_PIXELS", 100)
    with pytest.raises(BadSample, match="pixels, more than 100"):
        sample_frames(victim, 1)


# -------------------------------------------------------------- annotations


def annotations(folder: Path, row: dict[str, Any]) -> str:
    (folder / "a.jsonl").write_text(json.dumps({"captions": ["x"], **row}) + "\n")
    return str(folder / "a.jsonl")


def test_local_annotations_may_name_any_path(tmp_path: Path) -> None:
    for video in ("/abs/v.mp4", "s3://bucket/v.mp4", "../v.mp4"):
        (clip,) = read_annotations(annotations(tmp_path, {"video": video, "key": "k"}))
        assert clip.video.endswith(video)


@pytest.mark.parametrize(
    "video",
    ["/etc/passwd", "file:///etc/passwd", "local:///x", "simplecache::file:///x", "../../v.mp4"],
)
def test_remote_annotations_cannot_name_files_of_this_machine(video: str) -> None:
    row = json.dumps({"video": video, "captions": ["x"], "key": "k"})
    with fsspec.open("memory://hostile/a.jsonl", "w") as file:
        file.write(row)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: video=.* must be a URL, or a path without"):
        read_annotations("memory://hostile/a.jsonl")


def test_remote_annotations_may_name_their_neighbours() -> None:
    rows = [{"video": "v/a.mp4"}, {"video": "s3://bucket/b.mp4"}]
    with fsspec.open("memory://kind/a.jsonl", "w") as file:
        file.write("\n".join(json.dumps({"captions": ["x"], **row}) for row in rows))  # type: ignore[union-attr]
    clips = read_annotations("memory://kind/a.jsonl")
    assert [clip.video for clip in clips] == ["memory://kind/v/a.mp4", "s3://bucket/b.mp4"]


def test_remote_annotations_may_name_files_in_the_given_folder() -> None:
    with fsspec.open("memory://given/a.jsonl", "w") as file:
        file.write(json.dumps({"captions": ["x"], "video": "v/a.mp4"}))  # type: ignore[union-attr]
    (clip,) = read_annotations("memory://given/a.jsonl", videos="/films")
    assert clip.video == "/films/v/a.mp4"


@pytest.mark.parametrize("name", ["../v", "/etc/passwd", "a/../../v", "s3://b/v", "a\\v", "a\x00"])
def test_a_name_of_a_video_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a name in the folder"):
        VideoFiles(str(tmp_path)).find(name)


@pytest.mark.parametrize(
    "row",
    [
        {"video": "v.mp4", "key": "../k"},
        {"video": "v.mp4", "key": "a/b"},
        {"video": "v.mp4", "key": "a.b"},
        {"video": "v\x00.mp4", "key": "k"},
        {"video": "v\n.mp4", "key": "k"},
        {"video": "v.mp4", "video_id": "a\nb"},
        {"video": "v.mp4", "video_id": "\ud800"},
        {"video": "v.mp4", "captions": ["\ud83d"]},
    ],
)
def test_hostile_rows_are_refused_with_their_line(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: "):
        read_annotations(annotations(tmp_path, row))
