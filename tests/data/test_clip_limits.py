"""No clip ends or stops a packing: what is no file, never ends, or needs too much is refused."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from builders.clip_actions import (
    Does,
    crash_at_last,
    eat,
    fail_to_allocate,
    kill,
    leave,
    loop,
    wait_forever,
)
from builders.clip_files import (
    file_contents,
    numbered_video,
    pack_settings,
    read_number,
    write_clips,
)
from builders.decoder_cases import decoders
from builders.exhaustive import further
from builders.shown_videos import with_pixel_shape

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.limited_process import MIN_MEMORY_BYTES, ProcessLimits
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.worker_pool import pack_clips
from tvr.data_prep.records import Clip, TooManyBadSamples
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.images import resize_short_side
from tvr.launchers.host_limits import host_memory

FRAMES: dict[str, Any] = {"layout": "frames", "num_frames": 2, "samples_per_shard": 4}
MIB = 1 << 20
TIME_S = 3.0


def bad_lines(out: Path) -> dict[str, tuple[str, str]]:
    """The reason and detail of each refused clip, by key."""
    lines = (out / "bad.jsonl").read_text().splitlines()
    return {bad["key"]: (bad["reason"], bad["detail"]) for bad in map(json.loads, lines)}


def large_video(width: int, height: int, frames: int) -> bytes:
    """Returns an MP4 of large flat pictures, all of them keyframes."""
    buffer = io.BytesIO()
    options = {"preset": "ultrafast", "g": "1"}
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane in frame.planes:
                np.frombuffer(plane, np.uint8)[:] = 20 + 5 * number  # type: ignore[call-overload]
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def video_4k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "4k.mp4"
    path.write_bytes(large_video(3840, 2160, 16))
    return path


# ------------------------------------------------------------ big pictures


def peak_growth_mib(code: str, *arguments: str) -> int:
    """Runs Python code in a process of its own; returns the growth of its peak memory."""
    text = f"""
import resource, sys
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
{code}
print(peak() - before)
"""
    return int(run_python(text, *arguments).splitlines()[-1])


def run_python(text: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PACK_AND_READ = """
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Clip
clip = Clip(key="k", video=sys.argv[1], captions=("x",), video_id="k")
view = Augmentation(frame_sampling="random", crop_scale=0.5).draw(0, 0, 16)
before = peak()
pack_shards([clip], f"{sys.argv[2]}/f", layout="frames", num_frames=16, short_side=32, processes=0)
pack_shards([clip], f"{sys.argv[2]}/v", layout="video", processes=0)
reader = SampleReader(f"{sys.argv[2]}/v", num_frames=16, image_size=32)
assert reader.read(0, view).frames.shape == (16, 32, 32, 3)
"""
PICTURE_MIB = 3840 * 2160 * 3 // MIB


def test_frames_of_4k_are_resized_as_they_come(video_4k: Path, tmp_path: Path) -> None:
    """16 pictures take 380 MiB; a decoder and a resize hold about five, in packing and reading."""
    assert peak_growth_mib(PACK_AND_READ, str(video_4k), str(tmp_path)) < 8 * PICTURE_MIB


@decoders
@pytest.mark.parametrize("num_frames", [5, 40])
def test_pictures_that_are_finished_as_they_come_are_the_same(
    decoder: Decoder, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "torchcodec":
        monkeypatch.setattr("tvr.data_prep.video.decode_torchcodec.PICTURES_BYTES", 3 * 64 * 32 * 3)
    sample, video = frame_sampler(decoder), numbered_video(13)
    frames, times_s = sample(video, num_frames)
    finished, again_s = sample(
        video, num_frames, finish=lambda frame: resize_short_side(frame[None], 20)[0]
    )
    expected = [1, 3, 6, 9, 11] if num_frames == 5 else list(range(13))
    assert [read_number(frame) for frame in frames] == expected
    np.testing.assert_array_equal(finished, resize_short_side(frames, 20))
    assert again_s == times_s


def test_pictures_of_several_sizes_are_fitted_before_they_are_finished() -> None:
    first = numbered_video(8, container="mpegts")
    joined = with_pixel_shape(first, "1/1", "mpegts") + with_pixel_shape(first, "3/2", "mpegts")
    adjusted: set[str] = set()
    frames, _ = sample_frames(joined, 32, adjusted=adjusted)
    finished, _ = sample_frames(
        joined, 32, finish=lambda frame: resize_short_side(frame[None], 20)[0]
    )
    np.testing.assert_array_equal(finished, resize_short_side(frames, 20))
    assert adjusted >= {"size_change"}


@pytest.mark.parametrize("processes", [2, *further(1)])
def test_a_clip_that_needs_too_much_memory_is_refused(
    video_4k: Path, tmp_path: Path, processes: int
) -> None:
    clips = write_clips(tmp_path, 5)
    clips[2] = replace(clips[2], video=str(video_4k))
    limits = ProcessLimits(memory_bytes=64 * MIB)
    share: dict[str, Any] = {"processes": processes, "limits": limits, **FRAMES}
    manifest = pack_shards(clips, str(tmp_path / "data"), max_bad=1, **share)
    assert manifest is not None
    assert (manifest.num_samples, manifest.bad) == (4, {"out_of_memory": 1})
    reason, detail = bad_lines(tmp_path / "data")["c02"]
    assert reason == "out_of_memory"
    assert detail.startswith("twice, its process reached its memory limit, 0.0671 GB (--clip-mem")
    with pytest.raises(TooManyBadSamples, match=r"1 of them reached a limit of this machine \(out"):
        pack_shards(clips, str(tmp_path / "none"), **share)
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_a_decoder_that_gets_no_memory_may_call_it_damage(video_4k: Path, tmp_path: Path) -> None:
    """With even less memory the decoder reports invalid data."""
    clips = write_clips(tmp_path, 2)
    clips[1] = replace(clips[1], video=str(video_4k))
    limits = ProcessLimits(memory_bytes=20 * MIB)
    manifest = pack_shards(clips, str(tmp_path / "data"), max_bad=1, limits=limits, **FRAMES)
    assert manifest is not None
    reason, detail = bad_lines(tmp_path / "data")["c01"]
    assert reason == "out_of_memory" or detail.endswith(
        "too little to decode it (--clip-memory-gb)"
    )


def test_the_memory_of_a_process_is_a_share_of_the_host() -> None:
    limits, available = ProcessLimits(), host_memory().available
    assert 0.7 * available < limits.memory_of(1) < 0.9 * available
    assert limits.memory_of(10**6) == MIN_MEMORY_BYTES
    assert ProcessLimits(memory_bytes=5 * MIB).memory_of(9) == 5 * MIB
    assert limits.seconds(1 << 30) == limits.time_s + 10240
    for wrong in ({"memory_bytes": 7}, {"time_s": 0.0}, {"time_s": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            ProcessLimits(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------ no end


@pytest.mark.parametrize("processes", [0, 1])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, processes: int) -> None:
    clips = write_clips(tmp_path, 7)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "folder").mkdir()
    kinds = ["fifo", "link", "folder", "/dev/zero", "socket"]
    with socket.socket(socket.AF_UNIX) as server, folder_of(tmp_path):
        server.bind("socket")
        odd = [
            replace(clip, video=str(tmp_path / kind))
            for clip, kind in zip(clips, kinds, strict=False)
        ]
        odd[0] = replace(odd[0], video=f"file://{odd[0].video}")
        manifest = pack_shards(
            [*odd, *clips[5:]], str(tmp_path / "data"), max_bad=5, processes=processes, **FRAMES
        )
    assert manifest is not None
    assert (manifest.num_samples, manifest.bad) == (2, {"missing_file": 5})
    found = ["a FIFO", "a FIFO", "a directory", "a device", "a socket"]
    details = [detail for _, detail in bad_lines(tmp_path / "data").values()]
    for kind, detail in zip(found, details, strict=True):
        assert detail.startswith(f"not a regular file but {kind} [")


@contextmanager
def folder_of(path: Path) -> Iterator[None]:
    """Names of sockets are short, so they are relative."""
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


ACTIONS = {
    loop: ("timed_out", "made no progress within its time limit, 3 s and 10 s more"),
    wait_forever: ("timed_out", "made no progress within its time limit, 3 s and 10 s more"),
    leave: ("killed", "ended with exit code 3"),
    kill: ("killed", "ended with SIGKILL"),
    crash_at_last: ("killed", "ended with SIGSEGV"),
    eat: ("out_of_memory", "reached its memory limit, 0.268 GB"),
    fail_to_allocate: ("out_of_memory", "reached its memory limit, 0.268 GB"),
}


def test_what_breaks_its_process_costs_its_clip_only(tmp_path: Path) -> None:
    settings = pack_settings()
    good = write_clips(tmp_path, len(ACTIONS) + 1)
    clips: list[Clip] = []
    for action, clip in zip(ACTIONS, good, strict=False):
        clips += [clip, replace(clip, key=action.__name__, captions=Does(action))]
    clips.append(good[-1])
    limits = ProcessLimits(memory_bytes=256 * MIB, time_s=TIME_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    packed = list(pack_clips(clips, settings, 3, limits=limits))
    assert [outcome.key for outcome in packed] == [clip.key for clip in clips]
    refused = {each.key: each for each in packed if isinstance(each, RefusedClip)}
    assert list(refused) == [action.__name__ for action in ACTIONS]
    for action, (reason, how) in ACTIONS.items():
        entry = refused[action.__name__]
        assert entry.reason == reason
        assert entry.detail.startswith(f"twice, its process {how}")


@contextmanager
def stalling_server() -> Iterator[str]:
    """Serves a file of which it sends the first bytes and no more."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    connection.recv(4096)
                    head = "HTTP/1.1 206 Partial Content\r\nContent-Length: 5000\r\n\r\n"
                    connection.sendall(head.encode() + numbered_video(4)[:100])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in held:
                connection.close()


def test_a_server_that_stops_sending_costs_its_file(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 5)
    with stalling_server() as url:
        clips[1] = replace(clips[1], video=f"{url}/v.mp4")
        manifest = pack_shards(
            clips,
            str(tmp_path / "data"),
            max_bad=1,
            processes=2,
            limits=ProcessLimits(time_s=TIME_S),
            **FRAMES,
        )
    assert manifest is not None
    assert (manifest.num_samples, manifest.bad) == (4, {"timed_out": 1})
    assert list(bad_lines(tmp_path / "data")) == ["c01"]


def test_limits_change_no_byte_of_other_clips(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 5)
    limits = ProcessLimits(memory_bytes=64 * MIB, time_s=60)
    pack_shards(clips, str(tmp_path / "with"), processes=2, limits=limits, **FRAMES)
    pack_shards(clips, str(tmp_path / "without"), processes=0, **FRAMES)
    assert file_contents(tmp_path / "with") == file_contents(tmp_path / "without")


def test_a_budget_that_limits_have_spent_names_the_machine() -> None:
    budget = BadSampleBudget(2, "while packing x")
    budget.record_bad("a", "killed", "twice")
    budget.record_bad("b", "unreadable", "garbage")
    with pytest.raises(TooManyBadSamples, match=r"; 2 of them reached a limit of this machine"):
        budget.record_bad("c", "timed_out", "twice")
