"""The right frames, shown as a player shows them, whatever the container, the way the pictures are
turned, the shape of pixels, the pattern of times and the decoder.

All pairs of values of two of these occur together, where the container can carry them.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from builders.counter_files import Encoding, picture
from builders.decoder_cases import decoders
from builders.shown_videos import ORIENTATIONS, matrix_of, read_number, undo, with_message

from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.truncation import check_whole

FRAMES = 40
SIDE = 64
TICK = Fraction(1, 90_000)
# Width and height of a 64 x 64 picture whose pixels have a shape.
SHAPES = {"1:1": (64, 64), "16:9": (114, 64), "3:4": (48, 64)}
MESSAGES = {
    "mirrored": "flip=horizontal",
    "flipped": "flip=vertical",
    "half turn": "rotate=180",
    "clockwise": "rotate=270",
    "counter-clockwise": "rotate=90",
    "transposed": "flip=horizontal:rotate=90",
    "other diagonal": "flip=horizontal:rotate=270",
}
UNEVEN = np.cumsum([0, *np.random.default_rng(1).integers(1, 6, FRAMES - 1)]).tolist()
EVEN = list(range(FRAMES))
# Times in frames, and frames a second.
PATTERNS: dict[str, tuple[list[int], Fraction]] = {
    "25": (EVEN, Fraction(25)),
    "29.97": (EVEN, Fraction(30_000, 1001)),
    "variable": (UNEVEN, Fraction(25)),
    "repeated": (EVEN, Fraction(25)),
    "gap": ([*range(25), *range(100, 115)], Fraction(25)),
}
REPEATED = 18
"""The frame that has the time of the frame before, in one pattern."""
CONSTANT = ("25", "29.97", "repeated")


OPTIONS = {
    "libx264": {"preset": "veryfast", "g": "8", "bf": "2"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "g": "8", "crf": "10", "b": "1M"},
    "wmv2": {"g": "8", "b": "1M"},
}


@dataclass(frozen=True, kw_only=True)
class Container:
    """What a container can carry."""

    muxer: str
    codec: str = "libx264"
    turns: str = "message"
    """Where the orientation is stored: "matrix" of the container, "message" in the H.264 stream,
    or empty = nowhere."""
    shapes: Sequence[str] = tuple(SHAPES)
    patterns: Sequence[str] = tuple(PATTERNS)
    counts_frames: bool = False
    """Times are multiples of a frame."""


CONTAINERS = {
    "mp4": Container(muxer="mp4", turns="matrix"),
    "mov": Container(muxer="mov", turns="matrix"),
    "mkv": Container(muxer="matroska", turns="matrix"),
    "webm": Container(muxer="webm", codec="libvpx", turns="matrix"),
    "avi": Container(muxer="avi", patterns=("25", "29.97"), counts_frames=True),
    "ts": Container(muxer="mpegts"),
    "mpg": Container(muxer="vob", patterns=("25", "29.97")),
    "wmv": Container(
        muxer="asf", codec="wmv2", turns="", patterns=("25", "29.97", "variable", "gap")
    ),
    "flv": Container(muxer="flv"),
    "ogg": Container(
        muxer="ogg",
        codec="libvpx",
        turns="",
        patterns=("25", "29.97", "variable", "gap"),
        counts_frames=True,
    ),
}
Case = tuple[str, str, str, str]
"""Container, orientation, shape of pixels, pattern of times."""


def carried() -> Iterator[Case]:
    for name, container in CONTAINERS.items():
        turns = list(ORIENTATIONS) if container.turns else ["upright"]
        for rest in itertools.product(turns, container.shapes, container.patterns):
            yield (name, *rest)


def pairs(case: Case) -> set[tuple[int, str, int, str]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def covering() -> list[Case]:
    """Chooses cases in which every pair of values occurs that occurs in any."""
    cases = list(carried())
    missing = set[tuple[int, str, int, str]]().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))  # the first of equals
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def stamps(container: Container, pattern: str) -> tuple[list[int], Fraction]:
    """Returns the frames' times, and the seconds of their unit."""
    places, rate = PATTERNS[pattern]
    if container.counts_frames:
        return places, 1 / rate
    return [round(place / rate / TICK) for place in places], TICK


@functools.cache
def make_case(name: str, turn: str, shape: str, pattern: str) -> bytes:
    """Returns a video of 64 x 64 pixels whose frame i shows the number i."""
    container, encoding = CONTAINERS[name], Encoding(width=SIDE, height=SIDE)
    times, unit = stamps(container, pattern)
    packets: list[av.Packet] = []
    is_copied = container.turns == "message" and turn != "upright"
    # A program stream's packets have too few times to be copied.
    muxer = "mpegts" if is_copied and name == "mpg" else container.muxer
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=muxer) as output:
            options = OPTIONS[container.codec]
            stream = output.add_stream(container.codec, rate=PATTERNS[pattern][1], options=options)
            stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
            context = stream.codec_context
            context.thread_count, context.time_base = 1, unit
            context.sample_aspect_ratio = Fraction(*map(int, shape.split(":")))
            if container.turns == "matrix" and turn != "upright":
                stream.set_display_matrix(matrix_of(*ORIENTATIONS[turn][0]))
            for index, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(picture(index, encoding), format="rgb24")
                frame.pts, frame.time_base = time, unit
                packets += stream.encode(frame)
            packets += stream.encode(None)
            if pattern == "repeated":
                repeat(packets)
            for packet in packets:
                output.mux(packet)
        content = Path(file.name).read_bytes()
    if is_copied:
        return with_message(content, MESSAGES[turn], container.muxer)
    return with_shape_in_webm(content, shape) if name == "webm" else content


def with_shape_in_webm(content: bytes, shape: str) -> bytes:
    """Adds the size at which pictures are shown, which the muxer writes only when it is told apart
    from the stream; the padding before the tracks becomes as much shorter."""
    if shape == "1:1":
        return content
    width, height = SHAPES[shape]
    added = bytes([0x54, 0xB0, 0x81, width, 0x54, 0xBA, 0x81, height])
    size = len(added)
    video = bytearray(content)
    pixels = video.index(b"\xb0\x81\x40\xba\x81\x40")
    entry = video.rindex(b"\xae\x01", 0, pixels)
    tracks = video.rindex(b"\x16\x54\xae\x6b", 0, entry)
    padding = video.index(b"\xec\x01")
    for place in (video.rindex(b"\xe0", 0, pixels) + 1, entry + 8, tracks + 4):
        video[place] += size
    for name in (b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b"):  # in the list of places
        video[video.index(name) + 7] -= size
    video[pixels + 6 : pixels + 6] = added
    video[padding + 8] -= size
    del video[padding + 9 : padding + 9 + size]
    return bytes(video)


def repeat(packets: Sequence[av.Packet]) -> None:
    """Gives one frame the time of the frame before it."""
    times = sorted(packet.pts for packet in packets)
    for packet in packets:
        packet.dts -= times[1] - times[0]  # it must not exceed the repeated time
        if packet.pts == times[REPEATED]:
            packet.pts = times[REPEATED - 1]


def expected(pattern: str, count: int, within: range) -> list[int]:
    """Returns the frames at the middles of equal parts: of the frames, or of time if the rate
    changes."""
    if pattern in CONSTANT:
        return [within[int((2 * i + 1) * len(within) / (2 * count))] for i in range(count)]
    places = [PATTERNS[pattern][0][frame] for frame in within]
    whole = places[-1] - places[0] + min(places[-1] - places[-2], places[-2] - places[-3])
    chosen = []
    for part in range(count):
        moment = places[0] + Fraction(2 * part + 1, 2 * count) * whole
        assert all(abs(moment - place) > Fraction(1, 20) for place in places), "on the edge"
        chosen.append(within[sum(place <= moment for place in places) - 1])
    return chosen


@pytest.mark.parametrize("case", covering(), ids="-".join)
@decoders
def test_frames_are_right_and_shown_as_a_player_shows_them(decoder: Decoder, case: Case) -> None:
    _, turn, shape, pattern = case
    content, undone = make_case(*case), ORIENTATIONS[turn][1]
    check_whole(content, "k")
    width, height = SHAPES[shape]
    if undone(np.zeros((2, 3))).shape != (2, 3):
        width, height = height, width
    places, rate = PATTERNS[pattern]
    span_of = range(12, 36)
    span = tuple(round(float((places[i] - 0.3) / rate), 6) for i in (span_of[0], span_of[-1] + 1))
    for count, bounds, within in ((7, None, range(FRAMES)), (5, span, span_of)):
        frames, times_s = frame_sampler(decoder)(content, count, span=bounds)
        assert frames.shape[1:3] == (height, width)
        wanted = expected(pattern, count, within)
        assert [read_number(undo(undone, frame)) for frame in frames] == wanted
        seconds = [float((places[frame] - places[within[0]]) / rate) for frame in wanted]
        assert times_s == pytest.approx(seconds, abs=0.0015)


def test_all_pairs_occur() -> None:
    cases = list(carried())
    assert set().union(*map(pairs, covering())) == set().union(*map(pairs, cases))
    assert len(cases) > 500
