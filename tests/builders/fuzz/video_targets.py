"""Damaged containers: frames are those of a plain decode of the same file, or it is refused."""

from __future__ import annotations

import io
import zlib
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from builders.clip_files import pack_settings
from builders.counter_files import Encoding, make_video
from builders.fuzz.target import READ, SEEDS, Target, require

from tvr.data_prep.dataset.sample_codec import decode_members, parse_meta, split_tar
from tvr.data_prep.packing.pack_clip import RefusedClip, pack_clip
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.records import BadSample, Clip
from tvr.data_prep.video.decode import describe_video, sample_frames
from tvr.data_prep.video.frame_index import OPENING
from tvr.data_prep.video.picture import PicturePainter, fit_picture
from tvr.data_prep.video.streams import choose_video_stream

X264 = {"preset": "ultrafast", "g": "3", "bf": "1"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "3"}
UNEVEN = (0, 40, 200, 210, 600, 640)
ENCODINGS = {
    "mp4": Encoding(frames=6, options=X264),
    "mp4-turned": Encoding(frames=4, options=X264, rotation=90),
    "mp4-fragments": Encoding(
        frames=6, options=X264, muxer={"movflags": "frag_keyframe+empty_moov"}
    ),
    "mp4-edit-list": Encoding(
        frames=8, options=X264, shift=-80, muxer={"avoid_negative_ts": "disabled"}
    ),
    "mp4-uneven": Encoding(frames=6, options=X264, ticks=UNEVEN),
    "mkv": Encoding(frames=6, options=X264, container="matroska"),
    "webm": Encoding(frames=5, codec="libvpx-vp9", options=VP9, container="webm"),
    "ts": Encoding(frames=5, options=X264, container="mpegts"),
    "avi": Encoding(frames=6, codec="mpeg4", options={"g": "3", "bf": "1"}, container="avi"),
    "flv": Encoding(frames=5, options=X264, container="flv"),
}
MANY = 500
LONGEST_STEP_S = 3600.0
VIDEO = pack_settings(layout="video", num_frames=4, keyframe_interval=4)
REENCODED = pack_settings(layout="video", num_frames=4, keyframe_interval=4, reencode=True)


class Containers(Target):
    """Videos of several containers."""

    name = "containers"
    share = 0.24

    @classmethod
    def make(cls, folder: Path) -> None:
        for name, encoding in ENCODINGS.items():
            (folder / SEEDS / name).write_bytes(make_video(encoding))

    def check(self, seed: str, content: bytes) -> str:
        try:
            describe_video(content, key="k")
            frames, times_s = sample_frames(content, MANY, key="k")
        except BadSample as error:
            return error.reason
        _check_all(content, frames, times_s)
        try:
            _check_some(content, frames, times_s)
        except BadSample:
            return "read, but not by seeking"
        except MemoryError:
            return "out_of_memory"
        # Each input is packed one way, so that the time suffices for many of them.
        packs = (self._check_copy, self._check_reencoded)
        try:
            packs[zlib.crc32(content) % 2](content, frames)
        except MemoryError:  # which the packing's pool makes a bad clip
            return "out_of_memory"
        return READ

    def _check_copy(self, content: bytes, frames: np.ndarray) -> None:
        packed = self._pack(content, VIDEO)
        if packed is not None:
            again, _ = decode_members("k", packed, parse_meta("k", packed), MANY)
            require(np.array_equal(again, frames), "the packed copy gives other frames")

    def _check_reencoded(self, content: bytes, frames: np.ndarray) -> None:
        packed = self._pack(content, REENCODED)
        if packed is not None:
            again, _ = decode_members("k", packed, parse_meta("k", packed), MANY)
            require(len(again) == len(frames), f"re-encoded {len(again)} of {len(frames)} frames")

    def _pack(self, content: bytes, settings: PackSettings) -> dict[str, bytes] | None:
        path = self.scratch / "video"
        path.write_bytes(content)
        clip = Clip(key="k", video=str(path), captions=("x",), video_id="k")
        outcome = pack_clip(clip, settings)
        return None if isinstance(outcome, RefusedClip) else split_tar(outcome.stored, "k")


def _check_all(content: bytes, frames: np.ndarray, times_s: tuple[float, ...]) -> None:
    """Compares all frames of a video with a plain decode."""
    plain, stamps = plain_frames(content)
    require(len(times_s) == len(frames), f"{len(times_s)} times of {len(frames)} frames")
    require(len(plain) == len(frames), f"{len(frames)} frames, a plain decode has {len(plain)}")
    for number, (ours, theirs) in enumerate(zip(frames, plain, strict=True)):
        require(np.array_equal(ours, theirs), f"frame {number} differs from a plain decode's")
    require(list(times_s) == sorted(times_s), f"times {times_s} do not ascend")
    # AVI stores no time stamps, and libav's differ between packets and frames.
    if stamps is not None and not content.startswith(b"RIFF"):
        expected = [stamp - stamps[0] for stamp in stamps]
        near = np.allclose(times_s, expected, rtol=1e-9, atol=2e-6)
        require(near, f"times {times_s}, by a plain decode {expected}")


def _check_some(content: bytes, frames: np.ndarray, times_s: tuple[float, ...]) -> None:
    """Compares a few frames, to which the decoder may seek, with those of the whole decode."""
    if len(set(times_s)) < len(times_s):
        return  # the time does not tell the frame
    few, few_s = sample_frames(content, 3, key="k")
    for picture, time_s in zip(few, few_s, strict=True):
        require(time_s in times_s, f"a sampled frame at {time_s}, not one of {times_s}")
        same = np.array_equal(picture, frames[times_s.index(time_s)])
        require(same, f"the frame sampled at {time_s} s is another one")


def plain_frames(content: bytes) -> tuple[list[np.ndarray], list[float] | None]:
    """Decodes a file from its start to its end, or to the first error.

    Returns:
        The pictures, all of the first one's size; and the seconds of each frame, None if some are
        missing, do not ascend or jump ahead, so that sampling mends them.
    """
    pictures: list[np.ndarray] = []
    stamps: list[int | None] = []
    unit = None
    try:
        with av.open(
            io.BytesIO(content), "r", metadata_errors="replace", container_options=OPENING
        ) as container:
            stream = choose_video_stream(container)
            assert stream is not None
            assert stream.codec_context is not None
            stream.codec_context.thread_count = 1
            unit = stream.time_base
            painter = PicturePainter("plain")
            painter.open(container, stream)
            for frame in container.decode(stream):
                painter.see(frame)
                picture = painter.picture(frame)
                if pictures and picture.shape != pictures[0].shape:
                    height, width = pictures[0].shape[:2]
                    picture = fit_picture(picture, width, height)
                pictures.append(picture.copy())
                stamps.append(frame.pts)
    except av.error.FFmpegError:
        pass
    known = [stamp for stamp in stamps if stamp is not None]
    ascends = len(known) == len(stamps) and all(a < b for a, b in pairwise(known))
    if unit is None or not ascends:
        return pictures, None
    times_s = [float(stamp * unit) for stamp in known]
    has_jump = any(second - first > LONGEST_STEP_S for first, second in pairwise(times_s))
    return pictures, None if has_jump else times_s
