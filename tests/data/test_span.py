"""Spans and offsets: the sampled frames, and the same frames from a cut video."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import pytest
from builders.clip_files import numbered_video, read_number
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.frame_sampling import Span, frames_within, segment_centres, segment_frames
from tvr.data_prep.video.reencode import reencode_video

VIDEO = numbered_video(40, gop=8)  # 10 frames/s


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_middles_are_exact(total: int, wanted: int) -> None:
    chosen = segment_centres(total, wanted)
    if total > wanted:
        assert chosen == [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]
    assert segment_frames(total, wanted, [0.5] * wanted) == chosen


shares = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 300), st.lists(shares, min_size=1, max_size=40))
def test_offsets_stay_in_their_segments(total: int, offsets: list[float]) -> None:
    wanted = len(offsets)
    chosen = segment_frames(total, wanted, offsets)
    assert chosen == sorted(chosen)
    assert len(chosen) == min(total, wanted)
    if total > wanted:
        for i, index in enumerate(chosen):
            assert i * total // wanted <= index <= min(total - 1, (i + 1) * total // wanted)


@pytest.mark.parametrize("offsets", [[0.5], [0.5, 1.0], [-0.1, 0.5], [0.5, float("nan")]])
def test_bad_offsets(offsets: list[float]) -> None:
    with pytest.raises(ValueError, match=r"must be 2 numbers, each in \[0, 1\)"):
        segment_frames(10, 2, offsets)


@pytest.mark.parametrize(
    ("span", "first", "end"),
    [
        (None, 0, 40),
        ((0, None), 0, 40),
        ((0.0, 4.0), 0, 40),
        ((1.0, 2.0), 10, 20),
        ((0.1 + 0.2, 0.7), 3, 7),  # 0.30000000000000004
        ((0.95, 1.01), 10, 11),
        ((3.9, None), 39, 40),
        ((3.85, 99.0), 39, 40),
        ((0.51, 0.59), 5, 6),  # no frame begins in it, and frame 5 is shown
        ((3.91, 8.0), 39, 40),
        ((3.999, None), 39, 40),
    ],
)
@pytest.mark.parametrize("offsets", [None, (0.0, 0.9, 0.3)])
def test_a_span_is_sampled_like_a_separate_video(
    span: Span | None, first: int, end: int, offsets: Sequence[float] | None
) -> None:
    expected = [first + i for i in segment_frames(end - first, 3, offsets)]
    frames, times_s = sample_frames(VIDEO, 3, span=span, offsets=offsets)
    assert [read_number(frame) for frame in frames] == expected
    assert times_s == pytest.approx([(index - first) / 10 for index in expected])
    cut = reencode_video(VIDEO, short_side=None, keyframe_interval=16, span=span)
    again, again_s = sample_frames(cut, 3, offsets=offsets)
    assert [read_number(frame) for frame in again] == expected
    assert again_s == times_s
    whole = [read_number(frame) for frame in sample_frames(cut, 100)[0]]
    assert whole == list(range(first, end))
    with av.open(io.BytesIO(cut)) as container:
        packet = next(container.demux(container.streams.video[0]))
        assert packet.is_keyframe
        assert packet.pts == 0


def test_a_span_without_a_frame_is_refused() -> None:
    for span in ((4.0, None), (4.5, 8.0)):
        with pytest.raises(
            BadSample, match=r"k: no_frames: none of 40 frames, the last at 3.9 s, is in"
        ):
            sample_frames(VIDEO, 2, span=span, key="k")
        with pytest.raises(BadSample, match="k: no_frames"):
            reencode_video(VIDEO, short_side=None, keyframe_interval=8, span=span, key="k")


@pytest.mark.parametrize("span", [(1.0, 1.0), (2.0, 1.0), (-0.5, 1.0), (float("nan"), None)])
def test_bad_spans(span: Span) -> None:
    with pytest.raises(ValueError, match="0 <= start < end"):
        sample_frames(VIDEO, 2, span=span)
    with pytest.raises(ValueError, match="0 <= start < end"):
        reencode_video(VIDEO, short_side=None, keyframe_interval=8, span=span)


def test_frames_within_a_span() -> None:
    times_s = [0.0, 0.033333, 0.5, 0.7]
    assert frames_within(times_s, None) == range(4)
    assert frames_within(times_s, (1 / 30, 0.7)) == range(1, 3)
    assert frames_within(np.array(times_s).tolist(), (0.6, 0.65)) == range(2, 3)
    assert frames_within(times_s, (0.71, 0.8)) == range(4, 4)
    assert frames_within(times_s, (0.71, 0.8), last_shown_s=0.1) == range(3, 4)
    assert frames_within(times_s, (0.8, 0.9), last_shown_s=0.1) == range(4, 4)
    assert frames_within([], (0.8, 0.9)) == range(0)


def test_times_count_from_the_first_frame_of_a_late_start() -> None:
    video = numbered_video(30, container="mpegts")
    with av.open(io.BytesIO(video)) as container:
        assert next(container.decode(video=0)).time > 0.1
    frames, times_s = sample_frames(video, 2, span=(1.0, 2.0))
    assert [read_number(frame) for frame in frames] == [12, 17]
    assert times_s == pytest.approx((0.2, 0.7))
    cut = reencode_video(video, short_side=None, keyframe_interval=8, span=(1.0, 2.0))
    frames, times_s = sample_frames(cut, 10)
    assert [read_number(frame) for frame in frames] == list(range(10, 20))
    assert times_s == pytest.approx([i / 10 for i in range(10)])
