"""Data sets whose index was made to do harm: every value is checked before anything is done."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.clip_files import make_dataset
from builders.old_format import edit_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvr.data_prep.dataset import manifest as manifest_file
from tvr.data_prep.dataset.index_rules import SHA256
from tvr.data_prep.dataset.manifest import Shard, read_manifest
from tvr.data_prep.dataset.sample_blocks import (
    HEADER,
    TABLE_ENTRY,
    RowsWriter,
    encode_block,
    table_sha256,
)
from tvr.data_prep.dataset.sample_table import SampleTable, text_array
from tvr.data_prep.packing.output_files import seal
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.shard_record import decode_record
from tvr.data_prep.reading.node_cache import CacheFolder, ShardCache
from tvr.data_prep.records import Clip, ShardCorrupt
from tvr.data_prep.storage.storage import Storage

HUGE = 1 << 62
NAMES = (
    *("../shard-000000.tar", "/etc/shard.tar", "a/b.tar", "..", "", ".tar", "-x.tar", "a\\b.tar"),
    *(
        "C:x.tar",
        "a\x00.tar",
        "a\n.tar",
        "s3://b/x.tar",
        "http://h/x.tar",
        "a..b.tar",
        "x.npz.tar?",
    ),
    *("shard-000000", "x" * 300 + ".tar", 7, None, ["a.tar"]),
)
NUMBERS = (-1, 1.5, "1", True, None, HUGE, [1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 4 samples in 2 shards."""
    return Path(make_dataset(tmp_path_factory.mktemp("dataset"), 4, samples_per_shard=2))


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


EDITS = [
    *((("shards", 0, "name"), name) for name in NAMES),
    *((("samples", "name"), name) for name in ("../samples.rows", "/samples.rows", "a/b.rows", 3)),
    *(
        ((*place, "sha256"), value)
        for place in (("shards", 0), ("samples",))
        for value in ("../" * 8 + "tmp/x", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", 5, None)
    ),
    *((("shards", 0, name), value) for name in ("num_samples", "shard_bytes") for value in NUMBERS),
    *((("shards", 0, name), 0) for name in ("num_samples", "shard_bytes")),
    *((("num_frames",), value) for value in (*NUMBERS,)),
    *((("short_side",), value) for value in (-1, 0, 1.5, "1", True, HUGE)),
    *((("num_captions",), value) for value in NUMBERS),
    *((("num_empty_captions",), value) for value in NUMBERS),
    *((("generation",), value) for value in (*NUMBERS, "../1")),
    *((("layout",), value) for value in ("beton", 1, None, [])),
    *((("tagger",), value) for value in (1, "a\n", "x" * 300, "\ud800")),
    *((("fingerprint",), value) for value in (1, None, "a\x1b[2J", "x" * 300)),
    *((("bad",), value) for value in (1, [], {"unknown": 1}, {"unreadable": -1}, {"a\n": 1})),
    *((("shards",), value) for value in ({}, [], None, [1], [[]], "shards")),
    *((("samples",), value) for value in ([], None, "samples.rows")),
    *((("samples", "num_bytes"), value) for value in (*NUMBERS, 0, 64)),
    (("shards", 0, "more"), 1),
    (("beton",), "x.beton"),
    (("beton",), {"name": "../x.beton", "num_samples": 4, "shard_bytes": 9999, "sha256": "a" * 64}),
    (("beton",), {"name": "x.tar", "num_samples": 4, "shard_bytes": 9999, "sha256": "a" * 64}),
    (("beton",), {"name": "x.beton", "num_samples": 5, "shard_bytes": 9999, "sha256": "a" * 64}),
    (("beton",), {"name": "x.beton", "num_samples": 4, "shard_bytes": 16, "sha256": "a" * 64}),
    (("beton",), {"name": "x.beton", "num_samples": 4, "shard_bytes": -1, "sha256": "a" * 64}),
    (("beton",), {"name": "x.beton", "num_samples": 4, "shard_bytes": 9999, "sha256": "/x"}),
]


@pytest.mark.parametrize(("path", "value"), EDITS, ids=lambda value: repr(value)[:40])
def test_hostile_fields_are_refused_by_name(
    copy: Path, path: tuple[str | int, ...], value: object
) -> None:
    edit_manifest(copy, path, value)
    with pytest.raises(ShardCorrupt) as caught:
        read_manifest(str(copy)).check_samples()
    message = str(caught.value)
    # A wrong size of a file is seen at the rows that lie in it.
    names = {str(path[-1]), "length", "offset"} if value != HUGE else {str(path[-1])}
    assert any(name in message for name in names)
    assert str(copy) in message
    assert len(message) < 1000
    assert "\n" not in message


def test_a_deeply_nested_manifest_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ShardCorrupt, match="not JSON"):
        read_manifest(str(copy))


def test_an_endless_manifest_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_file, "MAX_MANIFEST_BYTES", 1000)
    monkeypatch.setattr(manifest_file, "PIECE_BYTES", 256)
    with (copy / "manifest.json").open("ab") as file:
        file.write(b" " * 5000)
    with pytest.raises(ShardCorrupt, match="more than 1000 bytes"):
        read_manifest(str(copy))


def test_an_index_is_read_in_pieces(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (copy / "manifest.json").stat().st_size
    for piece in (7, size, size + 1):
        monkeypatch.setattr(manifest_file, "PIECE_BYTES", piece)
        assert read_manifest(str(copy)).num_samples == 4


def write_block(folder: Path, block: bytes, num_rows: int = 2) -> None:
    """Writes samples.rows with this block for shard 0, all hashes being right."""
    samples = read_manifest(str(folder)).samples
    file = io.BytesIO()
    writer = RowsWriter(file)
    writer.append(samples.rows(0, 2))
    writer.append(samples.rows(2, 4))
    _, (num_bytes, count, digest) = writer._table
    second = encode_block(samples.rows(2, 4))
    table = np.array(
        [(len(block), num_rows, hashlib.sha256(block).digest()), (num_bytes, count, digest)],
        dtype=TABLE_ENTRY,
    ).tobytes()
    header = file.getvalue()[: HEADER.size]
    publish(folder, header + block + second + table, header, table)


def publish(folder: Path, content: bytes, header: bytes, table: bytes) -> None:
    """Replaces samples.rows, with its size and hash in manifest.json."""
    (folder / "new.rows").write_bytes(content)
    (folder / "new.rows").rename(folder / "samples.rows")
    edit_manifest(folder, ("samples", "num_bytes"), len(content))
    edit_manifest(folder, ("samples", "sha256"), table_sha256(header, table))


def with_value(name: str, value: object) -> Callable[[SampleTable], bytes]:
    """A block whose first row has this value."""

    def build(rows: SampleTable) -> bytes:
        column = np.array(getattr(rows, name))
        column[0] = value
        return encode_block(replace(rows, **{name: column}))

    return build


def with_text(name: str, text: bytes) -> Callable[[SampleTable], bytes]:
    """A block whose first row has these bytes as its text."""

    def build(rows: SampleTable) -> bytes:
        stand_in = "x" * len(text)  # the bytes may be no UTF-8
        values = text_array([stand_in, *getattr(rows, name).tolist()[1:]])
        block = encode_block(replace(rows, **{name: values}))
        return block.replace(stand_in.encode(), text, 1) if text else block

    return build


def with_bytes(at: int, content: bytes) -> Callable[[SampleTable], bytes]:
    """A block with other bytes at a place."""

    def build(rows: SampleTable) -> bytes:
        block = bytearray(encode_block(rows))
        block[at : at + len(content)] = content
        return bytes(block)

    return build


# Places in a block of 2 rows: after the header, each column has 64 bytes.
KEY_ENDS, VIDEO_ID_ENDS = 64 * 6, 64 * 7


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_value("offset", -512), "offset of row 0=-512"),
        (with_value("offset", 2**62), "offset of row 0"),
        (with_value("offset", 1), "offset of row 0=1"),
        (with_value("length", -512), "length of row 0=-512"),
        (with_value("length", 0), "length of row 0=0"),
        (with_value("length", 2**62), "length of row 0"),
        (with_value("num_captions", -1), "num_captions of row 0=-1"),
        (with_value("num_captions", 2**31 - 1), "num_captions of row 0"),
        (with_text("key", b"../../x"), r"key of row 0='\.\./\.\./x'"),
        (with_text("key", b"a.b"), "key of row 0"),
        (with_text("key", b""), "key of row 0"),
        (with_text("key", b"<script>"), "key of row 0"),
        (with_text("key", b"k" * 81), "key of row 0"),
        (with_text("key", b"a\0b"), "key of row 0"),
        (with_text("key", b"caf\xc3\xa9"), "key of row 0"),
        (with_text("video_id", b"a\nb"), r"video_id of row 0='a\\nb'"),
        (with_text("video_id", b""), "video_id of row 0"),
        (with_text("video_id", b"\xff\xfe\xfd"), "video_id of row 0=b"),
        (with_text("video_id", b"\xed\xa0\x80"), "video_id of row 0=b"),  # half a UTF-16 pair
        (with_text("video_id", b"\xf4\x90\x80\x80"), "video_id of row 0=b"),  # beyond Unicode
        (with_text("video_id", b"\xc0\xaf"), "video_id of row 0=b"),  # an overlong slash
        (with_text("video_id", b"x" * 5000), "video_id of row 0"),
        (with_text("video_id", b"a\xe2\x80\xa8b"), "video_id of row 0"),  # a line separator
        (with_bytes(0, b"\3"), r"block of row 0=\(3"),
        (with_bytes(4, b"\xff\xff\xff\xff"), "block of row 0"),
        (with_bytes(8, b"\xff"), "block of row 0"),
        (with_bytes(KEY_ENDS, b"\xff\xff\xff\xff"), "end of key of row 1=6"),
        (with_bytes(KEY_ENDS + 4, b"\5"), "end of key of row 1=5"),
        (with_bytes(KEY_ENDS, b"\0"), "key of row 0=''"),
        (with_bytes(VIDEO_ID_ENDS, b"\7"), "end of video_id of row 1=6"),
        (lambda rows: encode_block(rows)[:-64], "block of row 0"),
        (lambda rows: bytes(64), "block of row 0"),
        (lambda rows: b"", "block of row 0"),
        (lambda rows: encode_block(rows) + bytes(64), "block of row 0"),
    ],
)
def test_hostile_rows_are_refused_by_name(
    copy: Path, build: Callable[[SampleTable], bytes], message: str
) -> None:
    write_block(copy, build(read_manifest(str(copy)).samples.rows(0, 2)))
    manifest = read_manifest(str(copy))  # reads no row
    assert manifest.samples.key[2] == "c02"
    for read in (lambda: manifest.samples.offset[1], manifest.check_samples):
        with pytest.raises(ShardCorrupt, match=message) as caught:
            read()
    assert str(copy) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_hostile_tables_are_refused_at_opening(copy: Path) -> None:
    content = (copy / "samples.rows").read_bytes()
    header, table = content[: HEADER.size], content[-2 * TABLE_ENTRY.itemsize :]
    blocks = content[HEADER.size : -len(table)]
    entries = np.frombuffer(table, TABLE_ENTRY)

    def changed(name: str, values: list[int]) -> bytes:
        copied = entries.copy()
        copied[name] = values
        return copied.tobytes()

    sizes = entries["num_bytes"].tolist()
    for head, end, message in (
        (header.replace(b"TVR", b"RVT"), table, "magic"),
        (header[:8] + b"\2" + header[9:], table, "version"),
        (header, changed("num_bytes", [sizes[0] + 64, sizes[1]]), "sizes of blocks"),
        (header, changed("num_bytes", [sizes[0] - 1, sizes[1] + 1]), "sizes of blocks"),
        (header, changed("num_bytes", [2**64 - 64, sum(sizes) + 64]), "sizes of blocks"),
        (header, changed("num_rows", [1, 3]), "disagree on the samples per shard"),
    ):
        publish(copy, head + blocks + end, head, end)
        with pytest.raises(ShardCorrupt, match=message):
            read_manifest(str(copy))


def test_flipped_bytes_of_rows_are_refused_or_harmless(dataset: Path, tmp_path: Path) -> None:
    """Whatever an edited block holds, it is refused as ShardCorrupt, or reads as valid rows."""
    block = encode_block(read_manifest(str(dataset)).samples.rows(0, 2))
    folder = tmp_path / "flipped"

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, len(block) - 1), st.integers(1, 255))
    def check(at: int, change: int) -> None:
        flipped = bytearray(block)
        flipped[at] ^= change
        shutil.copytree(dataset, folder, dirs_exist_ok=True, ignore=lambda *_: ["bad.jsonl"])
        write_block(folder, bytes(flipped))
        try:
            samples = read_manifest(str(folder)).samples
            assert len(samples.key.tolist()) == 4
        except ShardCorrupt:
            pass

    check()


def test_a_damaged_block_is_found_when_it_is_read(copy: Path) -> None:
    content = bytearray((copy / "samples.rows").read_bytes())
    content[HEADER.size + 64] ^= 1
    (copy / "samples.rows").write_bytes(content)
    samples = read_manifest(str(copy)).samples
    assert samples.key[2:].tolist() == ["c02", "c03"]
    for _ in range(2):
        with pytest.raises(ShardCorrupt, match="rows from 0 on are damaged: their sha256 differs"):
            samples.key[0]


def test_a_file_that_is_cut_off_while_open_ends_no_process(copy: Path) -> None:
    samples = read_manifest(str(copy)).samples
    with (copy / "samples.rows").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ShardCorrupt, match="rows from 2 on are damaged"):
        samples.key[3]


def test_a_hostile_manifest_cannot_make_the_cache_delete_a_file(tmp_path: Path) -> None:
    victim = tmp_path / "victim.tar"
    victim.write_bytes(b"precious")
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 20)
    shard = Shard(name="s.tar", num_samples=1, shard_bytes=512, sha256="../victim")
    with pytest.raises(ValueError, match=r"s\.tar: sha256='\.\./victim' must be 64"):
        ShardCache(folder, Storage(str(tmp_path)), [shard]).drop(0)
    assert victim.read_bytes() == b"precious"


@pytest.fixture
def cached_shard(tmp_path: Path) -> Callable[[], tuple[ShardCache, Path, str]]:
    """A cache folder for one shard of a local folder, which the cache has not read."""

    def build(max_bytes: int = 4096) -> tuple[ShardCache, Path, str]:
        content = b"x" * 2048
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "s.tar").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        shard = Shard(name="s.tar", num_samples=1, shard_bytes=len(content), sha256=sha256)
        folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=max_bytes)
        cache = ShardCache(folder, Storage(str(tmp_path / "store")), [shard])
        return cache, tmp_path / "cache", sha256

    return build


def test_links_in_the_cache_are_not_followed(
    cached_shard: Callable[[], tuple[ShardCache, Path, str]], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache, folder, sha256 = cached_shard()
    before = victim.stat().st_mtime_ns
    for name in (f"{sha256}.partial", f"{sha256}.tar", "lock", f"{'0' * 64}.partial"):
        (folder / name).symlink_to(victim)
    assert cache.read(0, 1, 3) == b"xxx"
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == (b"precious", before)
    assert [path.name for path in folder.iterdir() if path.is_symlink()] == []


def test_the_cache_evicts_only_its_own_files(
    cached_shard: Callable[[], tuple[ShardCache, Path, str]],
) -> None:
    cache, folder, sha256 = cached_shard()
    for name in ("holiday.tar", "letter.partial", "thesis.refused"):
        (folder / name).write_bytes(b"y" * 4000)
    (folder / f"{'0' * 64}.tar").write_bytes(b"z" * 4000)
    assert cache.fetch(0)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["holiday.tar", "letter.partial", "thesis.refused", "lock", f"{sha256}.tar"]
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shard", "sha256"), "../x"),
        (("shard", "name"), "../x.tar"),
        (("shard", "shard_bytes"), -1),
        (("samples", "offset"), [-512]),
        (("samples", "length"), [1 << 62]),
        (("samples", "key"), ["../x"]),
        (("samples", "crc32"), [-1]),
    ],
)
def test_a_hostile_record_of_a_shard_is_packed_again(
    path: tuple[str, str], value: object, caplog: pytest.LogCaptureFixture
) -> None:
    samples = {"key": ["k"], "video_id": ["v"], "shard": [0], "offset": [0], "length": [512]}
    samples |= {"crc32": [1], "num_captions": [1], "content": [1]}
    shard = {"name": "shard-000000.tar", "num_samples": 1, "shard_bytes": 1536, "sha256": "a" * 64}
    file: dict[str, Any] = {"shard": shard, "samples": samples}
    record = {"packing": "p", "files": [file], "num_empty_captions": 0, "bad": []}
    assert decode_record(seal(record), "p") is not None
    file[path[0]][path[1]] = value
    assert decode_record(seal(record), "p") is None
    assert "damaged" in caplog.text


@pytest.mark.parametrize("generation", ["../x", -1, 10**9, 1.5, [1]])
def test_a_hostile_generation_is_replaced(copy: Path, generation: object, tmp_path: Path) -> None:
    edit_manifest(copy, ("generation",), generation)
    clips = [Clip(key="k", video=str(tmp_path / "none.mp4"), captions=("x",), video_id="v")]
    with pytest.raises(ValueError, match="no usable clip"):
        pack_shards(clips, str(copy), layout="video", overwrite=True, max_bad=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("video_id", ["", "a\nb", "\ud800", "x" * 5000, "a\u2028b"])
def test_a_video_id_that_could_not_be_read_is_not_packed(video_id: str, tmp_path: Path) -> None:
    clip = Clip(key="k", video="v.mp4", captions=("x",), video_id=video_id, origin="a.jsonl:1")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: video_id=.* must be 1 to 4096 characters"):
        pack_shards([clip], str(tmp_path / "data"), layout="video")


def test_the_pattern_of_a_hash() -> None:
    assert SHA256.fullmatch(hashlib.sha256(b"").hexdigest())
    assert not SHA256.fullmatch("a" * 64 + "\n")
