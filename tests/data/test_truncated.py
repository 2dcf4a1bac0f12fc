"""Files that were cut short are refused; files that are whole but unusual are read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from builders.counter_files import Encoding, make_video, number_of
from builders.cut_files import FRAGMENTS, KINDS, FileKind, live_webm, make_file

from tvr.data_prep.containers.elements import CutShort
from tvr.data_prep.containers.ends import stated_end
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import BadSample, Clip
from tvr.data_prep.video.decode import describe_video, sample_frames
from tvr.data_prep.video.truncation import check_whole

# The last byte of these belongs to no picture, and nothing says that it exists.
NO_LAST_BYTE = {"gif", "h264", "rm"}
GOP_8 = {"preset": "veryfast", "g": "8", "bf": "2"}


def refusal(content: bytes) -> str:
    with pytest.raises(BadSample, match="k: unreadable: truncated: ") as caught:
        check_whole(content, "k")
    return caught.value.detail


@pytest.mark.parametrize("name", list(KINDS))
def test_a_part_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    content = make_file(KINDS[name])
    check_whole(content, "k")
    assert describe_video(content).num_frames == 50
    size = len(content)
    for end in (size // 2, size * 3 // 4 + 1, size * 19 // 20, size - 1):
        if end < size - 1 or name not in NO_LAST_BYTE:
            refusal(content[:end])
    path = tmp_path / "half"
    path.write_bytes(content[: size // 2])
    with pytest.raises(BadSample, match="k: unreadable: truncated: "):
        check_whole(path, "k")


def cut_at_cluster(content: bytes) -> bytes:
    return content[: content.rindex(bytes.fromhex("1f43b675"))]


def cut_at_chunk(content: bytes) -> bytes:
    return content[: content.rindex(b"idx1")]


def cut_at_box(kind: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[: content.rindex(kind) - 4]


def cut_at_tag(content: bytes) -> bytes:
    at, ends = 13, []
    while at < len(content):
        at += 15 + int.from_bytes(content[at + 1 : at + 4], "big")
        ends.append(at)
    return content[: ends[len(ends) // 2]]


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("matroska", cut_at_cluster),
        ("webm", cut_at_cluster),
        ("avi", cut_at_chunk),
        ("mp4", cut_at_box(b"moov")),
        ("mp4 fragments", cut_at_box(b"mdat")),
        ("mp4 fragments with sizes", cut_at_box(b"moof")),
        ("flv", cut_at_tag),
        ("ogg", lambda content: content[: content.rindex(b"OggS", 0, len(content) - 9000)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "cut",
)
def test_a_cut_between_two_elements_is_refused(name: str, cut: Callable[[bytes], bytes]) -> None:
    refusal(cut(make_file(KINDS[name])))


def with_a_longer_duration(by_s: float) -> bytes:
    """Returns a Matroska file of unknown size that states a duration."""
    content = bytearray(make_file(KINDS["matroska"]))
    at = content.index(bytes.fromhex("4489")) + 3
    (duration,) = struct.unpack_from(">d", content, at)
    struct.pack_into(">d", content, at, duration + 1000 * by_s)
    at = content.index(bytes.fromhex("18538067")) + 4
    content[at : at + 8] = b"\x01" + b"\xff" * 7
    return bytes(content)


def test_a_stream_that_begins_within_the_file_is_a_bad_clip() -> None:
    """A recording whose programme changes; PyAV ends such a demux with an IndexError."""
    places = "mpegts_service_id=5 mpegts_start_pid=300 mpegts_pmt_start_pid=500"
    changed = make_file(FileKind(muxer="mpegts", codec="mpeg2video", options=places))
    with pytest.raises(BadSample, match="unreadable: another stream begins within the file"):
        check_whole(make_file(KINDS["ts of mpeg2"]) + changed, "k")


def with_unfinished_sizes(content: bytes) -> bytes:
    """Returns an AVI of a recorder that did not write the sizes of its lists."""
    video, at = bytearray(content), content.index(b"movi")
    video[4:8] = video[at - 4 : at] = bytes(4)
    return bytes(video)


def transport_from_the_middle() -> bytes:
    content = make_file(KINDS["ts of mpeg2"])
    return content[188 * 40 + 77 :]


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "live webm": live_webm,
    # A part of a video that is written to a pipe states the duration of the whole.
    "matroska of a pipe with its source's duration": lambda: with_a_longer_duration(20),
    "garbage behind mp4": lambda: make_file(KINDS["mp4"]) + b"\x7f\xff\xff\xffgarbage" * 9,
    "zeros behind mp4": lambda: make_file(KINDS["mp4"]) + bytes(4096),
    "padding behind mp4": lambda: make_file(KINDS["mp4"]) + struct.pack(">I4s", 900, b"free"),
    "mp4 with more sound": lambda: make_file(FileKind(muxer="mp4", sound="aac", sound_s=4)),
    "mp4 with less sound": lambda: make_file(FileKind(muxer="mp4", sound="aac", sound_s=0.5)),
    "fragments without an index": lambda: cut_at_box(b"mfra")(
        make_file(FileKind(muxer="mp4", options=FRAGMENTS))
    ),
    "transport stream from the middle": transport_from_the_middle,
    "zeros behind a transport stream": lambda: make_file(KINDS["ts of mpeg2"]) + bytes(77),
    "garbage behind avi": lambda: make_file(KINDS["avi"]) + b"garbage" * 9,
    "avi without sizes": lambda: with_unfinished_sizes(make_file(KINDS["avi"])),
    "avi of a size that counts its head": lambda: (
        b"RIFF" + struct.pack("<I", len(make_file(KINDS["avi"]))) + make_file(KINDS["avi"])[8:]
    ),
    "end code behind mpg": lambda: make_file(KINDS["mpg"]) + b"\0\0\1\xb9",
    "zeros behind matroska": lambda: make_file(KINDS["matroska"]) + bytes(100),
}


@pytest.mark.parametrize("name", list(UNUSUAL))
def test_a_whole_but_unusual_file_is_read(name: str) -> None:
    content = UNUSUAL[name]()
    check_whole(content, "k")
    expected = range(25, 50) if "middle" in name else [50]
    assert describe_video(content).num_frames in expected


def is_picture(packet: bytes) -> bool:
    return packet[1] & 0x1F == 1 and packet[2] == 0


@pytest.mark.parametrize("bframes", [0, 2])
def test_a_transport_stream_that_ends_with_a_packet(bframes: int) -> None:
    """Where the cut falls between two pictures, nothing tells, unless frames are missing."""
    content = make_file(FileKind(muxer="mpegts", codec="libx264", bframes=bframes))
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    pictures = [i for i, p in enumerate(packets) if p[1] == 0x41 and p[2] == 0]
    assert len(pictures) == 50
    whole, told = [], []
    for count in range(pictures[44], len(packets) + 1):
        try:
            check_whole(b"".join(packets[:count]), "k")
        except BadSample:
            told.append(count)
        else:
            whole.append(count)
    between = {*pictures, len(packets)}
    assert len(packets) in whole
    # A decoder does not always miss the last bytes of a picture.
    within = [count for count in whole if count not in between and is_picture(packets[count])]
    assert len(within) < 0.1 * len(told)
    if bframes:  # after a frame that later ones of the stream precede
        assert any(count in between for count in told)


def test_packing_refuses_parts_in_every_layout(tmp_path: Path) -> None:
    clips = []
    for name in ("webm", "ts", "mpg", "wmv", "mp4"):
        content = make_file(KINDS[name])
        for part, end in (("whole", len(content)), ("half", len(content) // 2)):
            path = tmp_path / f"{name}-{part}"
            path.write_bytes(content[:end])
            clips += [
                Clip(key=path.name, video=str(path), captions=("a",), video_id=path.name),
                Clip(
                    key=f"{path.name}-cut",
                    video=str(path),
                    captions=("a",),
                    video_id=path.name,
                    start_s=0.2,
                    end_s=0.4,
                ),
            ]
    for layout, reencode in (("frames", False), ("video", True)):
        url = str(tmp_path / layout)
        manifest = pack_shards(
            clips, url, layout=layout, reencode=reencode, num_frames=2, max_bad=20
        )
        assert manifest.bad == {"unreadable": 10}
        lines = (Path(url) / "bad.jsonl").read_text().splitlines()
        for bad in map(json.loads, lines):
            assert "-half" in bad["key"]
            assert bad["detail"].startswith("truncated: ")


def test_joined_transport_streams_are_read() -> None:
    """A player goes on where another recording begins; a lost packet is still an error."""
    part = make_video(Encoding(frames=16, options=GOP_8, container="mpegts"))
    later = make_video(Encoding(frames=16, options=GOP_8, container="mpegts", shift=640))
    for joined in (part + later, part + part, part + later + part):
        check_whole(joined, "k")
        frames, _ = sample_frames(joined, 64)
        numbers = [number_of(frame, Encoding()) for frame in frames]
        assert numbers == list(range(16)) * (len(numbers) // 16)
        assert len(numbers) == describe_video(joined).num_frames == 16 * (len(joined) // len(part))
    packets = [part[at : at + 188] for at in range(0, len(part), 188)]
    lost = packets.index(next(p for p in packets[15:] if p[1] & 0x1F == 1))
    with pytest.raises(BadSample, match="packets before them are lost"):
        describe_video(b"".join(packets[:lost] + packets[lost + 1 :]) + later)


@pytest.mark.parametrize("name", list(KINDS))
def test_damaged_headers_end_in_an_answer(name: str) -> None:
    """Sizes and counts may be anything: nothing else is raised, and no memory is taken."""
    content = bytearray(make_file(KINDS[name]))
    draws = np.random.default_rng(1)
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(draws.integers(1, 9)):
            place = int(draws.integers(0, len(content)) * draws.random() ** 4)
            damaged[place] = draws.choice([0, 1, 0x7F, 0x80, 0xFF])
        damaged = (
            damaged[: int(draws.integers(0, len(damaged) + 1))] if draws.random() < 0.3 else damaged
        )
        with suppress(CutShort):
            stated_end(bytes(damaged))
    for size in range(0, 64):
        with suppress(CutShort):
            stated_end(bytes(content[:size]))
