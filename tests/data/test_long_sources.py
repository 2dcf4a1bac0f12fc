"""A source is read and listed once, however many clips are cut from it, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import file_contents, numbered_video, pack_settings
from builders.http_store import HttpStorage, serve_folder

from tvr.data_prep.dataset.shard_writer import TarSample, content_hash
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.pack_clip import LastSource, RefusedClip, pack_clip
from tvr.data_prep.records import BadSample, Clip
from tvr.data_prep.storage import source_file
from tvr.data_prep.storage.source_file import SourceFile, read_source
from tvr.data_prep.storage.storage import StorageUnavailable
from tvr.data_prep.video import frame_index, indexed_decode
from tvr.data_prep.video.frame_index import (
    FrameIndex,
    FrameIndexMismatch,
    SourceIndices,
)
from tvr.data_prep.video.frame_sampling import frames_within
from tvr.data_prep.video.indexed_decode import keyframe_before

PART = 1000
FILM = numbered_video(40, gop=10)


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A film in a folder of its own, and an empty folder for temporary files."""
    (tmp_path / "films").mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    path = tmp_path / "films" / "film.mp4"
    path.write_bytes(FILM)
    return path


def cuts(url: str, number: int = 12) -> list[Clip]:
    clip = Clip(key="f", video=url, captions=("x",), video_id="f")
    return [replace(clip, key=f"f{n:02d}", start_s=n / 4, end_s=n / 4 + 0.5) for n in range(number)]


COUNTED_PACKING = """
import os, sys
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import Clip

if __name__ == "__main__":
    url, folder = sys.argv[1:]
    for processes in (1, 3):
        os.environ["RUN"] = str(processes)
        clips = [
            Clip(key=f"f{n:02d}", video=f"{url}/film.mp4?{processes}", captions=("x",),
                 video_id="f", start_s=n / 4, end_s=n / 4 + 0.5)
            for n in range(12)
        ]
        pack_shards(clips, f"{folder}/{processes}", layout="frames", num_frames=2,
                    samples_per_shard=4, processes=processes)
"""
# Python imports this in every process, before anything else.
COUNTING = """
import os
from tvr.data_prep.video import frame_index

index_packets = frame_index.index_packets

def counted(source, key, *more):
    with open(os.environ["LISTINGS"], "a") as file:
        print(key, file=file)
    return index_packets(source, key, *more)

frame_index.index_packets = counted
"""


def test_cuts_make_one_read_and_one_listing_whatever_the_processes(
    film: Path, tmp_path: Path
) -> None:
    """The cuts lie in three shards of one task."""
    (tmp_path / "sitecustomize.py").write_text(COUNTING)
    (tmp_path / "pack.py").write_text(COUNTED_PACKING)
    listings = tmp_path / "listings"
    with serve_folder(film.parent) as storage:
        answer = storage.answer
        storage.answer = lambda name, byte_range: answer(  # type: ignore[method-assign]
            name.partition("?")[0], byte_range
        )
        subprocess.run(
            [sys.executable, str(tmp_path / "pack.py"), storage.url, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(tmp_path), "LISTINGS": str(listings)},
            check=True,
            timeout=120,
        )
    assert storage.requests == ["film.mp4", "film.mp4"]  # of 1 process, then of 3
    assert listings.read_text().split() == ["f00", "f00"]
    one, three = (
        {name: content for name, content in file_contents(tmp_path / run).items() if "tar" in name}
        for run in "13"
    )
    assert len(one) == 3
    assert one == three


def test_two_tasks_read_a_film_of_both_once_each(film: Path, tmp_path: Path) -> None:
    with serve_folder(film.parent) as storage:
        for task in (1, 0):
            pack_shards(
                cuts(f"{storage.url}/film.mp4"),
                str(tmp_path / "data"),
                layout="frames",
                num_frames=2,
                samples_per_shard=3,
                task=task,
                num_tasks=2,
                processes=0,
            )
    assert storage.requests == ["film.mp4"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": "video", "reencode": True},
        {"layout": "video"},
    ],
    ids=["frames", "reencode", "copy"],
)
@pytest.mark.parametrize("is_remote", [True, False])
def test_a_large_source_gives_the_same_bytes_without_being_held(
    film: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_remote: bool
) -> None:
    monkeypatch.setattr(source_file, "REQUEST_BYTES", PART)
    served: AbstractContextManager[Any] = serve_folder(film.parent) if is_remote else nullcontext()
    with served as storage:
        url = f"{storage.url}/film.mp4" if storage is not None else str(film)
        clips = cuts(url, 3)
        if changes == {"layout": "video"}:
            clips = [replace(clip, start_s=0.0, end_s=None) for clip in clips]
        packed = []
        for held_bytes in (1 << 20, PART):
            monkeypatch.setattr(source_file, "HELD_BYTES", held_bytes)
            with closing(LastSource()) as last:
                packed.append(
                    [pack_clip(clip, pack_settings(**changes), None, last) for clip in clips]
                )
                assert isinstance(last.read(clips[0]).source, bytes) == (held_bytes > PART)
                # The copy has no name.
                assert list((film.parent.parent / "scratch").iterdir()) == []
    assert packed[0] == packed[1]
    assert [each.content for each in packed[0]] == [  # type: ignore[union-attr]
        content_hash(FILM, clip.span) for clip in clips
    ]


def read_all(url: str, **more: Any) -> tuple[SourceFile, bytes]:
    parts: list[bytes] = []
    source = read_source(url, on_part=parts.append, **more)
    return source, b"".join(parts)


def without_ranges(storage: HttpStorage) -> None:
    """The server ignores byte ranges."""
    answer = storage.answer
    storage.answer = lambda name, byte_range: answer(name, None)  # type: ignore[method-assign]


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 7])
@pytest.mark.parametrize("held_bytes", [PART // 2, PART, 10 * PART])
@pytest.mark.parametrize("change", [None, without_ranges], ids=["ranges", "no_ranges"])
def test_a_source_of_any_size_is_read_whole(
    film: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    held_bytes: int,
    change: Callable[[HttpStorage], None] | None,
) -> None:
    monkeypatch.setattr(source_file, "REQUEST_BYTES", PART)
    content = bytes(n * 7 % 251 for n in range(size))
    film.write_bytes(content)
    with serve_folder(film.parent) as storage:
        if change is not None:
            change(storage)
        alive: list[int] = []
        for url in (f"{storage.url}/film.mp4", str(film)):
            source, parts = read_all(url, alive=lambda: alive.append(1), held_bytes=held_bytes)
            assert parts == content
            assert source.num_bytes == size
            assert (source.held is None) == (size > held_bytes)
            assert source.content() == content
            path = source.source
            if isinstance(path, str):
                assert Path(path).read_bytes() == content
            source.check_unchanged()
            source.close()
            assert not isinstance(path, str) or not os.path.exists(path)
    if change is None and size > held_bytes:
        assert len(alive) >= 2 * (size // PART)
    assert list((film.parent.parent / "scratch").iterdir()) == []


def test_each_retry_is_a_sign_of_progress(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails for the moment never exceeds the time limit of a clip."""
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    events: list[str] = []
    with serve_folder(film.parent) as storage:
        storage.fails = lambda number: events.append("failed") is None and number < 4
        read_all(f"{storage.url}/film.mp4", alive=lambda: events.append("alive"))
    assert events == ["failed", "alive", "failed", "alive", "failed", "alive", "failed", "alive"]


def test_a_full_disk_of_copies_ends_packing_and_refuses_no_clip(
    film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_file, "HELD_BYTES", 10)
    monkeypatch.setattr(source_file, "SPARE_BYTES", 1 << 62)
    with serve_folder(film.parent) as storage:
        clip = cuts(f"{storage.url}/film.mp4")[0]
        with pytest.raises(StorageUnavailable, match=r"no room for a copy .* TMPDIR=.*scratch"):
            pack_clip(clip, pack_settings())
    assert list((film.parent.parent / "scratch").iterdir()) == []


def test_a_file_that_changes_while_it_is_used_is_refused(
    film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_file, "HELD_BYTES", 10)
    first, second = cuts(str(film), 2)
    with closing(LastSource()) as last:
        assert not isinstance(last.read(first).source, bytes)
        os.utime(film, ns=(1, 1))
        refused = pack_clip(second, pack_settings(), None, last)
    assert isinstance(refused, RefusedClip)
    assert (refused.reason, refused.detail[:20]) == ("read_error", "the file was changed")


def test_the_indices_of_a_source_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A film whose packets do not list its frames is decoded once for its index, not per cut."""
    made: list[str] = []

    def counted(name: str) -> Callable[[Any, str], FrameIndex]:
        make = getattr(frame_index, name)

        def call(source: Any, key: str) -> FrameIndex:
            made.append(name)
            return make(source, key)

        return call

    for name in ("index_packets", "index_decoded_frames"):
        monkeypatch.setattr(frame_index, name, counted(name))

    def act(index: FrameIndex) -> int:
        if index.keyframes:  # of the packets
            raise FrameIndexMismatch("a test")
        return index.num_frames

    indices = SourceIndices(FILM)
    assert [indices.apply(act, f"k{n}") for n in range(5)] == [40] * 5
    assert made == ["index_packets", "index_decoded_frames"]
    made.clear()
    garbage = SourceIndices(b"garbage")
    for key in ("a", "b"):
        with pytest.raises(BadSample, match=f"^{key}: unreadable"):
            garbage.apply(act, key)
    assert made == ["index_packets"]


def test_a_cut_is_decoded_from_the_keyframe_before_it(
    film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[float] = []
    see = indexed_decode._fits

    def note(index: FrameIndex, number: int, frame: Any) -> bool:
        decoded.append(number)
        return see(index, number, frame)

    monkeypatch.setattr(indexed_decode, "_fits", note)
    clip = replace(cuts(str(film))[0], start_s=3.3, end_s=3.5)
    with closing(LastSource()) as last:
        assert isinstance(pack_clip(clip, pack_settings(), None, last), TarSample)
        start = keyframe_before(last.read(clip).indices.packets("f"), 33)
    assert start >= 20
    assert decoded == list(range(start, 35))


def test_a_cut_of_a_long_film_looks_at_the_times_of_few_frames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = 200_000
    index = FrameIndex(
        pts=tuple(range(5, 3 * number, 3)),
        num_frames=number - 1,
        keyframes=(),
        unit_s=Fraction(1, 90),
        rate_hz=Fraction(30),
        stream=0,
    )
    spans = [(0.0, 0.1), (7.0, 7.0333333), (1000.0, None), (3.033, 6000.0), (1e9, 2e9)]
    expected = [frames_within(index.times_s, span) for span in spans]
    looked: list[int] = []
    time_s = FrameIndex.time_s

    def counted(self: FrameIndex, frame: int) -> float:
        looked.append(frame)
        return time_s(self, frame)

    monkeypatch.setattr(FrameIndex, "time_s", counted)
    assert [index.within(span, "k") for span in spans[:-1]] == expected[:-1]
    with pytest.raises(BadSample, match=r"none of 199999 frames, the last at 6666\.6 s, is in"):
        index.within(spans[-1], "k")
    assert len(looked) < 40 * len(spans)
