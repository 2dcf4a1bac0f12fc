"""Decides what rows of one key are: parts of one clip, clips of several videos, or mistakes.

The first row of a key keeps it, but a row that gives the key itself comes before rows whose key was
made from a file name. Of the others,

- a row of the same video and cut continues the clip, if both rows may be parts of one;
- a row of another video whose key was made from the file name gets a key of its own;
- any other row is refused, and also one whose video_id is not the clip's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from tvr.data_prep.annotations.clip_lines import SourceRow
from tvr.data_prep.records import Clip, RefusedRow


class Decision(NamedTuple):
    """What a row is that has the key of another row."""

    row: int
    kind: Literal["continues", "renamed", "refused"]
    first: int = -1
    """The row that it continues."""
    refusal: RefusedRow | None = None


def decide_rows(
    rows: Iterable[int], owner: SourceRow, read: Callable[[int], SourceRow]
) -> Iterator[Decision]:
    """Yields a decision for each row but for the one that is the start of the key's clip.

    Args:
        rows: Numbers of the rows of one key, in file order.
        owner: The first of them that gives the key itself, or else the first one.
        read: Returns a row.
    """
    first, number_of_first = owner, -1
    for number in rows:
        row = read(number)
        is_same = _source(row.clip) == _source(owner.clip)
        if is_same and number_of_first < 0:
            first, number_of_first = row, number
        elif row.key_hash and not is_same:
            yield Decision(number, "renamed")
        else:
            try:
                merge_clips(
                    first.clip, row.clip, may_continue=first.may_continue and row.may_continue
                )
                yield Decision(number, "continues", number_of_first)
            except ValueError as error:
                origin = row.clip.origin or row.clip.video
                refusal = RefusedRow(origin=origin, detail=str(error))
                yield Decision(number, "refused", refusal=refusal)


def merge_clips(first: Clip, clip: Clip, *, may_continue: bool) -> Clip:
    """Returns the clip of two rows with the same key.

    Args:
        may_continue: Both rows may be one of several of a clip.

    Raises:
        ValueError: the rows are two clips, or disagree.
    """
    where, first_at = clip.origin or clip.video, first.origin or first.video
    if not may_continue or _source(first) != _source(clip):
        raise ValueError(
            f"{where}: duplicate key {clip.key!r}, first at {first_at}; give each clip"
            ' its own "key" (the default is the video\'s file name)'
        )
    if first.video_id != clip.video_id:
        raise ValueError(
            f"{where}: video_id={clip.video_id!r:.200} differs from {first.video_id!r:.200} of the"
            f" same video at {first_at}"
        )
    return replace(first, captions=(*first.captions, *clip.captions))


def _source(clip: Clip) -> tuple[object, ...]:
    return clip.video, clip.span
