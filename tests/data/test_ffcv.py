"""A beton gives the batches of its shards, handles bad samples alike, and is complete or absent."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.batches import damage_sample, training
from builders.clip_files import make_dataset, tokenize
from builders.exhaustive import further

from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.cli import pack
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.ffcv.writer import write_beton
from tvr.data_prep.packing import pack_clip
from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.loader import evaluation_batches, read_sample
from tvr.data_prep.records import BadSample, Batch, Replacement, ShardCorrupt, TooManyBadSamples

pytestmark = [
    pytest.mark.skipif(find_spec("ffcv") is None, reason="needs FFCV: make ffcv"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

NUM_SAMPLES = 13
train = partial(training, image_size=32, max_bad=1)
RANDOM_VIEWS = Augmentation(frame_sampling="random", crop_scale=0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """13 clips of 4 frames of 32 x 32; c05 has truncated JPEGs and a valid checksum."""
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
        return make_dataset(folder, NUM_SAMPLES, processes=0)


@pytest.fixture(scope="module")
def beton(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("beton") / "data")
    write_beton(shards, url)
    return url


def without_frame(entry: Replacement) -> Replacement:
    """A replacement without the number of its broken frame: a reader with a cache decodes all
    frames of a clip, and may meet another one first."""
    return replace(entry, detail=re.sub(r"^\d\d\.jpg", "NN.jpg", entry.detail))


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for name in Batch.__slots__:
            value, wanted = getattr(batch, name), getattr(other, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, wanted), name
            elif name == "reads":  # as many samples, but from another source
                assert sum(value.values()) == sum(wanted.values())
            elif name == "replaced":
                assert [without_frame(e) for e in value] == [without_frame(e) for e in wanted]
            else:
                assert value == wanted, name


@pytest.mark.parametrize(
    ("changes", "num_batches"),
    [
        ({"workers": 1}, 16),  # two epochs and a half
        *further(
            ({"workers": 2, "rank": 0, "world_size": 2}, 10),
            ({"workers": 1, "rank": 1, "world_size": 2, "start_step": 3}, 10),
            ({"workers": 99, "start_step": 10**6, "global_batch": 6, "micro_batch": 6}, 3),
            ({"workers": 0, "num_frames": 3, "image_size": 24}, 7),
        ),
        (
            {"num_frames": 2, "image_size": 24, "augmentation": RANDOM_VIEWS, "cache_bytes": 10**6},
            14,
        ),
    ],
)
def test_batches_equal_those_of_the_shards(
    shards: str, beton: str, changes: dict[str, Any], num_batches: int
) -> None:
    expected = list(islice(train(shards, **(changes | {"workers": 0})), num_batches))
    # All batches are kept, so that reused memory would be detected.
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


def test_batches_do_not_depend_on_the_length_of_ffcv_epochs(
    shards: str, beton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvr.data_prep.ffcv import loader as ffcv_loader

    monkeypatch.setattr(ffcv_loader, "EPOCH_SAMPLES", 6)  # three batches
    assert_same(list(islice(train(beton), 8)), list(islice(train(shards), 8)))


def test_evaluation_and_inspection_do_not_need_ffcv(
    shards: str, beton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    settings = {"num_frames": 4, "image_size": 32}
    common = {"rank": 0, "world_size": 1, "workers": 1, "max_bad": 1, "micro_batch": 4}
    ours, theirs = (
        list(evaluation_batches(url, **common, **settings, tokenize=tokenize))
        for url in (beton, shards)
    )
    assert_same(ours, theirs)
    sample = read_sample(beton, "c03", **settings)
    assert np.array_equal(sample.frames, read_sample(shards, "c03", **settings).frames)
    with pytest.raises(ImportError, match=r"needs FFCV, the extra 'ffcv' .* `make ffcv`"):
        train(beton)


def test_damage_is_handled_as_in_shards(shards: str, beton: str, tmp_path: Path) -> None:
    copies = [
        Path(shutil.copytree(url, tmp_path / Path(url).parent.name)) for url in (shards, beton)
    ]
    for folder in copies:
        damage_sample(folder, 2, -20)  # in the JSON of a beton
        damage_sample(folder, 9, -1500)  # in the frames of a beton
    tar, ffcv = (list(islice(train(str(url), max_bad=3), 14)) for url in copies)
    replaced = [
        [(entry.position, entry.key, entry.reason) for batch in batches for entry in batch.replaced]
        for batches in (tar, ffcv)
    ]
    assert replaced[0] == replaced[1]
    assert {(key, reason) for _, key, reason in replaced[1]} == {
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


def test_verify_reads_the_whole_file(beton: str) -> None:
    report = verify_dataset(beton, decode=0)
    (file,) = Path(beton).glob("*.beton")
    assert report.num_bytes == file.stat().st_size
    assert (report.num_samples, report.num_shards, report.problems) == (NUM_SAMPLES, 1, ())


def test_a_missing_or_truncated_file_is_reported(beton: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beton, tmp_path / "short"))
    (file,) = folder.glob("*.beton")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ShardCorrupt, match=rf"{file.name}: the file has \d+ of \d+ bytes"):
        train(str(folder))
    file.unlink()
    with pytest.raises(ShardCorrupt, match=rf"{file.name}: the file has 0 of \d+ bytes"):
        train(str(folder))


def test_stopping_early_ends_all_threads_and_restores_torch(beton: str) -> None:
    threads, torch_threads = set(threading.enumerate()), torch.get_num_threads()
    batches = train(beton, workers=2)
    next(batches)
    assert torch.get_num_threads() == torch_threads
    batches.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - threads


def test_a_beton_is_complete_or_absent(shards: str, beton: str, tmp_path: Path) -> None:
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
    # The file name contains the sha256, so equal names mean equal bytes.
    assert {path.name for path in Path(url).iterdir()} == names
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_beton(shards, url)
    with pytest.raises(FileExistsError, match="data set of shards"):
        write_beton(shards, shards, overwrite=True)
    other = make_dataset(tmp_path / "other", 3)
    write_beton(other, url, overwrite=True)
    assert len(list(Path(url).iterdir())) == 4  # no file of the replaced beton is left
    assert len(read_manifest(url).samples) == 3


def _die_after(shards: str, url: str, num_samples: int) -> None:
    write_beton(
        shards, url, on_progress=lambda done, _: os._exit(9) if done == num_samples else None
    )


def test_invalid_sources_and_targets_are_refused(
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
