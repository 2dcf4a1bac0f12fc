"""Data sets whose index was made to do harm: every value is checked before anything is done."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.clip_files import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tvr.data_prep.dataset import manifest as manifest_file
from tvr.data_prep.dataset.index_rules import SHA256
from tvr.data_prep.dataset.manifest import Shard, read_manifest
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


def edited(folder: Path, path: tuple[str | int, ...], value: object) -> None:
    """Sets a value in manifest.json."""
    fields = json.loads((folder / "manifest.json").read_text())
    place = fields
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(fields))


def replace_columns(folder: Path, content: bytes) -> None:
    """Replaces samples.npz, with the right sha256 in manifest.json."""
    (folder / "samples.npz").write_bytes(content)
    edited(folder, ("samples", "sha256"), hashlib.sha256(content).hexdigest())


def columns_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "samples.npz") as columns:
        return dict(columns)


def npz(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)
    return buffer.getvalue()


EDITS = [
    *((("shards", 0, "name"), name) for name in NAMES),
    *((("samples", "name"), name) for name in ("../samples.npz", "/samples.npz", "a/b.npz", 3)),
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
    *((("samples",), value) for value in ([], None, "samples.npz")),
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
    edited(copy, path, value)
    with pytest.raises(ShardCorrupt) as caught:
        read_manifest(str(copy))
    message = str(caught.value)
    # A wrong size of a file is seen at the rows that lie in it.
    names = {str(path[-1]), "length", "offset", "shape"} if value != HUGE else {str(path[-1])}
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


def with_column(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], bytes]:
    def build(folder: Path) -> bytes:
        columns = columns_of(folder)
        return npz({**columns, name: change(columns[name])})

    return build


def first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(column: np.ndarray) -> np.ndarray:
        dtype = np.str_ if isinstance(value, str) else column.dtype
        return np.array([value, *column[1:].tolist()], dtype=dtype)

    return change


def with_codes(codes: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """A column of texts whose first one has these characters, whatever they are."""

    def change(column: np.ndarray) -> np.ndarray:
        widened = column.astype("U8")
        widened.view(np.uint32).reshape(len(column), -1)[0] = [*codes, *[0] * (8 - len(codes))]
        return widened

    return change


def without_column(folder: Path) -> bytes:
    columns = columns_of(folder)
    del columns["crc32"]
    return npz(columns)


def with_extra_column(folder: Path) -> bytes:
    return npz({**columns_of(folder), "more": np.zeros(4)})


def huge_shape(name: str, count: int) -> Callable[[Path], bytes]:
    """A column whose header claims `count` values, without the values."""

    def build(folder: Path) -> bytes:
        content = io.BytesIO(npz(columns_of(folder)))
        made = io.BytesIO()
        with zipfile.ZipFile(content) as source, zipfile.ZipFile(made, "w") as archive:
            for entry in source.infolist():
                data = source.read(entry)
                if entry.filename == f"{name}.npy":
                    data = data.replace(b"(4,), }", f"({count},), }}".encode())
                archive.writestr(entry.filename, data)
        return made.getvalue()

    return build


def bomb(folder: Path) -> bytes:
    """A small file that unpacks to a gigabyte."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(npz(columns_of(folder)))) as source,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for entry in source.infolist():
            if entry.filename != "crc32.npy":
                archive.writestr(entry.filename, source.read(entry))
        with archive.open("crc32.npy", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
    return made.getvalue()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_column("shard", first(-1)), "shard of row 0=-1"),
        (with_column("shard", first(2**31 - 1)), "shard of row 0=2147483647"),
        (with_column("offset", first(-512)), "offset of row 0=-512"),
        (with_column("offset", first(2**62)), "offset of row 0"),
        (with_column("offset", first(1)), "offset of row 0=1"),
        (with_column("length", first(-512)), "length of row 0=-512"),
        (with_column("length", first(0)), "length of row 0=0"),
        (with_column("length", first(2**62)), "length of row 0"),
        (with_column("num_captions", first(-1)), "num_captions of row 0=-1"),
        (with_column("num_captions", first(2**31 - 1)), "num_captions of row 0"),
        (with_column("key", first("../../x")), "key of row 0='../../x'"),
        (with_column("key", first("a.b")), "key of row 0"),
        (with_column("key", first("")), "key of row 0"),
        (with_column("key", first("<script>")), "key of row 0"),
        (with_column("key", first("k" * 81)), "type of key"),
        (with_column("key", with_codes([97, 0, 98])), "key of row 0"),
        (with_column("key", with_codes([0, 98])), "key of row 0"),
        (with_column("video_id", first("a\nb")), "video_id of row 0='a\\\\nb'"),
        (with_column("video_id", first("")), "video_id of row 0"),
        (with_column("video_id", with_codes([97, 0xD800])), "video_id of row 0"),
        (with_column("video_id", with_codes([0x110000])), "video_id of row 0"),
        (with_column("video_id", with_codes([0xFFFFFFFF])), "video_id of row 0"),
        (with_column("video_id", lambda old: old.astype("U5000")), "type of video_id"),
        (with_column("offset", lambda old: old.astype(np.float64)), "type of offset"),
        (with_column("offset", lambda old: old.astype(">i8")), "type of offset"),
        (with_column("offset", lambda old: old[:3]), "shape of offset"),
        (with_column("offset", lambda old: old.reshape(2, 2)), "shape of offset"),
        (with_column("offset", lambda old: old.astype(object)), "type of offset"),
        (with_column("key", lambda old: old.astype("S3")), "type of key"),
        (without_column, "columns="),
        (with_extra_column, "columns="),
        (huge_shape("offset", 10**15), "shape of offset"),
        (huge_shape("key", 10**15), "shape of key"),
        (bomb, "magic"),
        (lambda folder: b"no zip", "BadZipFile"),
        (lambda folder: b"", "BadZipFile"),
        (lambda folder: npz(columns_of(folder))[:-100], "BadZipFile"),
    ],
)
def test_hostile_columns_are_refused_by_name(
    copy: Path, build: Callable[[Path], bytes], message: str
) -> None:
    replace_columns(copy, build(copy))
    with pytest.raises(ShardCorrupt, match=message):
        read_manifest(str(copy))


def test_a_pickle_in_a_column_is_not_executed(copy: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    payload = np.array([Payload()] * 4, dtype=object)
    replace_columns(copy, npz({**columns_of(copy), "offset": payload}))
    with pytest.raises(ShardCorrupt, match="type of offset"):
        read_manifest(str(copy))
    assert not (tmp_path / "executed").exists()


def test_flipped_bytes_of_an_index_are_refused_or_harmless(dataset: Path, tmp_path: Path) -> None:
    """Whatever an edited npz holds, it is refused as ShardCorrupt, or reads as valid columns."""
    folder = Path(shutil.copytree(dataset, tmp_path / "flipped"))
    content = (folder / "samples.npz").read_bytes()

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def check(at: int, change: int) -> None:
        flipped = bytearray(content)
        flipped[at] ^= change
        replace_columns(folder, bytes(flipped))
        try:
            assert read_manifest(str(folder)).num_samples == 4
        except ShardCorrupt:
            pass

    check()


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
    assert decode_record(json.dumps(record).encode(), "p") is not None
    file[path[0]][path[1]] = value
    assert decode_record(json.dumps(record).encode(), "p") is None
    assert "damaged" in caplog.text


@pytest.mark.parametrize("generation", ["../x", -1, 10**9, 1.5, [1]])
def test_a_hostile_generation_is_replaced(copy: Path, generation: object, tmp_path: Path) -> None:
    edited(copy, ("generation",), generation)
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
