"""Chooses the video stream of a container that has several."""

from __future__ import annotations

from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

# Pictures about the video, and streams that show nothing without another one.
NO_VIDEO = (
    Disposition.attached_pic
    | Disposition.still_image
    | Disposition.timed_thumbnails
    | Disposition.dependent
)


def choose_video_stream(container: InputContainer) -> VideoStream | None:
    """Returns the stream that a player shows; None if there is no video stream.

    Covers and thumbnails are no video. A stream with a decoder precedes one without, a stream of
    several pictures one of a single picture, then the stream that the container marks as its
    default, then the one with the largest pictures, then the first.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & NO_VIDEO]
    return max(streams, key=_rank, default=None)  # the first of equals


def _rank(stream: VideoStream) -> tuple[bool, bool, bool, int]:
    context = stream.codec_context
    if context is None:
        return (False, False, False, 0)
    is_default = bool(stream.disposition & Disposition.default)
    is_moving = stream.frames != 1  # 0: the container does not tell
    return (True, is_moving, is_default, context.width * context.height)
