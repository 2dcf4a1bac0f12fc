"""Every decoder returns exactly the requested frames; each frame shows its own number."""

from __future__ import annotations

import functools
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest
from builders.counter_files import TICKS_PER_S, Encoding, make_video, number_of
from builders.decoder_cases import decoders, no_torchcodec, torchcodec

from tvr.data_prep.records import BadSample
from tvr.data_prep.video import indexed_decode
from tvr.data_prep.video.decode import check_frames, sample_frames
from tvr.data_prep.video.decoders import Decoder, FrameSampler, frame_sampler
from tvr.data_prep.video.frame_index import index_packets
from tvr.data_prep.video.frame_sampling import Span
from tvr.data_prep.video.reencode import reencode_video
from tvr.data_prep.video.stored_index import INDEX_MEMBER, decode_index, index_member


def x264(**options: object) -> dict[str, str]:
    return {"preset": "veryfast"} | {name: str(value) for name, value in options.items()}


def x264_params(params: str) -> dict[str, str]:
    return x264(**{"x264-params": params})


UNEVEN = np.cumsum([0, *np.random.default_rng(1).integers(5, 400, 39)]).tolist()
UNSHIFTED = {"avoid_negative_ts": "disabled"}
INDEXED = {
    "long gop": Encoding(options=x264(g=250, bf=3)),
    "gop 8": Encoding(options=x264(g=8, bf=2)),
    "no b-frames": Encoding(options=x264(g=8, bf=0)),
    "b-pyramid": Encoding(frames=100, options=x264_params("keyint=30:bframes=8:b-adapt=0:ref=5")),
    "open gop": Encoding(
        options=x264_params("open-gop=1:keyint=8:min-keyint=4:bframes=3:b-adapt=0")
    ),
    "hevc open gop": Encoding(
        codec="libx265",
        options={
            "preset": "ultrafast",
            "x265-params": "log-level=none:keyint=10:bframes=3:open-gop=1:pools=none",
        },
    ),
    "variable rate": Encoding(ticks=UNEVEN, options=x264(g=8)),
    "variable rate mkv": Encoding(ticks=UNEVEN, container="matroska"),
    "rotated 90": Encoding(rotation=90),
    "rotated 180": Encoding(rotation=180),
    "rotated 270": Encoding(rotation=270),
    "odd size": Encoding(width=77, height=51, pixels="yuv444p"),
    "odd size vp9": Encoding(
        width=77,
        height=51,
        codec="libvpx-vp9",
        container="webm",
        options={"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "g": "12"},
    ),
    "10 bit": Encoding(pixels="yuv420p10le"),
    "full range": Encoding(pixels="yuvj420p"),
    "interlaced": Encoding(options=x264_params("interlaced=1:tff=1:keyint=12")),
    "30 s": Encoding(frames=750),
    "30 s gop 16": Encoding(frames=750, options=x264(g=16)),
    "one frame": Encoding(frames=1),
    "three frames": Encoding(frames=3),
    "edit list": Encoding(options=x264(g=8), shift=-240, muxer=UNSHIFTED),
    "edit list long gop": Encoding(options=x264(g=250), shift=-240, muxer=UNSHIFTED),
    "late start": Encoding(options=x264(g=8), shift=5000),
    "fragments": Encoding(options=x264(g=8), muxer={"movflags": "frag_keyframe+empty_moov"}),
    "matroska": Encoding(options=x264(g=8), container="matroska"),
}
OTHERS = {
    "intra refresh": Encoding(options=x264_params("intra-refresh=1:keyint=10:bframes=0")),
    "transport stream": Encoding(options=x264(g=8), container="mpegts", shift=5000),
    "flash": Encoding(options=x264(g=8), container="flv"),
    "avi": Encoding(codec="mpeg4", container="avi", options={"bf": "2", "g": "12"}),
    "avi without time stamps": Encoding(options=x264(g=8, bf=2), container="avi"),
    "bare h264": Encoding(options=x264(g=8), container="h264"),
}
ENCODINGS = INDEXED | OTHERS
video = functools.cache(lambda name: make_video(ENCODINGS[name]))


def expected(
    encoding: Encoding, num_frames: int, span: Span | None, offsets: Sequence[float] | None
) -> tuple[list[int], list[float]]:
    """Computes the frames and times from the definition, in exact arithmetic."""
    start, end = span or (0, None)
    ticks = encoding.times
    shown = [
        index
        for index in range(encoding.first, len(ticks))
        if round(start * TICKS_PER_S) <= ticks[index] - ticks[encoding.first]
        and (end is None or ticks[index] - ticks[encoding.first] < round(end * TICKS_PER_S))
    ]
    shares = [Fraction(offset) for offset in offsets or [0.5] * num_frames]
    if len(shown) > num_frames and encoding.ticks:  # the frame that is shown at each moment
        starts = [ticks[index] - ticks[shown[0]] for index in shown]
        duration = starts[-1] + min(second - first for first, second in pairwise(starts[-3:]))
        moments = [(i + share) * duration / num_frames for i, share in enumerate(shares)]
        chosen = [shown[bisect_right(starts, moment) - 1] for moment in moments]
    elif len(shown) > num_frames:
        positions = [(i + share) * len(shown) / num_frames for i, share in enumerate(shares)]
        chosen = [shown[int(position)] for position in positions]
    else:
        chosen = shown
    return chosen, [(ticks[index] - ticks[shown[0]]) / TICKS_PER_S for index in chosen]


def check(sample: FrameSampler, name: str, span: Span | None, num_frames: int, seed: int) -> int:
    """Samples at the middles and at random offsets; returns the number of checked frames."""
    seen = 0
    for offsets in (None, np.random.default_rng(seed).random(num_frames).tolist()):
        frames, times_s = sample(video(name), num_frames, span=span, offsets=offsets)
        numbers, seconds = expected(ENCODINGS[name], num_frames, span, offsets)
        assert [number_of(frame, ENCODINGS[name]) for frame in frames] == numbers
        assert times_s == pytest.approx(seconds, abs=2e-6)
        seen += len(frames)
    return seen


def spans(encoding: Encoding) -> list[Span | None]:
    duration_s = (encoding.times[-1] - encoding.times[encoding.first]) / TICKS_PER_S
    if duration_s < 1:
        return [None, (0.0, duration_s + 0.001)]
    third = round(duration_s / 3, 3)
    return [None, (third, 2 * third), (2 * third, None), (round(duration_s - 0.1, 3), None)]


@pytest.mark.parametrize(
    ("decoder", "name"),
    [pytest.param("pyav", name) for name in ENCODINGS]
    + [pytest.param("torchcodec", name, marks=torchcodec.marks) for name in INDEXED],
)
def test_no_frame_is_wrong(decoder: Decoder, name: str) -> None:
    sample, seen = frame_sampler(decoder), 0
    for seed, span in enumerate(spans(ENCODINGS[name])):
        for num_frames in (1, 7, 12):
            seen += check(sample, name, span, num_frames, seed)
    assert seen > 3


@pytest.mark.parametrize("name", ["gop 8", "variable rate", "edit list", "late start", "30 s"])
@decoders
def test_all_frames_in_order(decoder: Decoder, name: str) -> None:
    encoding = ENCODINGS[name]
    frames, _ = frame_sampler(decoder)(video(name), 2000)
    assert [number_of(frame, encoding) for frame in frames] == list(
        range(encoding.first, len(encoding.times))
    )


@pytest.mark.skipif(bool(no_torchcodec), reason=no_torchcodec)
@pytest.mark.parametrize("name", list(INDEXED))
def test_both_decoders_give_the_same_pixels(name: str) -> None:
    ours, ours_s = sample_frames(video(name), 12)
    theirs, theirs_s = frame_sampler("torchcodec")(video(name), 12)
    assert ours_s == theirs_s
    # FFmpeg versions round the last colours of odd 4:2:0 pictures differently.
    allowed = 1 if name == "odd size vp9" else 0
    assert np.abs(ours.astype(int) - theirs).max() <= allowed


@pytest.mark.parametrize("name", list(ENCODINGS))
def test_a_cut_holds_the_frames_of_its_span(name: str) -> None:
    encoding, span = ENCODINGS[name], spans(ENCODINGS[name])[1]
    cut = reencode_video(video(name), short_side=None, keyframe_interval=8, span=span)
    numbers, times_s = expected(encoding, 2000, span, None)
    frames, again_s = sample_frames(cut, 2000)
    upright = Encoding(width=frames.shape[2], height=frames.shape[1], rotation=0)
    stored = [np.rot90(frame, encoding.rotation // 90) for frame in frames]
    even = Encoding(width=encoding.width // 2 * 2, height=encoding.height // 2 * 2)
    assert [number_of(frame, even) for frame in stored] == numbers
    assert again_s == pytest.approx(times_s, abs=0.001)
    assert (upright.width % 2, upright.height % 2) == (0, 0)


# Their containers have no reliable time stamps.
NOT_STORED = {"avi without time stamps", "bare h264"}
# The keyframes that these mark cannot start a decode.
APPROXIMATE = {"intra refresh"}


@pytest.mark.parametrize(
    ("decoder", "name"),
    [pytest.param("pyav", name) for name in ENCODINGS]
    + [pytest.param("torchcodec", name, marks=torchcodec.marks) for name in INDEXED],
)
def test_a_stored_index_gives_the_same_frames(
    decoder: Decoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sample = video(name), frame_sampler(decoder)
    members = index_member(content, "k", check_frames(content))
    assert bool(members) == (name not in NOT_STORED)
    if not members:
        return
    stored = decode_index(members[INDEX_MEMBER], len(content), "k")
    assert stored == index_packets(content, "k")
    draws = np.random.default_rng(0)
    offsets = [
        None,
        *(draws.random(7).tolist() for _ in range(4)),
        *([share] for share in (0, 0.99)),
    ]
    counts = [len(each or range(7)) for each in offsets]
    before = [
        sample(content, count, offsets=each) for count, each in zip(counts, offsets, strict=True)
    ]
    if name not in APPROXIMATE and decoder == "pyav":  # torchcodec's packets are read in any case
        path = "tvr.data_prep.video.frame_index.index_packets"
        monkeypatch.setattr(path, lambda *_: pytest.fail("the packets were listed"))
    for count, each, (frames, times_s) in zip(counts, offsets, before, strict=True):
        again, again_s = sample(content, count, offsets=each, frame_index=stored)
        assert np.array_equal(frames, again)
        assert times_s == again_s


@pytest.mark.parametrize("name", list(ENCODINGS))
def test_a_stored_index_gives_every_frame(name: str) -> None:
    """One by one, so that each is the last one of a decode, and all others may be skipped."""
    content = video(name)
    members = index_member(content, "k", check_frames(content))
    if not members:
        return
    stored = decode_index(members[INDEX_MEMBER], len(content), "k")
    every, _ = sample_frames(content, stored.num_frames)
    step = max(1, stored.num_frames // 25)
    for number in range(0, stored.num_frames, step):
        share = (number + 0.5) / stored.num_frames
        (frame,), _ = sample_frames(
            content, 1, offsets=[share], frame_index=stored, spacing="index"
        )
        assert np.array_equal(frame, every[number]), number


def test_frames_that_no_other_refers_to_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content, shown = video("30 s gop 16"), list[int]()
    stored = decode_index(index_member(content, "k")[INDEX_MEMBER], len(content), "k")
    true_frames = indexed_decode._frames

    def counted(*arguments: Any) -> Iterator[Any]:
        for frame in true_frames(*arguments):
            shown.append(frame.pts)
            yield frame

    monkeypatch.setattr(indexed_decode, "_frames", counted)
    offsets = [0.7] * 30  # frames 17.5, 42.5, ...: behind a keyframe by 1 to 15 frames
    sample_frames(content, 30, offsets=offsets, frame_index=stored)
    decoded = []
    fits = indexed_decode._fits
    monkeypatch.setattr(indexed_decode, "_fits", lambda *all: decoded.append(all[1]) or fits(*all))
    sample_frames(content, 30, offsets=offsets)
    assert 30 <= len(shown) < 0.8 * len(decoded)


@pytest.mark.parametrize("other", ["30 s", "gop 8", "variable rate", "late start"])
@decoders
def test_a_wrong_index_does_not_change_the_frames(decoder: Decoder, other: str) -> None:
    sample, name = frame_sampler(decoder), "no b-frames"
    wrong = index_packets(video(other), "k")
    right, right_s = sample(video(name), 12)
    frames, times_s = sample(video(name), 12, frame_index=wrong)
    assert np.array_equal(frames, right)
    assert times_s == right_s


def test_only_frames_after_the_last_keyframe_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    fits = indexed_decode._fits
    monkeypatch.setattr(indexed_decode, "_fits", lambda *all: decoded.append(all[1]) or fits(*all))
    name = "30 s gop 16"
    check(sample_frames, name, (20.0, 25.0), 6, 0)
    assert len(set(decoded)) < 130
    assert min(decoded) >= 496  # the keyframe before 20 s
    assert max(decoded) < 625


@decoders
def test_indexed_frames_that_cannot_be_decoded(decoder: Decoder) -> None:
    """Without its first keyframe the video starts 5 frames late."""
    encoding, buffer = ENCODINGS["gop 8"], io.BytesIO()
    with (
        av.open(io.BytesIO(video("gop 8")), "r") as source,
        av.open(buffer, "w", format="mp4") as output,
    ):
        copy = output.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(source.streams.video[0]))[3:]:
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    frames, _ = frame_sampler(decoder)(buffer.getvalue(), 40)
    assert [number_of(frame, encoding) for frame in frames] == list(range(8, 40))


def test_a_decoder_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tvr.data_prep.video.decode_torchcodec", None)
    with pytest.raises(ValueError, match=r"needs pip install 'tvr\[torchcodec\]' .* FFmpeg"):
        frame_sampler("torchcodec")
    with pytest.raises(ValueError, match="decoder='decord' must be pyav or torchcodec"):
        frame_sampler("decord")  # type: ignore[arg-type]


@pytest.mark.skipif(bool(no_torchcodec), reason=no_torchcodec)
@pytest.mark.parametrize("name", ["intra refresh", "transport stream", "avi"])
def test_torchcodec_leaves_what_it_does_not_find_to_pyav(name: str) -> None:
    """Where a marked keyframe cannot start a decode, the time stamps after a seek reveal this."""
    sample = frame_sampler("torchcodec")
    assert sum(check(sample, name, span, 12, 0) for span in spans(ENCODINGS[name])) > 12


@pytest.mark.skipif(bool(no_torchcodec), reason=no_torchcodec)
def test_torchcodec_refuses_without_output(capfd: pytest.CaptureFixture[str]) -> None:
    sample, content = frame_sampler("torchcodec"), video("long gop")
    for broken in (b"", b"no video" * 50, content[: len(content) // 2]):
        with pytest.raises(BadSample, match="k: unreadable"):
            sample(broken, 4, key="k")
    with pytest.raises(BadSample, match="the video has none"):
        sample(video("bare h264"), 4, key="k")
    with pytest.raises(BadSample, match="missing_file"):
        sample("/nonexistent.mp4", 4, key="k")
    with pytest.raises(BadSample, match="no_frames"):
        sample(content, 4, span=(5.0, 6.0), key="k")
    with pytest.raises(ValueError, match="0 <= start < end"):
        sample(content, 4, span=(2.0, 1.0))
    assert capfd.readouterr() == ("", "")
