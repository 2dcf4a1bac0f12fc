"""A beton is its shards in another file: the same batches, the same rules, complete or absent."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.clip_files import make_dataset, tokenize

from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.cli import pack
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.ffcv.writer import write_beton
from tvr.data_prep.packing import pack_clip
from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.loader import evaluation_batches, read_sample, train_batches
from tvr.data_prep.records import BadSample, Batch, ShardCorrupt, TooManyBadSamples

pytestmark = [
    pytest.mark.skipif(find_spec("ffcv") is None, reason="needs FFCV: make ffcv"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

NUM_SAMPLES = 13
RANDOM_VIEWS = Augmentation(frame_sampling="random", crop_scale=0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """13 clips of 4 frames of 32 x 32 (c05: broken JPEGs under the right checksum)."""
    folder = tmp_path_factory.mktemp("shards")
    encode, count = pack_clip.encode_jpeg, iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        broken = range(5 * 4, 6 * 4)
        patch.setattr(
            pack_clip,
            "encode_jpeg",
            lambda frame, quality: encode(frame[:, :32], quality)[
                : -40 if next(count) in broken else None
            ],
        )
        return make_dataset(folder, NUM_SAMPLES)


@pytest.fixture(scope="module")
def beton(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("beton") / "data")
    write_beton(shards, url)
    return url


def train(url: str, **changes: Any) -> Iterator[Batch]:
    defaults: dict[str, Any] = {
        "seed": 7,
        "global_batch": 8,
        "micro_batch": 2,
        "rank": 0,
        "world_size": 1,
        "start_step": 0,
        "workers": 0,
        "num_frames": 4,
        "image_size": 32,
        "tokenize": tokenize,
        "max_bad": 1,
    }
    return train_batches(url, **(defaults | changes))


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for name in Batch.__slots__:
            value, wanted = getattr(batch, name), getattr(other, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, wanted), name
            elif name == "reads":  # as many, from elsewhere
                assert sum(value.values()) == sum(wanted.values())
            else:
                assert value == wanted, name


@pytest.mark.parametrize(
    ("changes", "num_batches"),
    [
        ({"workers": 1}, 16),  # two epochs and a half
        ({"workers": 2, "rank": 0, "world_size": 2}, 10),
        ({"workers": 1, "rank": 1, "world_size": 2, "start_step": 3}, 10),
        ({"workers": 99, "start_step": 10**6, "global_batch": 6, "micro_batch": 6}, 3),
        ({"workers": 0, "num_frames": 3, "image_size": 24}, 7),
        (
            {"num_frames": 2, "image_size": 24, "augmentation": RANDOM_VIEWS, "cache_bytes": 10**6},
            14,
        ),
    ],
)
def test_batches_are_those_of_the_shards(
    shards: str, beton: str, changes: dict[str, Any], num_batches: int
) -> None:
    expected = list(islice(train(shards, **(changes | {"workers": 0})), num_batches))
    # Kept to the end, so that memory used twice would show.
    assert_same(list(islice(train(beton, **changes), num_batches)), expected)


def test_a_second_beton_of_other_sizes_in_one_process(
    shards: str, beton: str, tmp_path: Path
) -> None:
    smaller = make_dataset(tmp_path, 7, short_side=20, num_frames=3)
    other = str(tmp_path / "beton")
    write_beton(smaller, other)
    assert_same(list(islice(train(beton), 3)), list(islice(train(shards), 3)))
    settings = {"num_frames": 3, "image_size": 20}
    assert_same(
        list(islice(train(other, **settings), 5)), list(islice(train(smaller, **settings), 5))
    )


def test_epochs_of_ffcv_do_not_show(
    shards: str, beton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvr.data_prep.ffcv import loader as beton_stream

    monkeypatch.setattr(beton_stream, "EPOCH_SAMPLES", 6)  # three batches
    assert_same(list(islice(train(beton), 8)), list(islice(train(shards), 8)))


def test_evaluation_and_looking_need_no_ffcv(
    shards: str, beton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    settings = {"num_frames": 4, "image_size": 32}
    of_all = {"rank": 0, "world_size": 1, "workers": 1, "max_bad": 1, "micro_batch": 4}
    ours, theirs = (
        list(evaluation_batches(url, **of_all, **settings, tokenize=tokenize))
        for url in (beton, shards)
    )
    assert_same(ours, theirs)
    sample = read_sample(beton, "c03", **settings)
    assert np.array_equal(sample.frames, read_sample(shards, "c03", **settings).frames)
    with pytest.raises(ImportError, match=r"needs FFCV, the extra 'ffcv' .* `make ffcv`"):
        train(beton)


def test_damage_is_met_by_the_same_rules(shards: str, beton: str, tmp_path: Path) -> None:
    copies = [
        Path(shutil.copytree(url, tmp_path / Path(url).parent.name)) for url in (shards, beton)
    ]
    for folder in copies:
        manifest = read_manifest(str(folder))
        for row, back in ((2, 20), (9, 1500)):  # in the JSON of a beton, and in its frames
            samples = manifest.samples
            at = int(samples.offset[row] + samples.length[row]) - back
            with (folder / manifest.file_of_shard(int(samples.shard[row])).name).open(
                "r+b"
            ) as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))
    tar, ffcv = (list(islice(train(str(url), max_bad=3), 14)) for url in copies)
    met = [
        [(entry.position, entry.key, entry.reason) for batch in batches for entry in batch.replaced]
        for batches in (tar, ffcv)
    ]
    assert met[0] == met[1]
    assert {(key, reason) for _, key, reason in met[1]} == {
        ("c02", "checksum"),
        ("c05", "unreadable"),
        ("c09", "checksum"),
    }
    assert [batch.keys for batch in ffcv] == [batch.keys for batch in tar]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(ffcv, tar, strict=True))
    with pytest.raises(TooManyBadSamples, match="3 bad samples"):
        list(islice(train(str(copies[1]), max_bad=2), 14))
    problems = verify_dataset(str(copies[1])).problems
    assert {problem.where.split(": ")[-1] for problem in problems} >= {"c02", "c05", "c09"}
    assert any("sha256" in problem.what for problem in problems)


def test_verify_reads_all_of_it(beton: str) -> None:
    report = verify_dataset(beton, decode=0)
    (file,) = Path(beton).glob("*.beton")
    assert report.num_bytes == file.stat().st_size
    assert (report.num_samples, report.num_shards, report.problems) == (NUM_SAMPLES, 1, ())


def test_a_missing_or_short_file_is_named(beton: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beton, tmp_path / "short"))
    (file,) = folder.glob("*.beton")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ShardCorrupt, match=rf"{file.name}: \d+ of \d+ bytes are there"):
        train(str(folder))
    file.unlink()
    with pytest.raises(ShardCorrupt, match=rf"{file.name}: 0 of \d+ bytes"):
        train(str(folder))


def test_stopping_early_leaves_no_thread_and_torch_as_it_was(beton: str) -> None:
    threads, of_torch = set(threading.enumerate()), torch.get_num_threads()
    batches = train(beton, workers=2)
    next(batches)
    assert torch.get_num_threads() == of_torch
    batches.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - threads


def test_writing_is_complete_or_absent(shards: str, beton: str, tmp_path: Path) -> None:
    url = str(tmp_path / "killed")
    child = get_context("fork").Process(target=_die_after, args=(shards, url, 8))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert [path.name for path in Path(url).iterdir()] == ["writing.beton.partial"]
    with pytest.raises(FileNotFoundError, match="no data set there"):
        train(url)
    write_beton(shards, url)
    names = {path.name for path in Path(beton).iterdir()}
    assert {
        path.name for path in Path(url).iterdir()
    } == names  # the same bytes, too: named by them
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_beton(shards, url)
    with pytest.raises(FileExistsError, match="data set of shards"):
        write_beton(shards, shards, overwrite=True)
    other = make_dataset(tmp_path / "other", 3)
    write_beton(other, url, overwrite=True)
    assert len(list(Path(url).iterdir())) == 4  # nothing of the old one
    assert len(read_manifest(url).samples) == 3


def _die_after(shards: str, url: str, num_samples: int) -> None:
    write_beton(shards, url, progress=lambda done, _: os._exit(9) if done == num_samples else None)


def test_what_cannot_become_a_beton_is_refused(
    shards: str, beton: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged"))
    with (damaged / "shard-000001.tar").open("r+b") as file:
        file.seek(3000)
        file.write(b"?")
    url = str(tmp_path / "out")
    with pytest.raises(BadSample, match="c05: checksum"):
        write_beton(str(damaged), url)
    assert list(Path(url).iterdir()) == []
    videos = make_dataset(tmp_path / "videos", 2, layout="video")
    for source, problem in ((videos, "layout video"), (beton, "is a beton")):
        assert pack(["--format", "beton", "--source", source, "--out", url]) == 2
        assert problem in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be a local folder"):
        write_beton(shards, "memory://beton")
    assert pack(["--format", "beton", "--source", shards, "--out", url]) == 0
    assert "wrote 13 clips with 25 captions" in capsys.readouterr().out
