"""The list of files as people have them, and what packing must make of each."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from builders import odd_videos as odd
from builders.clip_files import sound_only
from builders.counter_files import Encoding, make_video
from builders.odd_videos import X264, encode, half, restamped, timed
from builders.shown_videos import (
    ORIENTATIONS,
    Turn,
    join,
    make_coloured,
    make_hdr,
    make_interlaced,
    matrix_of,
    remux,
    two_streams,
    with_message,
    with_picture,
    with_pixel_shape,
)

SIX = tuple(range(6))
UNEVEN = (0, 40, 300, 310, 900, 1200)
Make = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class OddFile:
    """A file, and what packing must make of it."""

    name: str
    """Path below the folder."""
    make: Make
    """Writes the file at its path."""
    numbers: tuple[int, ...] | None = SIX
    """Numbers that the packed frames show; None = refused, or the pictures show none."""
    count: int | None = None
    """Number of frames of pictures that show no number."""
    reason: str = ""
    """Reason for which it is refused."""
    detail: str = ""
    """Part of the refusal's detail."""
    turn: Turn = ORIENTATIONS["upright"][1]
    """How the shown pictures are turned from the ones that `read_number` reads."""

    @property
    def expected(self) -> str:
        """The expectation in a few words."""
        if self.reason:
            return f"refused: {self.reason}"
        return f"{len(self.numbers) if self.numbers is not None else self.count} frames"


def file(content: bytes | Callable[[], bytes]) -> Make:
    """Writes a content that is made when it is needed."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content())


def packed(name: str, content: Callable[[], bytes], numbers: Sequence[int] = SIX) -> OddFile:
    return OddFile(name=name, make=file(content), numbers=tuple(numbers))


def counted(name: str, content: Callable[[], bytes], count: int) -> OddFile:
    return OddFile(name=name, make=file(content), numbers=None, count=count)


def refused(name: str, make: Make, reason: str, detail: str = "") -> OddFile:
    return OddFile(name=name, make=make, numbers=None, reason=reason, detail=detail)


def turned(name: str, how: str, content: Callable[[], bytes]) -> OddFile:
    return OddFile(name=name, make=file(content), turn=ORIENTATIONS[how][1])


def _mp4() -> bytes:
    return encode("mp4")


def _in_order(how: str) -> bytes:
    return remux(_mp4(), matrix=matrix_of(*ORIENTATIONS[how][0]))


def _joined(muxer: dict[str, str]) -> bytes:
    first = Encoding(frames=4, options=X264, container="mpegts")
    second = Encoding(frames=4, options=X264, container="mpegts", shift=160, muxer=muxer)
    return join(make_video(first), make_video(second), container="mpegts")


def _no_permission(path: Path) -> None:
    path.write_bytes(_mp4())
    path.chmod(0)


def _zip() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("clip.mp4", _mp4())
    return buffer.getvalue()


def _link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def _noise(size: int) -> bytes:
    return np.random.default_rng(1).bytes(size)


NAMES = (
    *("\u732b\u304c\u8d70\u308b.mp4", "\u043a\u043e\u0442.mp4", "\u0642\u0637\u0629.mp4"),
    *(
        "cafe\u0301 nai\u0308ve.mp4",
        "caf\u00e9 na\u00efve.mp4",
        "\U0001f600\U0001f468\u200d\U0001f469.mp4",
    ),
    *("two  spaces and more.mp4", " leading.mp4", "trailing .mp4", "a b.mp4", "a_b.mp4"),
    *("semi;colon,comma.mp4", "quote'\"`back.mp4", "percent%20%zz.mp4", "hash#query?x=1.mp4"),
    *("star*[0-9]{a,b}.mp4", "-dash.mp4", "--out.mp4", ".hidden.mp4", "dots..in...it.mp4"),
    *("no extension", "UPPER.MP4", "x" * 200 + ".mp4", "$HOME & (id) |.mp4", "~tilde.mp4"),
    *("back\\slash.mp4", "sub folder/deep/clip.mp4", "chain::x.mp4", "at@colon:x.mp4", "<b>.mp4"),
)
HALVES = {
    "mkv": lambda: encode("matroska", frames=40),
    "webm": lambda: encode("webm", "libvpx-vp9", frames=40),
    "ts": lambda: encode("mpegts", frames=40, with_sound=False),
    "avi": lambda: encode("avi", "mpeg4", frames=40),
    "flv": lambda: encode("flv", frames=40),
    "mpg": lambda: encode("mpeg", "mpeg2video", frames=40, options={"g": "4"}),
    "wmv": lambda: encode("asf", "wmv2", frames=40),
    "mp4": lambda: encode("mp4", frames=40),
    "fast start.mp4": lambda: encode("mp4", frames=40, muxer={"movflags": "faststart"}),
}

FILES: tuple[OddFile, ...] = (
    # Containers and codecs.
    packed("plain.mp4", _mp4),
    packed("plain.mkv", lambda: encode("matroska")),
    packed("plain.mov", lambda: encode("mov")),
    packed("vp9.webm", lambda: encode("webm", "libvpx-vp9")),
    packed("vp8.webm", lambda: encode("webm", "libvpx")),
    packed("stream.ts", lambda: encode("mpegts")),
    packed("old.avi", lambda: encode("avi", "mpeg4", options={"bf": "1", "g": "4"})),
    packed("flash.flv", lambda: encode("flv")),
    packed("sorenson.flv", lambda: encode("flv", "flv")),
    packed("disc.mpg", lambda: encode("mpeg", "mpeg2video", options={"g": "4"})),
    packed("windows.wmv", lambda: encode("asf", "wmv2")),
    packed("phone.3gp", lambda: encode("3gp", "h263", size=(128, 96))),
    packed("hevc.mp4", lambda: encode("mp4", "libx265")),
    packed("av1.mp4", lambda: encode("mp4", "libsvtav1", options={"preset": "12"}, size=(64, 64))),
    packed("camera mjpeg.avi", lambda: encode("avi", "mjpeg", "yuvj420p")),
    packed("prores.mov", lambda: encode("mov", "prores_ks", "yuv422p10le")),
    packed("prores alpha.mov", lambda: encode("mov", "prores_ks", "yuva444p10le")),
    packed("vp9 alpha.webm", lambda: encode("webm", "libvpx-vp9", "yuva420p")),
    packed("archive.mkv", lambda: encode("matroska", "ffv1")),
    packed("bare.h264", lambda: encode("h264", options={"preset": "ultrafast", "bf": "0"})),
    packed("bare.hevc", lambda: encode("hevc", "libx265")),
    packed("raw with header.y4m", lambda: encode("yuv4mpegpipe", "wrapped_avframe")),
    packed("animation.gif", lambda: encode("gif", "gif", "rgb8", rate=10)),
    packed("10 bit.mp4", lambda: encode("mp4", pixels="yuv420p10le")),
    packed("444.mp4", lambda: encode("mp4", pixels="yuv444p")),
    packed("grey.mp4", lambda: encode("mp4", pixels="gray")),
    packed("rgb.mkv", lambda: encode("matroska", "libx264rgb", "rgb24", options=X264)),
    packed("fragments.mp4", lambda: encode("mp4", muxer={"movflags": "frag_keyframe+empty_moov"})),
    packed("with sound.mp4", lambda: encode("mp4", with_sound=True)),
    packed("odd size.mp4", lambda: encode("mp4", pixels="yuv444p", size=(77, 51))),
    packed("tiny.mp4", lambda: encode("mp4", size=(16, 16))),
    packed("wide.mp4", lambda: encode("mp4", size=(512, 16))),
    packed("one frame.mp4", lambda: encode("mp4", frames=1), [0]),
    packed("large.mp4", lambda: encode("mp4", frames=2, size=(3840, 2160)), [0, 1]),
    packed("120 a second.mp4", lambda: encode("mp4", rate=120)),
    packed("one a second.mp4", lambda: encode("mp4", rate=1)),
    # Pictures that a player shows otherwise than they are stored.
    *(
        turned(f"{how}.mp4", how, lambda how=how: _in_order(how))
        for how in ORIENTATIONS
        if how != "upright"
    ),
    turned(
        "turned by message.mp4",
        "counter-clockwise",
        lambda: with_message(_mp4(), "rotate=90"),
    ),
    packed("wide pixels.mp4", lambda: with_pixel_shape(_mp4(), "16/9")),
    packed("wide pixels.mkv", lambda: with_pixel_shape(_mp4(), "16/9", "matroska")),
    counted("pq.mp4", lambda: make_hdr(np.array([64, 400, 700]), 16), 3),
    counted("hlg.mp4", lambda: make_hdr(np.array([64, 400, 700]), 18), 3),
    counted(
        "full range.mp4", lambda: make_coloured((200, 30, 60), (64, 48), matrix=1, full=True), 2
    ),
    packed("interlaced.mp4", lambda: make_interlaced([(n, n) for n in SIX], top_first=True)),
    packed(
        "bottom first.ts",
        lambda: make_interlaced([(n, n) for n in SIX], top_first=False, codec="mpeg2video"),
    ),
    # Streams.
    packed(
        "two streams.mkv", lambda: two_streams([(64, 48), (32, 24)], [20, 40], 0), range(20, 28)
    ),
    packed(
        "second is default.mkv",
        lambda: two_streams([(64, 48), (32, 24)], [20, 40], 1),
        range(40, 48),
    ),
    packed("cover first.mp4", lambda: with_picture(_mp4(), is_cover=True)),
    packed("still track first.mp4", lambda: with_picture(_mp4(), is_cover=False)),
    refused("cover and sound.m4a", file(odd.sound_and_cover), "no_frames", "no video stream"),
    refused("sound.m4a", file(sound_only), "no_frames", "no video stream"),
    refused("no packets.mp4", file(odd.without_packets), "no_frames"),
    packed("joined.ts", lambda: _joined({}), [0, 1, 2, 3, 0, 1, 2, 3]),
    packed(
        "joined with a mark.ts",
        lambda: _joined({"mpegts_flags": "initial_discontinuity"}),
        [0, 1, 2, 3, 0, 1, 2, 3],
    ),
    packed(
        "joined sizes.ts",
        lambda: join(
            encode("mpegts", frames=3, options=odd.PLAIN),
            make_video(
                Encoding(
                    frames=3,
                    width=128,
                    height=96,
                    options=odd.PLAIN,
                    container="mpegts",
                    shift=120,
                    muxer={"mpegts_flags": "initial_discontinuity"},
                )
            ),
            container="mpegts",
        ),
        [0, 1, 2, 0, 1, 2],
    ),
    # Time.
    packed("uneven.mp4", lambda: timed("mp4", UNEVEN)),
    packed("uneven.mkv", lambda: timed("matroska", UNEVEN)),
    packed(
        "a gap of a day.mp4", lambda: timed("mp4", (0, 40, 80, 86_400_000, 86_400_040)), range(5)
    ),
    packed(
        "edit list.mp4",
        lambda: make_video(
            Encoding(frames=8, options=X264, shift=-80, muxer={"avoid_negative_ts": "disabled"})
        ),
        range(2, 8),
    ),
    packed("late start.ts", lambda: timed("mpegts", range(0, 240, 40), shift=50_000)),
    packed("repeated stamp.mkv", lambda: restamped("matroska", [0, 1, 2, 2, 4, 5])),
    packed("repeated stamp.mp4", odd.repeated_stamp_in_mp4),
    packed("without stamps.avi", lambda: encode("avi", options={"preset": "ultrafast", "bf": "2"})),
    # Damage.
    *(
        refused(f"half.{kind}", file(lambda make=make: half(make())), "unreadable")
        for kind, make in HALVES.items()
    ),
    refused("damaged middle.mp4", file(lambda: odd.damaged_middle(_mp4())), "unreadable"),
    packed("trailing garbage.mp4", lambda: _mp4() + _noise(300)),
    packed("trailing zeros.mkv", lambda: encode("matroska") + bytes(300)),
    refused("encrypted.mp4", file(lambda: _noise(3000)), "unreadable"),
    refused("huge.gif", file(odd.claims_huge_pictures), "unreadable"),
    # No videos.
    packed("wrong extension.avi", _mp4),
    packed("no video by its name.txt", lambda: encode("matroska")),
    refused("text.mp4", file(b"This video is no longer available.\n"), "unreadable"),
    refused("empty.mp4", file(b""), "unreadable"),
    refused("page.mp4", file(b"<!DOCTYPE html><html><body>403</body></html>\n"), "unreadable"),
    refused(
        "playlist.mp4", file(b"#EXTM3U\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n"), "unreadable"
    ),
    refused("concat.mp4", file(b"ffconcat version 1.0\nfile plain.mp4\n"), "unreadable"),
    refused("zip.mp4", file(_zip), "unreadable"),
    refused("packed.mp4.gz", file(lambda: gzip.compress(_mp4(), mtime=0)), "unreadable"),
    refused("raw.yuv", file(odd.raw_frames), "unreadable"),
    *(
        refused(
            f"picture.{kind.lower()}", file(lambda kind=kind: odd.picture_file(kind)), "unreadable"
        )
        for kind in ("PNG", "JPEG", "WEBP", "TIFF")
    ),
    # What is no plain file.
    refused("folder.mp4", lambda path: path.mkdir(), "missing_file"),
    refused("pipe.mp4", os.mkfifo, "missing_file", "a FIFO"),
    refused("device.mp4", _link("/dev/zero"), "missing_file", "a device"),
    refused("dangling.mp4", _link("nowhere.mp4"), "missing_file"),
    refused("link to itself.mp4", _link("link to itself.mp4"), "read_error"),
    # Root may read everything.
    *([refused("no permission.mp4", _no_permission, "missing_file")] if os.geteuid() else []),
    refused("absent.mp4", lambda path: None, "missing_file"),
    OddFile(name="link.mp4", make=_link("plain.mp4")),
    # Names that no row can hold: with control characters, or bytes that are no text.
    *(
        OddFile(name=name, make=file(_mp4), numbers=None, reason="bad_row", detail="video=")
        for name in ("two\nlines.mp4", "a tab\t.mp4", "an escape\x1b[2J.mp4", "no text\udcff.mp4")
    ),
    # Names.
    *(packed(name, _mp4) for name in NAMES),
)
