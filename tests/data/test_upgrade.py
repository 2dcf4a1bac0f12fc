"""`tvr upgrade`: data sets of format 2 become data sets of format 3 with the same samples."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from builders.batches import training
from builders.clip_files import file_contents, make_dataset, write_clips
from builders.old_format import columns_of, edit_manifest, make_old, npz, replace_columns

from tvr.data_prep.dataset import upgrade as upgrade_module
from tvr.data_prep.dataset.cli import upgrade
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.sample_table import SampleTable
from tvr.data_prep.dataset.upgrade import upgrade_dataset
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import ShardCorrupt


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 4 samples in 2 shards."""
    return Path(make_dataset(tmp_path_factory.mktemp("dataset"), 4, samples_per_shard=2))


@pytest.fixture
def copy(new: Path, tmp_path: Path) -> Path:
    """The data set in format 2."""
    folder = Path(shutil.copytree(new, tmp_path / "copy"))
    make_old(folder)
    return folder


def old_columns(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "samples.npz") as columns:
        return dict(columns)


def test_an_upgraded_data_set_equals_a_packed_one(
    new: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"format_version=2, .*`tvr upgrade .*copy` converts"):
        read_manifest(str(copy))
    assert upgrade([str(copy)]) == 0
    assert file_contents(copy) == file_contents(new)
    assert upgrade([str(copy), str(new)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{copy}: upgraded to format version 3",
        f"{copy}: already format version 3",
        f"{new}: already format version 3",
    ]


def test_a_run_reads_the_same_batches(new: Path, copy: Path) -> None:
    upgrade_dataset(str(copy))

    def shown(folder: Path) -> list[Any]:
        batches = islice(training(str(folder)), 8)
        return [(batch.keys, batch.captions, batch.frames.sum().item()) for batch in batches]

    assert shown(copy) == shown(new)


def test_a_second_generation_and_a_store_are_upgraded(new: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(new, tmp_path / "data"))
    columns = columns_of(folder)
    (folder / "samples.rows").unlink()
    replace_columns(folder, npz(columns))
    (folder / "samples.npz").rename(folder / "samples-3.npz")
    for path, value in (
        (("samples", "name"), "samples-3.npz"),
        (("generation",), 3),
        (("format_version",), 2),
    ):
        edit_manifest(folder, path, value)
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/upgraded", recursive=True)
    try:
        assert upgrade_dataset("memory://upgraded")
        names = sorted(path.rsplit("/", 1)[-1] for path in fs.ls("/upgraded", detail=False))
        assert [name for name in names if "samples" in name] == ["samples-3.rows"]
        samples = read_manifest("memory://upgraded").samples
        for each in fields(SampleTable):
            column = np.asarray(getattr(read_manifest(str(new)).samples, each.name))
            assert np.array_equal(getattr(samples, each.name), column)
    finally:
        fs.rm("/upgraded", recursive=True)


@pytest.mark.parametrize("stage", ["rows", "manifest", "removal"])
def test_an_interrupted_upgrade_leaves_a_whole_data_set(
    new: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    target = {
        "rows": "tvr.data_prep.dataset.manifest.write_rows",
        "manifest": "tvr.data_prep.dataset.manifest.write_file",
        "removal": "tvr.data_prep.dataset.upgrade.read_manifest",
    }[stage]
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            upgrade_dataset(str(copy))
    version = json.loads((copy / "manifest.json").read_text())["format_version"]
    assert version == (3 if stage == "removal" else 2)
    assert (copy / "samples.npz").exists()
    assert upgrade_dataset(str(copy)) is (stage != "removal")
    assert file_contents(copy) == file_contents(new)


def test_what_cannot_be_upgraded(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upgrade([str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    for version in (1, 4, None, "2", True):
        edit_manifest(copy, ("format_version",), version)
        assert upgrade([str(copy)]) == 2
        assert "tvr upgrade converts 2 to 3; pack the data set again" in capsys.readouterr().err
    edit_manifest(copy, ("format_version",), 2)
    edit_manifest(copy, ("shards", 0, "name"), "../x.tar")
    assert upgrade([str(copy)]) == 2
    assert "shards[0].name" in capsys.readouterr().err
    assert upgrade([]) == 2


def test_an_edited_npz_is_refused(copy: Path) -> None:
    content = (copy / "samples.npz").read_bytes()
    (copy / "samples.npz").write_bytes(content[:-1] + b"x")
    with pytest.raises(ShardCorrupt, match="sha256 differs"):
        upgrade_dataset(str(copy))
    (copy / "samples.npz").unlink()
    with pytest.raises(ShardCorrupt, match=r"samples\.npz is missing"):
        upgrade_dataset(str(copy))


def test_columns_out_of_shard_order_are_refused(copy: Path) -> None:
    columns = old_columns(copy)
    replace_columns(copy, npz({**columns, "shard": columns["shard"][::-1]}))
    with pytest.raises(ShardCorrupt, match="disagree on the samples per shard"):
        upgrade_dataset(str(copy))


def test_an_endless_npz_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade_module, "MAX_COLUMNS_BYTES", 100)
    monkeypatch.setattr("tvr.data_prep.dataset.manifest.PIECE_BYTES", 64)
    with pytest.raises(ShardCorrupt, match="more than 100 bytes"):
        upgrade_dataset(str(copy))


def test_packing_replaces_no_old_data_set_by_itself(tmp_path: Path) -> None:
    folder = Path(make_dataset(tmp_path, 2))
    make_old(folder)
    (tmp_path / "again").mkdir()
    with pytest.raises(FileExistsError, match="holds a complete data set"):
        pack_shards(write_clips(tmp_path / "again", 2), str(folder), layout="frames")


def with_column(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], bytes]:
    def build(folder: Path) -> bytes:
        columns = old_columns(folder)
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
    columns = old_columns(folder)
    del columns["crc32"]
    return npz(columns)


def with_extra_column(folder: Path) -> bytes:
    return npz({**old_columns(folder), "more": np.zeros(4)})


def huge_shape(name: str, count: int) -> Callable[[Path], bytes]:
    """A column whose header claims `count` values, without the values."""

    def build(folder: Path) -> bytes:
        content = io.BytesIO(npz(old_columns(folder)))
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
        zipfile.ZipFile(io.BytesIO(npz(old_columns(folder)))) as source,
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
        (lambda folder: npz(old_columns(folder))[:-100], "BadZipFile"),
    ],
)
def test_hostile_columns_are_refused_by_name(
    copy: Path, build: Callable[[Path], bytes], message: str
) -> None:
    replace_columns(copy, build(copy))
    with pytest.raises(ShardCorrupt, match=message):
        upgrade_dataset(str(copy))


def test_a_pickle_in_a_column_is_not_executed(copy: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    payload = np.array([Payload()] * 4, dtype=object)
    replace_columns(copy, npz({**old_columns(copy), "offset": payload}))
    with pytest.raises(ShardCorrupt, match="type of offset"):
        upgrade_dataset(str(copy))
    assert not (tmp_path / "executed").exists()
