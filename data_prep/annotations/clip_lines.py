"""Clips with what is known of their rows, and clips as lines of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from tvr.data_prep.annotations.clip_keys import hashed_key
from tvr.data_prep.records import Clip

_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """The clip of one row, or of several rows that follow each other."""

    clip: Clip
    may_continue: bool = False
    """True if it may continue the clip of an earlier row with the same key."""
    key_hash: int = 0
    """See `Draft.key_hash`; 0 = the key stays as it is."""
    has_video_id: bool = True
    """False if the clip's video_id is its key."""
    by_name: bool = False
    """True if the video was looked up by its name."""

    def renamed(self) -> SourceRow:
        """Returns the row with a key that no other video's row has."""
        key = hashed_key(self.clip.key, self.key_hash)
        video_id = self.clip.video_id if self.has_video_id else key
        clip = replace(self.clip, key=key, video_id=video_id)
        return replace(self, clip=clip, key_hash=0)


def encode_clip(clip: Clip) -> bytes:
    """Returns the line of a clip: the fields that determine a sample, or its line in bad.jsonl."""
    fields = (
        *(clip.key, clip.video, clip.captions, clip.video_id, clip.origin),
        *(clip.start_s, clip.end_s),
    )
    # A path may hold bytes that are no UTF-8, which Python keeps as surrogates.
    return _JSON.encode(fields).encode("utf-8", "surrogatepass") + b"\n"


def decode_captions(line: bytes) -> list[str]:
    """Returns the captions of a line from `encode_clip`."""
    return json.loads(line.decode("utf-8", "surrogatepass"))[2]


def decode_clip(line: bytes) -> Clip:
    """Returns the clip of a line from `encode_clip`."""
    fields = json.loads(line.decode("utf-8", "surrogatepass"))
    key, video, captions, video_id, origin, start_s, end_s = fields
    return Clip(
        key=key,
        video=video,
        captions=tuple(captions),
        video_id=video_id,
        origin=origin,
        start_s=start_s,
        end_s=end_s,
    )
