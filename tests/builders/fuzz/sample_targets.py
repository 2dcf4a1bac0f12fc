"""Damaged samples, and the files of a data set: what is read is what was packed, or an error."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from builders.clip_files import make_dataset
from builders.fuzz.mutations import mutate_bytes, mutate_json_file, mutate_text
from builders.fuzz.target import READ, SEEDS, Target, documented, require
from builders.old_format import columns_of, npz

from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.jpeg_stack import split_stack, stack_bytes
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.npz_columns import check_columns, read_columns
from tvr.data_prep.dataset.sample_blocks import (
    HEADER,
    TABLE_ENTRY,
    encode_block,
    table_sha256,
)
from tvr.data_prep.dataset.sample_codec import (
    SampleMeta,
    decode_members,
    parse_members,
    parse_meta,
    split_tar,
)
from tvr.data_prep.dataset.sample_table import SampleTable
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample, ShardCorrupt
from tvr.data_prep.video.decode import choose_frames, sample_frames
from tvr.data_prep.video.frame_index import index_packets
from tvr.data_prep.video.images import decode_jpeg
from tvr.data_prep.video.stored_index import HEADER as INDEX_HEADER
from tvr.data_prep.video.stored_index import INDEX_MEMBER, decode_index

NUM_CLIPS = 4
ROWS = "samples.rows"
HOSTILE_ROWS = "samples.rows with right hashes"
# What a change of these fields of manifest.json changes is no sample.
NOT_OF_SAMPLES = {
    *("num_frames", "short_side", "num_empty_captions", "tagger", "fingerprint", "generation"),
    *("layout", "num_samples", "beton"),
}


class Samples(Target):
    """The parts of one sample: byte ranges of a tar and of a stack, JSON, JPEG, frame index."""

    name = "samples"
    share = 0.15

    @classmethod
    def make(cls, folder: Path) -> None:
        frames = _stored(make_dataset(folder / "frames", 1, words=True, processes=0))
        video = _stored(make_dataset(folder / "video", 1, layout="video", processes=0))
        members = split_tar(frames, "c00")
        jpegs = [members[name] for name in sorted(members) if name.endswith(".jpg")]
        parts = {
            "frames.tar": frames,
            "video.tar": video,
            "stack": stack_bytes(jpegs) + members["json"],
            "json": members["json"],
            "jpeg": jpegs[0],
            "index": split_tar(video, "c00")[INDEX_MEMBER],
        }
        for name, content in parts.items():
            (folder / SEEDS / name).write_bytes(content)

    def prepare(self) -> None:
        self._video = split_tar(self.seeds["video.tar"], "c00")["mp4"]
        self._plain, self._plain_s = sample_frames(self._video, 100)
        self._pts = index_packets(self._video, "c00").pts

    def mutate(self, seed: str, chance: Random) -> bytes:
        content = self.seeds[seed]
        if seed == "json":
            return mutate_json_file(content, chance, self.donors)
        if seed == "index" and chance.random() < 0.7:
            # Inside of the compressed numbers, which damage hardly ever leaves readable.
            size = INDEX_HEADER.size
            numbers = zlib.decompress(content[size:])
            if chance.random() < 0.5:
                numbers = mutate_bytes(numbers, chance, self.donors)
                return content[:size] + zlib.compress(numbers)
            return mutate_bytes(content[:size], chance, self.donors)[:size] + content[size:]
        return mutate_bytes(content, chance, self.donors)

    def check(self, seed: str, content: bytes) -> str:
        whole = self.seeds[seed]
        try:
            if seed.endswith(".tar"):
                self._check_recorded(whole, content)
                self._check_tar(content)
            elif seed == "stack":
                members = split_stack(content, "c00")
                count = len(members) - 1
                total = 4 * (1 + count) + sum(map(len, members.values()))
                require(total == len(content), f"a stack of {total} bytes, not {len(content)}")
                parse_meta("c00", members)
            elif seed == "json":
                _check_meta(content, parse_meta("c00", {"json": content, "mp4": b""}))
            elif seed == "jpeg":
                _check_jpeg(content)
            else:
                self._check_index(content)
        except BadSample as error:
            return error.reason
        return READ

    def _check_recorded(self, whole: bytes, content: bytes) -> None:
        """With the recorded length and checksum, only the packed bytes are read."""
        try:
            parse_members(content, "c00", len(whole), zlib.crc32(whole))
        except BadSample as error:
            require(content != whole, f"the packed bytes are refused: {error}")
        else:
            require(content == whole, "changed bytes pass the recorded checksum")

    def _check_tar(self, content: bytes) -> None:
        members = split_tar(content, "c00")
        # tarfile also reads the rest of a member's last block.
        whole_blocks = content + bytes(-len(content) % tarfile.BLOCKSIZE)
        with tarfile.open(fileobj=io.BytesIO(whole_blocks), mode="r:") as archive:
            plain = {}
            for member in archive.getmembers():
                file = archive.extractfile(member)
                require(file is not None, f"{member.name} is no file, and was read as one")
                plain[member.name.split(".", 1)[1]] = file.read()  # type: ignore[union-attr]
        require(members == plain, "tarfile reads other members")
        meta = parse_meta("c00", members)
        _check_meta(members["json"], meta)
        frames, times_s = decode_members("c00", members, meta, 3)
        require(frames.dtype == np.uint8 and frames.shape[-1] == 3, "frames of another kind")
        require(1 <= len(frames) <= 3 and len(times_s) == len(frames), "another number of frames")

    def _check_index(self, content: bytes) -> None:
        """Frames are those at the index's times, or those that a read without it gives."""
        index = decode_index(content, len(self._video), "c00")
        for num_frames in (2, 100):
            pictures, times_s = sample_frames(self._video, num_frames, frame_index=index, key="c00")
            plain, plain_s = sample_frames(self._video, num_frames)
            if np.array_equal(pictures, plain) and times_s == plain_s:
                continue
            chosen, _ = choose_frames(index, num_frames, None, None, "c00", "time")
            assert index.pts is not None
            assert self._pts is not None
            for picture, number in zip(pictures, chosen, strict=True):
                require(index.pts[number] in self._pts, "a frame at a time that no frame has")
                expected = self._plain[self._pts.index(index.pts[number])]
                require(np.array_equal(picture, expected), f"frame {number} is another one")


def _check_meta(content: bytes, meta: SampleMeta) -> None:
    plain = json.loads(content)
    require(list(meta.texts) == plain["captions"], "the captions are others")
    require(meta.video_id == plain["video_id"], "the video_id is another one")
    require(list(meta.frame_times_s) == plain["frame_times_s"], "the times are others")


def _check_jpeg(content: bytes) -> None:
    picture = decode_jpeg(content, key="c00", member="00.jpg")
    require(picture.dtype == np.uint8 and picture.shape[2:] == (3,), "another kind of picture")
    out = np.full_like(picture, 7)
    again = decode_jpeg(content, key="c00", member="00.jpg", out=out)
    require(np.array_equal(picture, again), "two decodes of a JPEG differ")


def _stored(url: str) -> bytes:
    """Returns the byte range of the only sample of a data set."""
    samples = read_manifest(url).samples
    start, length = int(samples.offset[0]), int(samples.length[0])
    return (Path(url) / "shard-000000.tar").read_bytes()[start : start + length]


class DataSets(Target):
    """A data set of which one file is damaged."""

    name = "data sets"
    share = 0.16

    @classmethod
    def make(cls, folder: Path) -> None:
        url = Path(make_dataset(folder / "made", NUM_CLIPS, samples_per_shard=2, processes=0))
        for path in url.iterdir():
            shutil.copy(path, folder / SEEDS / path.name)
        (folder / SEEDS / "bad.jsonl").write_text(
            '{"key": "x", "reason": "unreadable", "detail": "y [z.mp4 of a.csv:3]"}\n'
        )
        block = encode_block(read_manifest(str(url)).samples.rows(0, 2))
        (folder / SEEDS / HOSTILE_ROWS).write_bytes(block)

    def prepare(self) -> None:
        self._url = self.scratch / "data set"
        self._url.mkdir()
        self._restore([name for name in self.seeds if name != HOSTILE_ROWS])
        samples = read_manifest(str(self._url)).samples
        self._whole = _members(SampleReader(str(self._url), num_frames=1, image_size=16))
        self._second = encode_block(samples.rows(2, 4))
        require(len(self._whole) == NUM_CLIPS, "the whole data set is not read")

    def _restore(self, names: Sequence[str]) -> None:
        for name in names:
            (self._url / name).write_bytes(self.seeds[name])

    def mutate(self, seed: str, chance: Random) -> bytes:
        content = self.seeds[seed]
        if seed == "manifest.json":
            return mutate_json_file(content, chance, self.donors)
        if seed == "bad.jsonl":
            return mutate_text(content, chance, self.donors)
        return mutate_bytes(content, chance, self.donors)

    def check(self, seed: str, content: bytes) -> str:
        changed = [seed] if seed != HOSTILE_ROWS else [ROWS, "manifest.json"]
        if seed == HOSTILE_ROWS:
            self._write_hostile(content)
        else:
            (self._url / seed).write_bytes(content)
        try:
            outcome = self._read()
            if zlib.crc32(content) % 4 == 0:
                self._verify(seed, content)
            return outcome
        finally:
            self._restore(changed)

    def _write_hostile(self, block: bytes) -> None:
        """Replaces the first block of rows, with the hashes that it needs."""
        header, second = self.seeds[ROWS][: HEADER.size], self._second
        entries = [(len(part), 2, hashlib.sha256(part).digest()) for part in (block, second)]
        table = np.array(entries, dtype=TABLE_ENTRY).tobytes()
        rows = header + block + second + table
        (self._url / ROWS).write_bytes(rows)
        values = json.loads(self.seeds["manifest.json"])
        values["samples"] |= {"num_bytes": len(rows), "sha256": table_sha256(header, table)}
        (self._url / "manifest.json").write_text(json.dumps(values))

    def _read(self) -> str:
        url = str(self._url)
        try:
            reader = SampleReader(url, num_frames=1, image_size=16)
        except (ShardCorrupt, ValueError, FileNotFoundError) as error:
            return documented(error, url)
        found = _members(reader)
        for key, members in found.items():
            require(members == self._whole.get(key), f"sample {key} has other content")
        return READ if len(found) == NUM_CLIPS else "bad samples"

    def _verify(self, seed: str, content: bytes) -> None:
        url = str(self._url)
        try:
            report = verify_dataset(url, decode=1, jobs=1)
        except (ShardCorrupt, ValueError, OSError) as error:
            documented(error, url)
            return
        if report.problems or content == self.seeds[seed]:
            return
        if seed == "manifest.json":
            now, then = json.loads(content), json.loads(self.seeds[seed])
            names = {name for name in {**now, **then} if now.get(name) != then.get(name)}
            require(names <= {*NOT_OF_SAMPLES, *(now.keys() - then.keys())}, f"{names} changed")
        else:
            require(seed in ("bad.jsonl", HOSTILE_ROWS), f"verify finds no problem in {seed}")


def _members(reader: SampleReader) -> dict[str, dict[str, bytes]]:
    """Reads all samples that can be read, as the loader does."""
    found = {}
    for row in range(len(reader)):
        try:
            found[reader.key(row)] = reader.members(row)
        except (BadSample, ShardCorrupt):
            continue
    return found


class Columns(Target):
    """The compressed columns of a data set of format 2."""

    name = "columns"
    share = 0.04

    @classmethod
    def make(cls, folder: Path) -> None:
        columns = columns_of(Path(make_dataset(folder / "made", NUM_CLIPS, processes=0)))
        (folder / SEEDS / "samples.npz").write_bytes(npz(columns))
        (folder / SEEDS / "stored.npz").write_bytes(_stored_npz(columns))

    def prepare(self) -> None:
        self._columns = read_columns(self.seeds["samples.npz"], NUM_CLIPS, "columns.npz")

    def check(self, seed: str, content: bytes) -> str:
        try:
            columns = read_columns(content, NUM_CLIPS, "columns.npz")
            sizes = np.array([1 << 20])
            check_columns(columns, sizes, is_tar=True, where="columns.npz")
        except ShardCorrupt as error:
            return documented(error, "columns.npz")
        for each in fields(SampleTable):
            same = np.array_equal(columns[each.name], self._columns[each.name])
            require(same, f"column {each.name} changed")
        return READ


def _stored_npz(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()
