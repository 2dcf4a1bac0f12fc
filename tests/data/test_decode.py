"""Frame sampling: exact frames, and refusal of videos that cannot be decoded."""

from __future__ import annotations

import functools
import io
import struct

import av
import numpy as np
import pytest
from builders.clip_files import number_picture, numbered_video, read_number, sound_only
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import describe_video, sample_frames
from tvr.data_prep.video.frame_sampling import segment_centres
from tvr.data_prep.video.images import decode_jpeg, encode_jpeg, fit_square, resize_short_side
from tvr.data_prep.video.reencode import reencode_video


@pytest.mark.parametrize(("gop", "bframes"), [(250, 3), (8, 2), (8, 0), (1, 0)])
@pytest.mark.parametrize("num_frames", [1, 7, 50])
def test_frames_are_the_segment_centres(gop: int, bframes: int, num_frames: int) -> None:
    video = numbered_video(50, gop=gop, bframes=bframes)
    frames, times_s = sample_frames(video, num_frames)
    expected = segment_centres(50, num_frames)
    assert [read_number(frame) for frame in frames] == expected
    assert times_s == pytest.approx([index / 10 for index in expected])
    assert (frames.shape, frames.dtype) == ((num_frames, 32, 64, 3), np.uint8)


@given(st.integers(1, 300), st.integers(1, 40))
def test_segment_centres_are_spread_evenly(total: int, wanted: int) -> None:
    chosen = segment_centres(total, wanted)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(total, wanted)
    assert chosen[0] + chosen[-1] in (total - 1, total)  # symmetric up to rounding
    for position, index in enumerate(chosen):
        centre = (position + 0.5) * total / len(chosen)
        assert index <= centre < index + 1


@pytest.mark.parametrize("present", [1, 3])
def test_a_short_video_gives_all_its_frames(present: int) -> None:
    frames, times_s = sample_frames(numbered_video(present, first=5), 12)
    assert [read_number(frame) for frame in frames] == list(range(5, 5 + present))
    assert len(times_s) == present


def test_variable_rate_timestamps_are_kept() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for index, tick in enumerate((0, 1, 7, 20)):
            frame = av.VideoFrame.from_ndarray(number_picture(index), format="rgb24")
            frame.pts = tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    frames, times_s = sample_frames(buffer.getvalue(), 4)
    assert [read_number(frame) for frame in frames] == [0, 1, 2, 3]
    assert times_s == pytest.approx((0, 0.1, 0.7, 2.0))


def test_rotation_is_applied() -> None:
    video = bytearray(numbered_video(3, first=1, gop=1))  # bit 0: the top left block is white
    matrix = video.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    video[matrix : matrix + 36] = quarter  # x' = 32 - y, y' = x: clockwise
    frames, _ = sample_frames(bytes(video), 1)
    upright = np.rot90(number_picture(2), k=-1)  # the middle of the numbers 1, 2, 3
    assert frames.shape[1:] == (64, 32, 3)
    assert np.abs(frames[0].astype(int) - upright).mean() < 8
    again, _ = sample_frames(reencode_video(bytes(video), short_side=None, keyframe_interval=4), 1)
    assert np.abs(again[0].astype(int) - upright).mean() < 16


def test_odd_sizes() -> None:
    buffer = io.BytesIO()
    picture = np.arange(33 * 47 * 3, dtype=np.uint32).reshape(33, 47, 3) % 251
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 47, 33, "yuv444p"
        stream.options = {"qp": "0"}
        frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    frames, _ = sample_frames(buffer.getvalue(), 2)
    assert frames.shape == (1, 33, 47, 3)
    assert np.abs(frames[0].astype(int) - picture).mean() < 3
    smaller = reencode_video(buffer.getvalue(), short_side=21, keyframe_interval=4)
    assert sample_frames(smaller, 1)[0].shape == (1, 20, 30, 3)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_undecodable_packets_do_not_shift_the_choice(container: str) -> None:
    """Without the first keyframe frames 3 to 7 cannot be decoded: 16 of 21 packets count."""
    whole, buffer = numbered_video(24, gop=8, bframes=0), io.BytesIO()
    with (
        av.open(io.BytesIO(whole), "r") as source,
        av.open(buffer, "w", format=container) as output,
    ):
        copy = output.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(source.streams.video[0]))[3:]:
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    assert describe_video(buffer.getvalue()).num_frames == 21
    frames, _ = sample_frames(buffer.getvalue(), 4)
    assert [read_number(frame) for frame in frames] == [10, 14, 18, 22]


def noise_with_a_flipped_bit() -> bytes:
    """Returns a video that libav decodes, with the damaged rest of one picture concealed."""
    buffer, noise = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.thread_count = 1
        for _ in range(8):
            picture = noise.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    video = bytearray(buffer.getvalue())
    first, second = packet_ends(bytes(video))[3:5]
    video[(first + second) // 2] ^= 16
    return bytes(video)


def packet_ends(video: bytes) -> list[int]:
    with av.open(io.BytesIO(video), "r") as container:
        packets = container.demux(container.streams.video[0])
        return [packet.pos + packet.size for packet in packets if packet.size]


@functools.cache
def broken_videos() -> dict[str, tuple[bytes, str]]:
    whole = numbered_video(30, faststart=True)
    ends = packet_ends(whole)
    flipped = bytearray(whole)
    for index in range(ends[0] - 60, ends[0] - 10):
        flipped[index] ^= 0xA5
    return {
        "garbage": (b"no video at all" * 50, "unreadable"),
        "empty": (b"", "unreadable"),
        "index cut off": (numbered_video(30)[:-200], "unreadable"),
        "cut within a packet": (whole[: ends[12] - 3], "unreadable"),
        "cut between packets": (whole[: ends[12]], "unreadable"),
        "damaged stream": (bytes(flipped), "unreadable"),
        "damaged picture": (noise_with_a_flipped_bit(), "unreadable"),
        "sound only": (sound_only(), "no_frames"),
    }


def described_and_reencoded(video: bytes) -> bytes:
    describe_video(video, key="k")  # as packing does: only the index reveals a cut between packets
    return reencode_video(video, short_side=None, keyframe_interval=8, key="k")


@pytest.mark.parametrize("name", list(broken_videos()))
def test_broken_videos_are_refused_without_output(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    video, reason = broken_videos()[name]
    with pytest.raises(BadSample) as caught:
        sample_frames(video, 4, key="k")
    assert (caught.value.key, caught.value.reason) == ("k", reason)
    with pytest.raises(BadSample):
        described_and_reencoded(video)
    assert capfd.readouterr() == ("", "")  # libav's messages would fill a run's log


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(BadSample, match="k: missing_file"):
        sample_frames("/nonexistent/v.mp4", 1, key="k")


def test_describe_video() -> None:
    info = describe_video(numbered_video(30))
    assert (info.num_frames, info.width, info.height) == (30, 64, 32)
    assert (info.frame_rate_hz, info.duration_s) == (10.0, 3.0)
    assert "mp4" in info.container.split(",")


@pytest.mark.parametrize("gop", [1, 250])
def test_reencode_keeps_frames_times_and_bytes(gop: int) -> None:
    video = numbered_video(30, gop=gop, bframes=3)
    small = reencode_video(video, short_side=16, keyframe_interval=8)
    frames, times_s = sample_frames(small, 30)
    assert frames.shape == (30, 16, 32, 3)
    assert [read_number(frame) for frame in frames] == list(range(30))
    assert times_s == sample_frames(video, 30)[1]
    with av.open(io.BytesIO(small), "r") as container:
        keyframes = [p.is_keyframe for p in container.demux(container.streams.video[0]) if p.size]
    gaps = np.diff(np.flatnonzero([*keyframes, True]))
    assert gaps.max() == 8  # independent of the source's keyframes
    assert reencode_video(video, short_side=16, keyframe_interval=8) == small


def test_sizes_and_jpeg() -> None:
    picture = number_picture(0b10011010)
    fitted = fit_square(np.stack([picture, picture]), 16)
    assert fitted.shape == (2, 16, 16, 3)
    half = resize_short_side(picture[None], 16)[0]
    assert half.shape == (16, 32, 3)
    assert np.array_equal(fitted[0], half[:, 8:24])  # the centre
    assert fit_square(picture[None].swapaxes(1, 2), 40).shape == (1, 40, 40, 3)  # portrait, larger
    jpeg = encode_jpeg(picture, 95)
    assert read_number(decode_jpeg(jpeg, key="k", member="00.jpg")) == 0b10011010
    for broken in (jpeg[: len(jpeg) // 2], b"", b"JFIF" * 30):
        with pytest.raises(BadSample, match=r"k: unreadable: 00\.jpg"):
            decode_jpeg(broken, key="k", member="00.jpg")


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(40, 56), (33, 17)])
def test_pixels_equal_those_of_pillow(subsampling: int, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(subsampling).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90, subsampling=subsampling)
    decoded = decode_jpeg(buffer.getvalue(), key="k", member="00.jpg")
    assert np.array_equal(decoded, np.asarray(Image.open(buffer)))
