"""Pictures are those that a player shows; sampled frames stay exact, for both decoders."""

from __future__ import annotations

import functools
import io
import itertools
import logging
from pathlib import Path

import av
import numpy as np
import pytest
from builders.counter_files import Encoding, make_video
from builders.decoder_cases import decoders, no_torchcodec
from builders.shown_videos import (
    MESSAGES,
    MUXERS,
    ORIENTATIONS,
    X265_PARAMS,
    Turn,
    join,
    make_coloured,
    make_hdr,
    make_interlaced,
    matrix_of,
    read_number,
    remux,
    two_streams,
    undo,
    with_container_shape,
    with_message,
    with_picture,
    with_pixel_shape,
)

from tvr.data_prep.check.stats import dataset_statistics, read_facts
from tvr.data_prep.dataset.sample_codec import decode_members, parse_meta, parse_range
from tvr.data_prep.packing.pack import PackProgress, pack_shards
from tvr.data_prep.records import BadSample, Clip
from tvr.data_prep.video import frame_index, picture
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.reencode import reencode_video
from tvr.data_prep.video.tone_map import HLG, PQ, light_to_pq, pq_to_light

GOP_8 = {"preset": "veryfast", "g": "8", "bf": "2"}
RATES = {
    "constant": (),
    "variable": tuple(np.cumsum([0, *np.random.default_rng(1).integers(5, 400, 39)]).tolist()),
}


@functools.cache
def counter(rate: str = "constant", **settings: object) -> bytes:
    return make_video(Encoding(ticks=RATES[rate], options=GOP_8, **settings))  # type: ignore[arg-type]


def read_all(
    content: bytes, decoder: Decoder, turn: Turn, size: tuple[int, int], num_frames: int = 12
) -> list[int]:
    """Reads the numbers of sampled frames that must be shown at `size`, turned by `turn`."""
    frames, times_s = frame_sampler(decoder)(content, num_frames)
    assert len(times_s) == len(frames) == num_frames
    assert frames.shape[1:3] == size[::-1]
    return [read_number(undo(turn, frame)) for frame in frames]


MIDDLES = [1, 5, 8, 11, 15, 18, 21, 25, 28, 31, 35, 38]  # of 12 segments of 40 frames


@pytest.mark.parametrize("rate", list(RATES))
@pytest.mark.parametrize("container", ["mp4", "matroska"])
@decoders
def test_orientation_and_pixel_shape(decoder: Decoder, container: str, rate: str) -> None:
    """Each of the eight matrices with and without pixels of 16:9; the picture is 64 x 48."""
    for (name, (values, turn)), shape in itertools.product(ORIENTATIONS.items(), ("", "16/9")):
        stored = counter(rate)
        if shape:
            stored = with_pixel_shape(stored, shape)
        content = remux(stored, container, matrix=matrix_of(*values, x=64, y=7))
        width = 114 if shape else 64
        size = (width, 48) if turn(np.zeros((2, 3))).shape == (2, 3) else (48, width)
        assert read_all(content, decoder, turn, size) == MIDDLES, (name, shape)
        if rate == "constant":
            again, _ = sample_frames(
                reencode_video(content, short_side=None, keyframe_interval=8), 40
            )
            numbers = [read_number(undo(turn, frame)) for frame in again]
            assert numbers == list(range(40)), (name, shape)
            assert again.shape[1:3] == size[::-1]


@decoders
def test_orientation_in_the_video_stream(decoder: Decoder) -> None:
    """An H.264 message holds from its keyframe to the next; the container's matrix is hidden."""
    half_turn = matrix_of(-1, 0, 0, -1)
    for (name, (text, turn)), container in itertools.product(MESSAGES.items(), ("mp4", "matroska")):
        for matrix in (None, half_turn):
            content = remux(with_message(counter(), text), container, matrix=matrix)
            size = (64, 48) if turn(np.zeros((2, 3))).shape == (2, 3) else (48, 64)
            assert read_all(content, decoder, turn, size) == MIDDLES, (name, container, matrix)
    again, _ = sample_frames(reencode_video(content, short_side=None, keyframe_interval=8), 40)
    assert [read_number(undo(turn, frame)) for frame in again] == list(range(40))
    stream = with_message(counter(), "flip=horizontal", "mpegts")
    frames, _ = sample_frames(stream, 12)
    assert [read_number(frame[:, ::-1]) for frame in frames] == MIDDLES


@pytest.mark.parametrize(
    ("values", "size"),
    [((2, 0, 0, 2), (64, 48)), ((2, 0, 0, 1), (128, 48)), ((0, 2, 1, 0), (48, 128))],
)
@decoders
def test_scale_of_the_matrix(
    decoder: Decoder, values: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    turn = ORIENTATIONS["transposed" if values[0] == 0 else "upright"][1]
    content = remux(counter(), matrix=matrix_of(*values))
    assert read_all(content, decoder, turn, size) == MIDDLES


@decoders
def test_a_matrix_of_zeros_changes_nothing(decoder: Decoder) -> None:
    content = remux(counter(), matrix=matrix_of(0, 0, 0, 0))
    assert read_all(content, decoder, lambda p: p, (64, 48)) == MIDDLES


@pytest.mark.parametrize(
    ("shape", "width"), [("16/9", 114), ("1/2", 32), ("12/11", 70), ("40/1", 64), ("1/40", 64)]
)
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi", "flv", "h264"])
@decoders
def test_pixel_shape(decoder: Decoder, container: str, shape: str, width: int) -> None:
    """The width is scaled; a shape beyond 8 : 1 is taken for damaged."""
    if decoder == "torchcodec" and container not in ("mp4", "matroska"):
        pytest.skip("torchcodec is not used for containers without an exact index")
    content = with_pixel_shape(counter(container=container), shape, container)
    assert read_all(content, decoder, lambda p: p, (width, 48)) == MIDDLES


@decoders
def test_the_container_decides_the_pixel_shape(decoder: Decoder) -> None:
    content = with_container_shape(with_pixel_shape(counter(), "16/9"), 3, 2)
    assert read_all(content, decoder, lambda p: p, (96, 48)) == MIDDLES


def without_shape(content: bytes) -> bytes:
    """Turns an MP4's box with the shape of pixels into padding; the stream keeps its own."""
    return content.replace(b"pasp", b"free")


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@decoders
def test_the_shape_of_the_stream_counts_in_an_mp4_without_one(decoder: Decoder, codec: str) -> None:
    options = {"x265-params": X265_PARAMS} if codec == "libx265" else GOP_8
    content = make_video(Encoding(codec=codec, options=options))
    kind = "hevc" if codec == "libx265" else "h264"
    stored = remux(content, packet_filter=f"{kind}_metadata=sample_aspect_ratio=16/9")
    for shaped in (stored, remux(stored)):  # the second has the box, and a track of 114 x 48
        assert read_all(without_shape(shaped), decoder, lambda p: p, (114, 48)) == MIDDLES


@decoders
def test_the_shape_of_the_stream_changes_in_an_mp4_without_one(decoder: Decoder) -> None:
    first, second = segments()
    parts = [
        with_pixel_shape(part, shape, "mpegts") for part, shape in ((first, "1/1"), (second, "3/2"))
    ]
    joined = join(*parts, container="mp4")
    assert read_all(joined, decoder, lambda p: p, (64, 48), 32) == BOTH
    frames, _ = frame_sampler(decoder)(without_shape(joined), 32)
    assert [read_number(frame) for frame in frames[:16]] == BOTH[:16]
    assert [read_number(frame[8:40]) for frame in frames[16:]] == BOTH[16:]
    assert frames[16:, :8].max() == frames[16:, 40:].max() == 0


@decoders
def test_a_reencoded_cut_has_square_pixels(decoder: Decoder) -> None:
    content = remux(
        with_pixel_shape(counter(), "16/9"), matrix=matrix_of(*ORIENTATIONS["mirrored"][0])
    )
    cut = reencode_video(content, short_side=32, keyframe_interval=8, span=(0.4, 0.8))
    frames, _ = frame_sampler(decoder)(cut, 40)
    assert [read_number(frame[:, ::-1]) for frame in frames] == list(range(10, 20))
    assert frames.shape[1:3] == (32, 76)
    with av.open(io.BytesIO(cut), "r") as opened:
        stream = opened.streams.video[0]
        assert stream.sample_aspect_ratio in (None, 1)
        assert not any(frame.rotation for frame in opened.decode(stream))


def segments(**second: object) -> tuple[bytes, bytes]:
    """Returns two transport streams of 16 frames; the second starts when the first ends."""
    first = Encoding(frames=16, options=GOP_8, container="mpegts")
    later = Encoding(
        **{"frames": 16, "options": GOP_8, "container": "mpegts"} | second,  # type: ignore[arg-type]
        shift=16 * 40 + 400,
        muxer=MUXERS["mpegts"],
    )
    return make_video(first), make_video(later)


BOTH = [*range(16), *range(16)]


@pytest.mark.parametrize("container", ["mpegts", "mp4", "matroska"])
@decoders
def test_the_size_changes_midway(decoder: Decoder, container: str) -> None:
    if decoder == "torchcodec" and container == "mpegts":
        pytest.skip("torchcodec is not used for containers without an exact index")
    same_aspect = join(*segments(width=128, height=96), container=container)
    assert read_all(same_aspect, decoder, lambda p: p, (64, 48), 32) == BOTH
    upright = join(*segments(width=48, height=64), container=container)
    frames, _ = frame_sampler(decoder)(upright, 32)
    assert [read_number(frame) for frame in frames[:16]] == BOTH[:16]
    # The later pictures, 36 x 48, lie between black bars.
    assert frames[16:, :, :14].max() == 0
    assert frames[16:, :, 50:].max() == 0
    assert [read_number(frame[:, 14:50]) for frame in frames[16:]] == BOTH[16:]
    for content in (same_aspect, upright):
        cut = reencode_video(content, short_side=None, keyframe_interval=8)
        again, _ = sample_frames(cut, 32)
        expected, _ = sample_frames(content, 32)
        assert again.shape == expected.shape
        assert np.abs(again.astype(int) - expected).mean() < 4


@decoders
def test_a_later_size_is_limited_as_the_first(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = join(*segments(width=128, height=96), container="mp4")
    monkeypatch.setattr(frame_index, "MAX_PIXELS", 100 * 80)
    with pytest.raises(BadSample, match="k: unreadable"):
        frame_sampler(decoder)(content, 32, key="k")
    monkeypatch.setattr(picture, "MAX_PIXELS", 64 * 48)
    with pytest.raises(BadSample, match="114 x 48 pixels, more than"):
        frame_sampler(decoder)(with_pixel_shape(counter(), "16/9"), 4, key="k")


def test_the_pixel_shape_changes_midway() -> None:
    first, second = segments()
    first = with_pixel_shape(first, "1/1", "mpegts")
    joined = first + with_pixel_shape(second, "3/2", "mpegts")
    frames, _ = sample_frames(joined, 32)
    # The later ones are 96 x 48, shown within the size of the first.
    assert [read_number(frame) for frame in frames[:16]] == BOTH[:16]
    assert [read_number(frame[8:40]) for frame in frames[16:]] == BOTH[16:]
    assert frames[16:, :8].max() == frames[16:, 40:].max() == 0


@decoders
def test_orientation_and_pixel_format_change_midway(decoder: Decoder) -> None:
    first, second = segments(options={"preset": "veryfast"})
    turned = join(first, with_message(second, "rotate=180", "mpegts"), container="mp4")
    frames, _ = frame_sampler(decoder)(turned, 32)
    assert [read_number(frame) for frame in frames[:16]] == BOTH[:16]
    assert [read_number(frame[::-1, ::-1]) for frame in frames[16:]] == BOTH[16:]
    other = join(*segments(pixels="yuv444p10le"), container="mp4")
    assert read_all(other, decoder, lambda p: p, (64, 48), 32) == BOTH


@pytest.mark.parametrize("top_first", [True, False])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@decoders
def test_interlaced_frames_show_their_first_field(
    decoder: Decoder, codec: str, top_first: bool
) -> None:
    if decoder == "torchcodec" and codec != "libx264":
        pytest.skip("torchcodec is not used for containers without an exact index")
    content = make_interlaced([(n, 1000 + n) for n in range(12)], top_first=top_first, codec=codec)
    frames, _ = frame_sampler(decoder)(content, 6)
    first = 0 if top_first else 1000
    assert [read_number(frame) for frame in frames] == [first + n for n in (1, 3, 5, 7, 9, 11)]
    again, _ = sample_frames(reencode_video(content, short_side=None, keyframe_interval=4), 6)
    assert [read_number(frame) for frame in again] == [first + n for n in (1, 3, 5, 7, 9, 11)]


BLUE, ORANGE = (40, 60, 200), (220, 120, 30)
SD, HD = (64, 48), (1280, 64)


@pytest.mark.parametrize(
    ("size", "matrix", "full", "tags", "codec"),
    [
        (SD, 5, False, None, "libx264"),
        (HD, 1, False, None, "libx264"),
        ((96, 640), 1, False, None, "libx264"),
        (SD, 1, False, (1, 1, 1, 1), "libx264"),
        (HD, 5, False, (6, 1, 6, 6), "libx264"),
        (SD, 5, False, (5, 1, 6, 5), "libx264"),
        (SD, 1, True, (1, 2, 1, 1), "libx264"),
        (SD, 1, True, (1, 2, 1, 1), "libx265"),
        (HD, 5, True, (6, 2, 6, 6), "libx265"),
        (SD, 9, False, (9, 1, 14, 9), "libx265"),
        (SD, 5, False, (8, 1, 2, 2), "libx264"),  # YCgCo claimed: no picture of this is YCgCo
    ],
)
@decoders
def test_colours(
    decoder: Decoder,
    size: tuple[int, int],
    matrix: int,
    full: bool,
    tags: tuple[int, int, int, int] | None,
    codec: str,
) -> None:
    """Tagged: as the tag says. Untagged: BT.709 from 1280 x 577 pixels, else BT.601."""
    for colour in (BLUE, ORANGE):
        content = make_coloured(colour, size, matrix=matrix, full=full, tags=tags, codec=codec)
        frames, _ = frame_sampler(decoder)(content, 1)
        assert np.abs(frames[0, 10:-10, 10:-10].mean((0, 1)) - colour).max() < 4
        for short_side in (None, 32):
            again = reencode_video(content, short_side=short_side, keyframe_interval=4)
            copied, _ = frame_sampler(decoder)(again, 1)
            assert np.abs(copied[0, 8:-8, 8:-8].mean((0, 1)) - colour).max() < 6


@pytest.mark.skipif(bool(no_torchcodec), reason=no_torchcodec)
def test_torchcodec_warns_once_that_it_leaves_a_video(caplog: pytest.LogCaptureFixture) -> None:
    picture._warned.clear()
    content = make_coloured(BLUE, HD, matrix=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            frame_sampler("torchcodec")(content, 1, key="k")
    assert [record.message for record in caplog.records] == [
        "torchcodec leaves videos to PyAV, for example k: large pictures without a tag of their"
        " colours"
    ]


GREYS = np.array([64, 200, 400, 573, 723, 940])


def tone_mapped(light: np.ndarray) -> np.ndarray:
    """Computes 8-bit grey from cd/m2 by the formula of BT.2390, written out once more."""
    peak, white = light_to_pq(np.array([1000.0, 203.0]))
    e1 = np.minimum(light_to_pq(light) / peak, 1)
    ks = 1.5 * white / peak - 0.5
    t = (e1 - ks) / (1 - ks)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * ks
        + (t**3 - 2 * t**2 + t) * (1 - ks)
        + (-2 * t**3 + 3 * t**2) * white / peak
    )
    return 255 * (pq_to_light(np.where(e1 < ks, e1, spline) * peak) / 203) ** (1 / 2.4)


@pytest.mark.parametrize("transfer", [PQ, HLG])
@decoders
def test_high_dynamic_range_is_tone_mapped(decoder: Decoder, transfer: int) -> None:
    content = make_hdr(GREYS, transfer)
    code = (GREYS - 64) / 876
    if transfer == PQ:
        light = pq_to_light(code)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        light = 1000 * scene**1.2
    expected = tone_mapped(light)
    frames, _ = frame_sampler(decoder)(content, 2)
    again = sample_frames(reencode_video(content, short_side=None, keyframe_interval=4), 2)[0]
    for pictures, allowed in ((frames, 3), (again, 6)):
        greys = pictures[0, 8:-8, 16::32]
        assert np.ptp(greys.mean(0), axis=-1).max() < 4  # grey stays grey
        assert np.abs(greys.mean((0, 2)) - expected).max() < allowed
    assert expected[0] == 0
    assert round(expected[-1]) == 255
    with av.open(io.BytesIO(reencode_video(content, short_side=None, keyframe_interval=4))) as cut:
        frame = next(cut.decode(video=0))
    assert (frame.color_trc, frame.color_primaries) == (1, 1)


def test_pq_is_the_published_function() -> None:
    """Values of BT.2100 and BT.2408: 100, 203, 1000 and 10,000 cd/m2."""
    light = np.array([0.0, 100.0, 203.0, 1000.0, 10000.0])
    assert light_to_pq(light) == pytest.approx([0, 0.508, 0.581, 0.752, 1], abs=5e-4)
    assert pq_to_light(light_to_pq(light)) == pytest.approx(light, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("sizes", "default", "shown"),
    [
        ([(64, 48), (128, 96)], None, 1),  # the largest
        ([(64, 48), (64, 48)], None, 0),  # the first of equals
        ([(128, 96), (64, 48)], 1, 1),  # the default, though it is smaller
        ([(64, 48), (128, 96)], 0, 0),
    ],
)
@decoders
def test_the_stream_that_a_player_shows(
    decoder: Decoder, sizes: list[tuple[int, int]], default: int | None, shown: int
) -> None:
    content = two_streams(sizes, (100, 200), default)
    first = (100, 200)[shown]
    numbers = read_all(content, decoder, lambda p: p, sizes[shown], 8)
    assert numbers == list(range(first, first + 8))


@pytest.mark.parametrize("is_cover", [True, False])
@decoders
def test_a_single_picture_is_no_video(decoder: Decoder, is_cover: bool) -> None:
    content = with_picture(counter(), is_cover=is_cover)
    assert read_all(content, decoder, lambda p: p, (64, 48)) == MIDDLES


@pytest.mark.parametrize(
    "settings",
    [{"layout": "frames"}, {"layout": "video"}, {"layout": "video", "reencode": True}],
    ids=["frames", "copy", "reencode"],
)
def test_both_layouts_follow_and_are_counted(tmp_path: Path, settings: dict[str, object]) -> None:
    videos = {
        "plain": (counter(), lambda p: p, (64, 48)),
        "mirrored": (
            remux(with_pixel_shape(counter(), "16/9"), matrix=matrix_of(-1, 0, 0, 1)),
            ORIENTATIONS["mirrored"][1],
            (114, 48),
        ),
        "fields": (
            make_interlaced([(n, 1000 + n) for n in range(40)], top_first=True),
            lambda p: p,
            (64, 96),
        ),
        "hlg": (make_hdr(GREYS, HLG), None, (192, 64)),
    }
    clips = []
    for name, (content, _, _) in videos.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        clips.append(
            Clip(key=name, video=str(tmp_path / f"{name}.mp4"), captions=("a",), video_id=name)
        )
    seen: list[PackProgress] = []
    url = str(tmp_path / "data")
    manifest = pack_shards(clips, url, num_frames=12, on_progress=seen.append, **settings)  # type: ignore[arg-type]
    assert manifest is not None
    counts = {"turned": 1, "reshaped": 1, "deinterlaced": 1, "hlg": 1}
    assert seen[-1].adjusted == counts
    assert dataset_statistics(manifest, read_facts(url, manifest)).adjusted == counts
    shard = (tmp_path / "data" / manifest.shards[0].name).read_bytes()
    for row, (name, (_, turn, size)) in enumerate(videos.items()):
        start = int(manifest.samples.offset[row])
        members = parse_range(
            manifest, row, shard[start : start + int(manifest.samples.length[row])]
        )
        frames, _ = decode_members(name, members, parse_meta(name, members), 12)
        assert frames.shape[1:3] == size[::-1], name
        if turn is not None:
            assert [read_number(undo(turn, frame)) for frame in frames] == MIDDLES, name
    if settings == {"layout": "video"}:
        assert members["mp4"] == videos[name][0]  # a copy keeps its bytes
