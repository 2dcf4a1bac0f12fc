"""The file of a data set's rows: written shard by shard, mapped, checked when first read."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from builders.clip_files import make_dataset
from builders.http_store import HttpStorage, serve_folder
from builders.old_format import edit_manifest
from builders.synthetic_rows import SHARD_ROWS, write_synthetic

from tvr.data_prep.dataset import node_copy, sample_blocks
from tvr.data_prep.dataset.manifest import Manifest, read_manifest, write_manifest
from tvr.data_prep.dataset.sample_table import SampleTable, concat_samples, hash_texts, text_array
from tvr.data_prep.reading.loader import read_sample
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample, ShardCorrupt


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 12 samples in 3 shards."""
    return Path(make_dataset(tmp_path_factory.mktemp("dataset"), 12))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The index of 200,000 samples."""
    return write_synthetic(tmp_path_factory.mktemp("large"), 200_000)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which copies of remote indexes are, for this test alone."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(node_copy.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(node_copy, "_used", {})
    return tmp_path / "tmp" / f"tvr-{os.getuid()}"


@pytest.fixture
def store(dataset: Path) -> Iterator[HttpStorage]:
    with serve_folder(dataset.parent) as store:
        yield store


def rows_by_shard(manifest: Manifest) -> list[SampleTable]:
    starts = manifest.row_starts.tolist()
    return [manifest.samples.rows(*starts[n : n + 2]) for n in range(len(manifest.shards))]


def arrays(samples: SampleTable) -> dict[str, np.ndarray]:
    return {each.name: np.asarray(getattr(samples, each.name)) for each in fields(SampleTable)}


def assert_same(one: SampleTable, other: SampleTable) -> None:
    for name, column in arrays(one).items():
        assert np.array_equal(column, getattr(other, name)), name


# ------------------------------------------------------------------ columns


def test_columns_equal_the_arrays_they_were_written_from(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest_of(dataset)
    monkeypatch.setattr(sample_blocks, "BLOCK_ROWS", 2)  # a shard has several blocks
    parts = rows_by_shard(manifest)
    names = [f"vid\u00e9o {row} " + "\U0001f3b8" * row for row in range(12)]
    parts = [with_video_ids(part, names[5 * n : 5 * n + 5]) for n, part in enumerate(parts)]
    folder = Path(shutil.copytree(dataset, tmp_path / "data"))
    write_manifest(str(folder), manifest, parts)
    expected, samples = concat_samples(parts), read_manifest(str(folder)).samples
    assert samples.video_id.tolist() == names
    assert_same(samples, expected)
    rows = np.array([11, 0, 7, 7])
    for name, column in arrays(expected).items():
        ours = getattr(samples, name)
        assert ours[3] == ours[-9] == column[3]
        assert type(ours[3]) is (str if name in ("key", "video_id") else column.dtype.type)
        for part in (slice(None), slice(1, 9), slice(4, 4), slice(9, 2), slice(10, 1, -3), rows):
            assert ours[part].tolist() == column[part].tolist()
            assert ours[part].dtype == column.dtype
        assert ours[np.arange(12) % 2 == 0].tolist() == column[::2].tolist()
        assert list(ours) == ours.tolist() == column.tolist()
        with pytest.raises(IndexError):
            ours[12]
    for name in ("length", "num_captions", "offset"):
        ours, column = getattr(samples, name), getattr(expected, name)
        assert (ours.sum(), ours.max(), ours.argmax()) == (
            column.sum(),
            column.max(),
            column.argmax(),
        )
    assert len(set(hash_texts(samples.video_id).tolist())) == 12


def read_manifest_of(folder: Path) -> Manifest:
    """The manifest with its rows in memory."""
    manifest = read_manifest(str(folder))
    rows = concat_samples(rows_by_shard(manifest))
    return replace(manifest, samples=rows)


def with_video_ids(part: SampleTable, names: list[str]) -> SampleTable:
    return replace(part, video_id=text_array(names))


def test_the_file_has_the_documented_layout(dataset: Path) -> None:
    content = (dataset / "samples.rows").read_bytes()
    assert content[:16] == b"TVR ROWS" + (1).to_bytes(4, "little") + (16384).to_bytes(4, "little")
    samples = read_manifest(str(dataset)).samples
    # Shard 0 has 5 rows: rows, bytes of keys, bytes of video ids; then offset, length, content,
    # crc32, num_captions, ends of keys, ends of video ids, keys, video ids, 64 bytes each.
    block = content[64 : 64 + 64 * 10]
    assert np.frombuffer(block[:12], "<u4").tolist() == [5, 15, 15]
    for place, (name, of) in enumerate(
        {
            "offset": "<i8",
            "length": "<i8",
            "content": "<u8",
            "crc32": "<u4",
            "num_captions": "<i4",
        }.items(),
        1,
    ):
        values = np.frombuffer(block[64 * place :], of, 5).tolist()
        assert values == getattr(samples, name)[:5].tolist()
    assert np.frombuffer(block[64 * 6 :], "<u4", 5).tolist() == [3, 6, 9, 12, 15]
    assert block[64 * 8 :][:15] == b"c00c01c02c03c04"
    table = np.frombuffer(content[-3 * 48 :], [("bytes", "<u8"), ("rows", "<u8"), ("sha", "V32")])
    assert table["bytes"].tolist() == [640, 640, 640]
    assert table["rows"].tolist() == [5, 5, 2]
    assert len(content) == 64 + 3 * 640 + 3 * 48


def test_one_long_video_id_takes_only_its_own_bytes(tmp_path: Path) -> None:
    url = write_synthetic(tmp_path, 5000, video_id=lambda row: "x" * (2000 if row == 7 else 9))
    assert (tmp_path / "samples.rows").stat().st_size < 5000 * 80
    samples = read_manifest(url).samples
    assert [len(text) for text in samples.video_id[6:9]] == [9, 2000, 9]


def test_writing_holds_the_rows_of_one_shard(tmp_path: Path) -> None:
    def peak(num_rows: int) -> int:
        tracemalloc.start()
        write_synthetic(tmp_path / str(num_rows), num_rows)
        bytes_used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_used

    peak(SHARD_ROWS)
    few, many = peak(4 * SHARD_ROWS), peak(40 * SHARD_ROWS)
    assert many < few + 36 * SHARD_ROWS * 10  # a row has 60 bytes and more


def test_wrong_numbers_of_rows_are_not_written(dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(str(dataset))
    parts = rows_by_shard(manifest)
    for rows, message in (
        (parts[:2], "rows of 2 shards, must be 3"),
        ([*parts, parts[0]], "shard 3 has 5 rows, must have 0"),
        ([parts[0], parts[2], parts[1]], "shard 1 has 2 rows, must have 5"),
    ):
        with pytest.raises(ValueError, match=message):
            write_manifest(str(tmp_path), manifest, rows)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_rows_of_files(dataset: Path) -> None:
    manifest = read_manifest(str(dataset))
    assert [manifest.rows_of_file(n) for n in range(3)] == [range(5), range(5, 10), range(10, 12)]
    assert manifest.samples.shard.tolist() == [0] * 5 + [1] * 5 + [2] * 2


# ------------------------------------------------------------------ opening


def test_opening_reads_no_row(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, true_read = list[int](), os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        read.append(length)
        return true_read(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    manifest = read_manifest(large)
    assert manifest.num_samples == 200_000
    table_bytes = 48 * len(manifest.shards)
    assert read == [64, table_bytes]
    assert manifest.samples.key[123_456] == "clip-0123456"
    assert len(read) == 3  # one block
    assert read[2] < 200 * SHARD_ROWS
    assert manifest.samples.offset[123_457] > 0
    assert len(read) == 3


def test_opening_a_million_rows_takes_little_memory(tmp_path: Path) -> None:
    url = write_synthetic(tmp_path, 1_000_000)
    code = (
        "import sys\n"
        "from tvr.data_prep.dataset.manifest import read_manifest\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return sum(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))\n"
        "before = anonymous()\n"
        "samples = read_manifest(sys.argv[1]).samples\n"
        "rows = range(0, len(samples), 4999)\n"
        "assert all(samples.key[row] == f'clip-{row:07d}' for row in rows)\n"
        "print(anonymous() - before)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    # The columns of these rows take 67 MB, and took 124 MB as arrays of numpy.
    assert int(ended.stdout) < 20_000


def test_forked_processes_share_the_checks(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = read_manifest(str(dataset)).samples
    process = multiprocessing.get_context("fork").Process(target=lambda: samples.key[0])
    process.start()
    process.join(60)
    assert process.exitcode == 0

    def pread(*arguments: object) -> bytes:
        raise AssertionError("the block was checked by the child")

    monkeypatch.setattr(os, "pread", pread)
    assert samples.key[4] == "c04"
    with pytest.raises(AssertionError):
        samples.key[5]


# ------------------------------------------------------------ remote data sets


def test_a_remote_index_is_downloaded_once_a_node(
    store: HttpStorage, own_temporary_folder: Path, dataset: Path
) -> None:
    url = f"{store.url}/data"
    for _ in range(3):
        samples = read_manifest(url).samples
        assert samples.key.tolist() == [f"c{row:02d}" for row in range(12)]
    # Header, table and content, once.
    assert store.requests.count("data/samples.rows") == 3
    (copy,) = own_temporary_folder.glob("*.rows")
    assert copy.read_bytes() == (dataset / "samples.rows").read_bytes()
    assert stat.S_IMODE(own_temporary_folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in own_temporary_folder.iterdir()) == [copy.name, "rows.lock"]


def test_processes_that_start_together_download_an_index_once(
    store: HttpStorage, tmp_path: Path
) -> None:
    def read() -> None:
        samples = read_manifest(f"{store.url}/data", node_folder=str(tmp_path / "cache")).samples
        assert samples.key[11] == "c11"

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert store.requests.count("data/samples.rows") == 3


def test_the_shard_cache_holds_the_index(
    store: HttpStorage, tmp_path: Path, own_temporary_folder: Path
) -> None:
    folder = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    reader = SampleReader(f"{store.url}/data", num_frames=1, image_size=16, shard_cache=folder)
    assert reader.read(11).key == "c11"
    assert len(list((tmp_path / "cache").glob("*.rows"))) == 1
    assert not own_temporary_folder.exists()


@pytest.mark.parametrize("first", [True, False])
def test_a_copy_is_found_with_and_without_a_shard_cache(
    store: HttpStorage, tmp_path: Path, first: bool
) -> None:
    folders = [str(tmp_path / "cache"), None]
    for folder in folders if first else folders[::-1]:
        samples = read_manifest(f"{store.url}/data", node_folder=folder).samples
        assert samples.key[11] == "c11"
    assert store.requests.count("data/samples.rows") == 3


def test_a_damaged_remote_index_is_refused_and_not_kept(
    store: HttpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.answer

    def answer(name: str, byte_range: str | None) -> tuple[int, bytes]:
        status, content = whole(name, byte_range)
        if name.endswith(".rows") and len(content) > 1000:
            content = content[:300] + bytes([content[300] ^ 1]) + content[301:]
        return status, content

    monkeypatch.setattr(store, "answer", answer)
    folder = tmp_path / "cache"
    with pytest.raises(ShardCorrupt, match=r"samples\.rows: damaged: the sha256 of a block"):
        read_manifest(f"{store.url}/data", node_folder=str(folder))
    assert [path.name for path in folder.iterdir()] == ["rows.lock"]
    monkeypatch.setattr(store, "answer", whole)
    assert read_manifest(f"{store.url}/data", node_folder=str(folder)).samples.key[0] == "c00"


def test_a_copy_that_rots_is_downloaded_again(store: HttpStorage, tmp_path: Path) -> None:
    def key() -> str:
        return read_manifest(f"{store.url}/data", node_folder=str(tmp_path / "c")).samples.key[0]

    assert key() == "c00"
    (copy,) = (tmp_path / "c").glob("*.rows")
    content = bytearray(copy.read_bytes())
    content[300] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ShardCorrupt, match="are damaged"):
        key()
    assert not copy.exists()
    assert key() == "c00"
    copy.write_bytes(b"short")
    assert key() == "c00"


def test_links_in_place_of_a_copy_are_not_followed(store: HttpStorage, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "cache"
    read_manifest(f"{store.url}/data", node_folder=str(folder))
    (copy,) = folder.glob("*.rows")
    for name in (copy.name, f"{copy.name}.partial"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    assert read_manifest(f"{store.url}/data", node_folder=str(folder)).samples.key[0] == "c00"
    assert victim.read_bytes() == b"precious"
    assert not copy.is_symlink()


def make_readable(folder: Path) -> None:
    folder.mkdir(mode=0o755)


def make_link(folder: Path) -> None:
    (folder.parent / "other").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "other")


@pytest.mark.parametrize("make", [make_readable, make_link, Path.touch])
def test_a_temporary_folder_that_others_may_write_to_is_refused(
    store: HttpStorage, own_temporary_folder: Path, make: Callable[[Path], None]
) -> None:
    make(own_temporary_folder)
    with pytest.raises(PermissionError, match="must be a folder of this user with the mode 0700"):
        read_manifest(f"{store.url}/data")


def test_unused_copies_are_removed_by_a_download(store: HttpStorage, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    old, new = folder / f"{'0' * 64}.rows", folder / f"{'1' * 64}.rows"
    other = folder / "notes.rows"
    for path in (old, new, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (0, 0))
    read_manifest(f"{store.url}/data", node_folder=str(folder))
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


def test_a_data_set_in_memory_needs_no_copy(own_temporary_folder: Path) -> None:
    fs = fsspec.filesystem("memory")
    folder = write_synthetic("memory://rows-in-memory", 3000)
    try:
        assert read_manifest(folder).samples.key[2999] == "clip-0002999"
        assert not own_temporary_folder.exists()
    finally:
        fs.rm("/rows-in-memory", recursive=True)


def test_a_missing_remote_index_is_named(store: HttpStorage, tmp_path: Path, dataset: Path) -> None:
    copied = Path(shutil.copytree(dataset, dataset.parent / "without"))
    (copied / "samples.rows").unlink()
    with pytest.raises(ShardCorrupt, match=r"samples\.rows is missing although manifest\.json"):
        read_manifest(f"{store.url}/without", node_folder=str(tmp_path / "cache"))
    shutil.rmtree(copied)


def test_reading_a_sample_by_key(dataset: Path) -> None:
    assert read_sample(str(dataset), "c07", num_frames=1, image_size=8).key == "c07"


def test_an_edited_size_is_found_at_opening(dataset: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset, tmp_path / "data"))
    edit_manifest(folder, ("shards", 0, "num_samples"), 4)
    with pytest.raises(ShardCorrupt, match="disagree on the samples per shard"):
        read_manifest(str(folder))


def test_a_writer_of_blocks_ends_with_its_table() -> None:
    file = io.BytesIO()
    writer = sample_blocks.RowsWriter(file)
    assert writer.finish().num_bytes == len(file.getvalue()) == 64


def test_a_damaged_block_costs_its_samples_and_not_the_run(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    content = bytearray((folder / "samples.rows").read_bytes())
    content[sample_blocks.HEADER.size + 40] ^= 1  # in the first block
    (folder / "samples.rows").write_bytes(content)
    reader = SampleReader(str(folder), num_frames=2, image_size=16)
    with pytest.raises(BadSample, match=r"row 0: checksum: .*samples\.rows"):
        reader.read(0)


def test_too_many_samples_are_refused_before_memory_is_taken(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)

    edit_manifest(folder, ["shards", 0, "shard_bytes"], 1 << 49)
    edit_manifest(folder, ["shards", 0, "num_samples"], 1 << 39)
    with pytest.raises(ShardCorrupt, match=r"shards=.* must be at most 4294967296 samples in all"):
        read_manifest(str(folder))
