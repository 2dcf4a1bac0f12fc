"""Plain webdataset and the indexed reader read the same samples from the same shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.batches import training
from builders.clip_files import make_dataset
from webdataset import shardlists
from webdataset.compat import WebDataset

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.sample_reader import SampleReader

# webdataset leaves the shards open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NUM_CLIPS = 16
Members = dict[str, bytes]


@pytest.fixture(scope="module", params=["frames", "video"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 clips in 8 shards."""
    root = tmp_path_factory.mktemp(request.param)
    make_dataset(root, NUM_CLIPS, samples_per_shard=2, layout=request.param)
    return root / "data"


def plain_samples(folder: Path, **settings: Any) -> Iterator[tuple[str, Members]]:
    """(key, members by extension) of all samples, as a user of webdataset reads them."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline: Any = WebDataset(shards, **({"shardshuffle": False} | settings))
    if settings.get("shardshuffle"):
        pipeline = pipeline.shuffle(5)
    for sample in pipeline:
        members = {name: bytes(value) for name, value in sample.items() if name[0] != "_"}
        yield sample["__key__"], members


def indexed_samples(folder: Path) -> dict[str, Members]:
    """The same through the indexed reader."""
    reader = SampleReader(str(folder), num_frames=4, image_size=16)
    return {
        reader.key(row): {name: bytes(value) for name, value in reader.members(row).items()}
        for row in range(len(reader))
    }


def captions_of(members: Members) -> tuple[str, ...]:
    return tuple(json.loads(members["json"])["captions"])


def test_both_read_the_same_samples_bytes_and_captions_in_the_same_order(folder: Path) -> None:
    plain, indexed = list(plain_samples(folder)), indexed_samples(folder)
    assert len(plain) == NUM_CLIPS
    assert plain == list(indexed.items())
    reader = SampleReader(str(folder), num_frames=4, image_size=16)
    for row, (key, members) in enumerate(plain):
        sample = reader.read(row)
        assert (sample.key, tuple(each.text for each in sample.captions)) == (
            key,
            captions_of(members),
        )
    assert read_manifest(str(folder)).num_captions == sum(
        len(captions_of(members)) for _, members in plain
    )


def test_webdatasets_own_shuffle_and_split_by_node_keep_each_sample_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = indexed_samples(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    by_rank: list[list[tuple[str, Members]]] = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        settings = {"shardshuffle": 8, "seed": 3, "nodesplitter": shardlists.split_by_node}
        by_rank.append(list(plain_samples(folder, **settings)))
    assert [len(samples) for samples in by_rank] == [NUM_CLIPS // 2] * 2
    both = by_rank[0] + by_rank[1]
    assert [key for key, _ in both] != list(indexed)  # it was shuffled
    assert dict(both) == indexed


def test_an_epoch_of_training_holds_the_samples_and_captions_of_plain_webdataset(
    folder: Path,
) -> None:
    plain = {key: captions_of(members) for key, members in plain_samples(folder)}
    keys: list[str] = []
    for rank in range(2):
        batches = training(str(folder), global_batch=8, micro_batch=4, rank=rank, world_size=2)
        for batch, _ in zip(batches, range(2), strict=False):
            keys += batch.keys
            for key, caption in zip(batch.keys, batch.captions, strict=True):
                assert caption in plain[key]
    assert sorted(keys) == sorted(plain)
