"""Frames and times of videos whose time stamps are repeated, missing or out of order, and frames
that are taken evenly in time."""

from __future__ import annotations

import functools
import io
import json
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from builders.clip_files import pack_settings
from builders.counter_files import Encoding, make_video, number_of
from builders.decoder_cases import decoders
from builders.shown_videos import with_pixel_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from tvr.data_prep.cli import pack
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import check_frames, sample_frames
from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.frame_index import index_packets
from tvr.data_prep.video.frame_sampling import (
    is_constant,
    mend_stamps,
    segment_frames,
    timed_frames,
)
from tvr.data_prep.video.reencode import reencode_video
from tvr.data_prep.video.stored_index import index_member

MS = Fraction(1, 1000)
GAP_MS = 5000
NO_B_FRAMES = {"preset": "veryfast", "bf": "0", "g": "8"}
B_FRAMES = {"preset": "veryfast", "bf": "2", "g": "8"}
# 40 frames; a pause before frame 20.
GAPPED = [40 * i + (GAP_MS if i >= 20 else 0) for i in range(40)]

HOURS = [40 * i + (3 * 3600_000 if i >= 20 else 0) for i in range(40)]


# ------------------------------------------------------------------ files with bad time stamps


def elements(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (id, start, end) of the content of each Matroska element."""
    while start < end:
        id_bytes = 9 - content[start].bit_length()
        kind = int.from_bytes(content[start : start + id_bytes], "big")
        start += id_bytes
        size_bytes = 9 - content[start].bit_length()
        size = int.from_bytes(content[start : start + size_bytes], "big")
        start += size_bytes
        size -= 1 << 7 * size_bytes
        yield kind, start, start + size
        start += size


def matroska(options: Mapping[str, str], stamps: Mapping[int, int]) -> bytes:
    """A Matroska file of GAPPED whose packets, by number in the file, have other time stamps."""
    encoding = Encoding(
        ticks=GAPPED,
        options=dict(options),
        container="matroska",
        muxer={"cluster_time_limit": "32000"},
    )
    video, number = bytearray(make_video(encoding)), 0
    ((_, start, end),) = (e for e in elements(bytes(video), 0, len(video)) if e[0] == 0x18538067)
    for kind, first, last in elements(bytes(video), start, end):
        if kind == 0x1F43B675:
            for block, at, _ in elements(bytes(video), first, last):
                if block == 0xA3:
                    if number in stamps:
                        struct.pack_into(">h", video, at + 1, stamps[number])
                    number += 1
    assert number == 40
    return bytes(video)


def transport_stream(without: Sequence[int] = (), shift: int = 5000) -> bytes:
    """A transport stream of GAPPED; some of its packets, by number, have no time stamps."""
    encoding = Encoding(ticks=GAPPED, options=NO_B_FRAMES, container="mpegts", shift=shift)
    video, number = bytearray(make_video(encoding)), -1
    for at in range(0, len(video), 188):
        start = at + 4 + (1 + video[at + 4] if video[at + 3] & 0x20 else 0)
        if video[at + 1] & 0x40 and video[start : start + 4] == b"\0\0\1\xe0":
            number += 1
            if number in without:
                video[start + 7] &= 0x3F
                length = video[start + 8]
                video[start + 9 : start + 9 + length] = b"\xff" * length
    assert number == 39
    return bytes(video)


def avi_with_pauses(options: Mapping[str, str]) -> bytes:
    """An AVI file of GAPPED; it stores a pause as empty chunks, and decoding times only."""
    buffer = io.BytesIO()
    still = make_video(Encoding(options=dict(options), container="avi"))
    with av.open(io.BytesIO(still)) as source, av.open(buffer, "w", format="avi") as output:
        copy = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size:
                packet.stream = copy
                packet.dts = packet.pts = GAPPED[number] // 40
                output.mux(packet)
    return buffer.getvalue()


@dataclass(frozen=True)
class Case:
    """A video of 40 frames, and their times in ms."""

    make: Callable[[], bytes]
    times: Sequence[int]
    is_mended: bool = True


CASES = {
    "repeated": Case(lambda: matroska(NO_B_FRAMES, {10: 360}), GAPPED),
    "repeated before the pause": Case(lambda: matroska(NO_B_FRAMES, {19: 720}), GAPPED),
    "repeated three times": Case(lambda: matroska(NO_B_FRAMES, {9: 320, 10: 320, 11: 320}), GAPPED),
    "repeated among B-frames": Case(lambda: matroska(B_FRAMES, {11: 360}), GAPPED),
    "one too early": Case(lambda: matroska(NO_B_FRAMES, {10: 195}), GAPPED),
    "one far too late": Case(lambda: matroska(NO_B_FRAMES, {10: 20000}), GAPPED),
    "several too late": Case(lambda: matroska(NO_B_FRAMES, {10: 20000, 30: 30000}), GAPPED),
    "negative": Case(
        lambda: matroska(NO_B_FRAMES, {i: GAPPED[i] - 300 for i in range(40)}), GAPPED
    ),
    "starts anew": Case(
        lambda: matroska(NO_B_FRAMES, {i: 40 * (i - 20) for i in range(20, 40)}),
        [40 * i for i in range(40)],
    ),
    "missing": Case(lambda: transport_stream(without=[10, 11, 30]), GAPPED),
    "wrapped": Case(lambda: transport_stream(shift=(1 << 33) // 90 - 500), GAPPED, False),
    "hours": Case(lambda: make_video(Encoding(ticks=HOURS, options=B_FRAMES)), HOURS, False),
    "avi with a pause": Case(lambda: avi_with_pauses(NO_B_FRAMES), GAPPED),
    "avi of B-frames with a pause": Case(lambda: avi_with_pauses(B_FRAMES), GAPPED),
}
video = functools.cache(lambda name: CASES[name].make())


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame, Encoding()) for frame in frames]


@pytest.mark.parametrize("name", list(CASES))
@decoders
def test_each_frame_keeps_its_time(decoder: Decoder, name: str) -> None:
    frames, times_s = frame_sampler(decoder)(video(name), 40)
    assert numbers(frames) == list(range(40))
    # A time base of whole ms holds no 90 kHz.
    assert times_s == pytest.approx([ms / 1000 for ms in CASES[name].times], abs=0.0011)


@pytest.mark.parametrize("name", list(CASES))
@decoders
def test_spans_after_a_bad_stamp(decoder: Decoder, name: str) -> None:
    times = CASES[name].times
    span = ((times[25] - 5) / 1000, (times[33] - 5) / 1000)
    frames, times_s = frame_sampler(decoder)(video(name), 3, span=span)
    assert numbers(frames) == [26, 29, 31]
    assert times_s == pytest.approx([0.04, 0.16, 0.24], abs=0.0011)
    frames, _ = frame_sampler(decoder)(video(name), 8, span=(0.0, (times[8] - 5) / 1000))
    assert numbers(frames) == list(range(8))


@pytest.mark.parametrize("name", list(CASES))
def test_a_cut_and_a_stored_index_agree(name: str) -> None:
    content, times = video(name), CASES[name].times
    span = ((times[25] - 5) / 1000, (times[33] - 5) / 1000)
    cut = reencode_video(content, short_side=None, keyframe_interval=4, span=span)
    frames, times_s = sample_frames(cut, 40)
    assert numbers(frames) == list(range(25, 33))
    assert times_s == pytest.approx([0.04 * i for i in range(8)], abs=0.0011)
    decoded = check_frames(content)
    assert (decoded.stamps is not None) == CASES[name].is_mended
    if CASES[name].is_mended:
        assert index_member(content, "k", decoded) == {}


def test_joined_recordings_continue() -> None:
    joined = transport_stream(shift=9000) + transport_stream(shift=1000)
    frames, times_s = sample_frames(joined, 80)
    assert numbers(frames) == [*range(40), *range(40)]
    second = [GAPPED[-1] + 40 + tick for tick in GAPPED]
    assert times_s == pytest.approx([ms / 1000 for ms in [*GAPPED, *second]], abs=0.0011)


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ([0, 40, 40, 120], [0, 40, 80, 120]),
        ([0, 40, 41, 41, 42], [0, 40, 41, 42, 43]),
        ([0, 40, None, None, 9000, 9040], [0, 40, 80, 120, 9000, 9040]),
        ([None, 40, 80, None], [0, 40, 80, 120]),
        ([0, 40, 36_000_000, 120, 160], [0, 40, 80, 120, 160]),
        ([36_000_000, 40, 80, 120, 160], [0, 40, 80, 120, 160]),
        ([0, 40, 3, 120, 160], [0, 40, 80, 120, 160]),
        ([-80, -40, 0, 40], [-80, -40, 0, 40]),
        ([5, 5, 5], [5, 45, 85]),
        ([500, 540, 580, 620, 660, 0, 40, 80, 120, 160], [500 + 40 * i for i in range(10)]),
        ([*range(0, 200, 40), *range(10**9, 10**9 + 200, 40)], [40 * i for i in range(10)]),
        ([95443500 + 40 * i for i in range(5)] + [83, 123, 163, 203, 243], None),
        ([7], [7]),
    ],
    ids=lambda value: "",
)
def test_stamps_are_mended(stamps: list[int | None], times: list[int] | None) -> None:
    mended = mend_stamps(stamps, MS, Fraction(25))
    assert mended is not None
    if times is None:  # 33 bits are full after 95443717.69 ms
        times = [95443500 + 40 * i for i in range(5)] + [95443801 + 40 * i for i in range(5)]
    assert [time - mended[-1] for time in mended] == [time - times[-1] for time in times]


def test_stamps_that_are_all_missing() -> None:
    assert mend_stamps([None, None], MS, Fraction(25)) is None


@settings(max_examples=60)
@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300), max_size=40))
def test_any_stamps_give_ascending_times(stamps: list[int | None]) -> None:
    times = mend_stamps(stamps, MS, Fraction(25))
    if times is not None:
        assert len(times) == len(stamps)
        assert all(first < second for first, second in pairwise(times))
        assert list(timed_frames(times, 7)) == sorted(timed_frames(times, 7))


# ------------------------------------------------------------------ evenly in time

# 10 s of a frame a second, then 1 s of 60 frames.
TWO_RATES = [1000 * i for i in range(10)] + [10000 + round(1000 * i / 60) for i in range(60)]


def shown_at(ticks: Sequence[int], moment: Fraction) -> int:
    return bisect_right(ticks, moment) - 1


def test_two_rates_in_equal_segments() -> None:
    chosen = timed_frames(TWO_RATES, 12)
    duration = 11_000 + (TWO_RATES[-1] - TWO_RATES[-3]) // 2 - 17  # the last frame: 16 or 17 ms
    expected = [shown_at(TWO_RATES, Fraction(2 * i + 1, 24) * duration) for i in range(12)]
    assert chosen == expected
    assert chosen == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, chosen[-1]]
    assert 40 <= chosen[-1] <= 43
    assert sum(index >= 10 for index in segment_frames(70, 12)) == 10  # by index


@settings(max_examples=60)
@given(
    rate=st.sampled_from(["24000/1001", "25", "30000/1001", "50", "60000/1001", "15/2"]),
    tick_s=st.sampled_from(["1/1000", "1/90000", "1/100"]),
    total=st.integers(1, 400),
    shift=st.fractions(0, 1),
    offsets=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
)
def test_constant_rates_are_sampled_by_index(
    rate: str, tick_s: str, total: int, shift: Fraction, offsets: list[float]
) -> None:
    step = 1 / Fraction(rate) / Fraction(tick_s)
    if step < 2:
        return
    ticks = [round(step * i + shift) for i in range(total)]
    assert is_constant(ticks)
    for each in (None, offsets):
        assert timed_frames(ticks, len(offsets), each) == segment_frames(total, len(offsets), each)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=60),
    st.lists(st.fractions(0, Fraction(99, 100)), min_size=1, max_size=20),
)
def test_other_rates_are_sampled_in_time(steps: list[int], shares: list[Fraction]) -> None:
    ticks = np.cumsum([7, *steps]).tolist()
    chosen = timed_frames(ticks, len(shares), [float(share) for share in shares])
    if len(ticks) <= len(shares) or is_constant(ticks):
        return
    starts = [tick - 7 for tick in ticks]
    duration = starts[-1] + min(steps[-2:])
    assert chosen == sorted(chosen)
    for place, (share, index) in enumerate(zip(shares, chosen, strict=True)):
        moment = float((place + share) * duration / len(shares))
        assert starts[index] <= moment + 1e-6
        assert index == len(ticks) - 1 or moment - 1e-6 <= starts[index + 1]


def test_what_is_constant() -> None:
    even = [40 * i for i in range(50)]
    assert is_constant([])
    assert is_constant(even)
    assert is_constant([tick + 8 * (i % 2) for i, tick in enumerate(even)])
    assert not is_constant([tick + 40 * (i >= 25) for i, tick in enumerate(even)])
    assert not is_constant([0, 40, 120])


@functools.cache
def two_rates(container: str) -> bytes:
    return make_video(Encoding(ticks=TWO_RATES, options=B_FRAMES, container=container))


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@decoders
def test_frames_of_two_rates(decoder: Decoder, container: str) -> None:
    sample = frame_sampler(decoder)
    frames, times_s = sample(two_rates(container), 12)
    found = numbers(frames)
    assert found[:11] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert 40 <= found[11] <= 43
    assert times_s == pytest.approx([TWO_RATES[i] / 1000 for i in found], abs=0.0011)
    by_index, _ = sample(two_rates(container), 12, spacing="index")
    assert numbers(by_index) == segment_frames(70, 12)
    # Positions in the segments are positions in time, also within a span.
    frames, _ = sample(two_rates(container), 4, span=(6.0, None), offsets=[0.0, 0.9, 0.5, 0.99])
    assert numbers(frames)[:3] == [6, 8, 9]
    assert numbers(frames)[3] > 60


def test_packing_and_reading_choose_by_time_or_index(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(two_rates("mp4"))
    line = {"video": "v.mp4", "caption": "two rates"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))

    def packed(name: str, *options: str) -> str:
        url = str(tmp_path / name)
        arguments = ["--annotations", str(tmp_path / "a.jsonl"), "--out", url, "--no-words"]
        assert pack([*arguments, "--processes", "0", *options]) == 0
        return url

    in_time = [TWO_RATES[i] / 1000 for i in (0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9)]
    by_index = [TWO_RATES[i] / 1000 for i in segment_frames(70, 12)]
    read = functools.partial(SampleReader, num_frames=12, image_size=16)
    frames = packed("time", "--layout", "frames")
    assert read(frames).read(0).frame_times_s[:11] == pytest.approx(in_time, abs=0.001)
    frames = packed("index", "--layout", "frames", "--frame-spacing", "index")
    assert read(frames).read(0).frame_times_s == pytest.approx(by_index, abs=0.001)
    videos = packed("video", "--layout", "video")
    assert read(videos).read(0).frame_times_s[:11] == pytest.approx(in_time, abs=0.001)
    sample = read(videos, frame_spacing="index").read(0)
    assert sample.frame_times_s == pytest.approx(by_index, abs=0.001)


def test_spacing_is_part_of_the_plan() -> None:
    assert pack_settings().frame_spacing == "time"
    with pytest.raises(ValueError, match="frame_spacing='even' must be time or index"):
        pack_settings(frame_spacing="even")
    with pytest.raises(ValueError, match=r"layout=frames; .* \(data.frame_spacing\)"):
        pack_settings(layout="video", frame_spacing="index")


# ------------------------------------------------------------------ packets without a picture


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@decoders
def test_packets_that_give_no_picture_are_not_passed_over(decoder: Decoder, container: str) -> None:
    """libav takes such a shape of pixels for a change before every picture, and drops what the
    pictures refer to; only keyframes are left."""
    content = with_pixel_shape(make_video(Encoding(options=B_FRAMES)), "200/1", container)
    assert index_packets(content, "k").num_frames == 40
    with pytest.raises(BadSample, match="k: unreadable: "):
        frame_sampler(decoder)(content, 12, key="k")
    with pytest.raises(BadSample, match="k: unreadable: only 5 of 40 packets give a picture"):
        check_frames(content, key="k")
